"""The training loop and the run around it: exact repetition, exact resumption, honest records."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from conftest import tiny_flags, write_class
from equiframe.backbones import make_backbone
from equiframe.data.prepare import prepare_data
from equiframe.errors import InputError
from equiframe.loop import learning_rate
from equiframe.losses import Loss
from equiframe.measure import evaluate_run
from equiframe.method import METHODS
from equiframe.model import build_classifier, load_classifier
from equiframe.numerics import choose_device, choose_numerics, fast_bfloat16
from equiframe.recipe import Recipe
from equiframe.runs import RunFolder
from equiframe.train import Interrupted, Trainer, finish, settle, train

pytestmark = pytest.mark.usefixtures("plain_pages")

TIMING = ("seconds", "images_per_second")


def history_of(path):
    return [{k: v for k, v in r.items() if k not in TIMING} for r in RunFolder(path).history()]


def metrics_of(path):
    return {k: v for k, v in RunFolder(path).read_json("metrics.json").items() if k not in TIMING}


def assert_same_run(one, two):
    assert history_of(one) == history_of(two)
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    assert (one / "model.json").read_bytes() == (two / "model.json").read_bytes()
    assert metrics_of(one) == metrics_of(two)


def stop_at(epoch, step, number=signal.SIGINT):
    """A progress callback that sends a real signal at a step (a multiple of 10) of an epoch."""

    def progress(state):
        if state.get("step") == step and state["epoch"] == epoch:
            signal.raise_signal(number)

    return progress


# --- the same again ---------------------------------------------------------------------------------------------------


def test_a_short_run_reaches_the_recorded_loss(tiny, tmp_path):
    """Golden: a change of this number is a change of the training. Wide enough for other CPUs' rounding."""
    train(
        tiny(
            backbone="resnet20",
            width=4,
            epochs=2,
            method="etf-la",
            batch_size=128,
            lr=0.1,
            mixup=1.0,
            weight_decay=2e-4,
        ),
        tmp_path / "run",
    )
    losses = [r["loss"] for r in RunFolder(tmp_path / "run").history()]
    assert losses == pytest.approx(GOLDEN, rel=5e-3)


GOLDEN = [2.58911, 2.08611]


@pytest.mark.parametrize("fields", [{}, {"method": "etf-dr", "imbalance": 20.0, "mixup": 0.0}], ids=["plain", "cut"])
def test_the_same_run_twice_is_the_same_to_the_bit(tiny, tmp_path, fields):
    recipe = tiny(epochs=2, **fields)
    train(recipe, tmp_path / "one")
    torch.rand(100)  # whatever happened before
    train(recipe, tmp_path / "two", data=prepare_data(recipe))
    assert_same_run(tmp_path / "one", tmp_path / "two")
    train(recipe.with_(seed=1), tmp_path / "three")
    assert history_of(tmp_path / "one") != history_of(tmp_path / "three")


def test_streamed_images_train_and_repeat_too(tiny, tmp_path, class_folder):
    data = str(class_folder({"a": 20, "b": 12, "c": 6}, test={"a": 2, "b": 2, "c": 2}))
    recipe = tiny(data=data, data_mode="stream", batch_size=8, workers=2)
    train(recipe, tmp_path / "one")
    train(recipe.with_(workers=1), tmp_path / "two")
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert RunFolder(tmp_path / "one").recipe().augmentation == "resized-crop-flip"
    pixels = tiny(data_mode="stream", image_size=12, epochs=1)  # digits are pixels already, of another size
    train(pixels, tmp_path / "digits")
    assert RunFolder(tmp_path / "digits").recipe().data_mode == "stream"


# --- interrupted and resumed ------------------------------------------------------------------------------------------


@pytest.fixture
def whole(tiny, tmp_path):
    """A run without interruption, to compare with."""
    train(tiny(epochs=3), tmp_path / "whole")
    return tmp_path / "whole"


@pytest.mark.parametrize(
    ("number", "epoch", "step"), [(signal.SIGINT, 1, 10), (signal.SIGTERM, 0, 10), (signal.SIGINT, 2, 10)]
)
def test_a_run_stopped_in_mid_epoch_continues_to_the_bit(tiny, tmp_path, whole, number, epoch, step):
    path = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(tiny(epochs=3), path, progress=stop_at(epoch, step, number))
    saved = RunFolder(path).load_checkpoint()["progress"]
    assert (saved["epoch"], saved["step"]) == (epoch, step)
    assert not RunFolder(path).finished
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)  # as it was
    torch.rand(7)
    said = []
    train(tiny(epochs=3, workers=1), path, resume=True, say=said.append)
    assert f"continuing at epoch {epoch + 1}, step {step}" in said
    assert_same_run(path, whole)


def test_dropout_continues_to_the_bit(tiny, tmp_path, monkeypatch):
    """What is drawn from torch's own generator while training is drawn on where it stopped."""

    def with_dropout(name, **options):
        backbone = torch.nn.Sequential(make_backbone(name, **options), torch.nn.Dropout(0.3))
        backbone.num_features = 16
        return backbone

    monkeypatch.setattr("equiframe.model.make_backbone", with_dropout)
    train(tiny(), tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(tiny(), tmp_path / "run", progress=stop_at(0, 10))
    torch.rand(7)
    train(tiny(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("fields", "epoch"),
    [
        ({"method": "nearest-frame-dr"}, 1),
        ({"method": "disa"}, 1),
        ({"method": "ldam-drw", "reweight_from": 0.6, "imbalance": 10}, 1),  # begins in the epoch of the stop, after it
        ({"method": "ldam-drw", "reweight_from": 0.4, "imbalance": 10}, 1),  # began in that epoch, before it
    ],
)
def test_heads_and_losses_with_a_state_continue_to_the_bit(tiny, tmp_path, fields, epoch):
    recipe = tiny(epochs=3, batch_size=16 if "imbalance" in fields else 64, **fields)
    train(recipe, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "run", progress=stop_at(epoch, 10))
    train(recipe, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    "fields",
    [
        {"ema": 0.9},
        {"sam": 0.05},
        {"optimizer": "adamw", "lr": 1e-3, "ema": 0.9, "sam": 0.1},
        {
            "sampler": "progressive",
            "mixup": 1.0,
            "cutmix": 1.0,
            "remix": True,
            "augmentation": "crop+randaugment+cutout",
        },
        {"mixup": 1.0, "mix_until": 0.7},
        {"mixup": 1.0, "mix_share": "known", "epochs": 3, "sam": 0.05},
    ],
    ids=["ema", "sam", "adamw+both", "sampler+mixing+augmentation", "mixing that ends", "mixing of what is known"],
)
def test_every_way_to_train_continues_to_the_bit(tiny, tmp_path, fields):
    recipe = tiny(**{"epochs": 2, **fields})
    train(recipe, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "run", progress=stop_at(1, 10))
    train(recipe, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_as_many_batches_are_mixed_as_the_network_knows(tiny, tmp_path):
    """Epoch by epoch the share is that of the images of unmixed batches that were right in the epoch before, counted here from what the loss sees."""
    looked: list[tuple[int, int] | None] = []  # of each step: right and seen, or None of a mixed one

    def look(module, arguments, result):
        if isinstance(module, Loss):
            output, targets = arguments[:2]
            plain = isinstance(targets, torch.Tensor)
            looked.append((int((output.logits.argmax(1) == targets).sum()), len(targets)) if plain else None)

    recipe = tiny(epochs=6, batch_size=16)
    train(recipe, tmp_path / "never")
    hook = torch.nn.modules.module.register_module_forward_hook(look)
    try:
        train(recipe.with_(mixup=1.0, mix_share="known", mix_until=0.8), tmp_path / "run")
    finally:
        hook.remove()
    history, never = (RunFolder(tmp_path / name).history() for name in ("run", "never"))
    assert history[0]["mix_share"] == 0
    assert history[0]["loss"] == never[0]["loss"], "nothing is known yet, so nothing is mixed"
    steps = len(looked) // 6
    epochs = [looked[i * steps : (i + 1) * steps] for i in range(6)]
    for epoch, following in zip(epochs, history[1:], strict=False):
        plain = [step for step in epoch if step is not None]
        assert following["mix_share"] == pytest.approx(sum(r for r, _ in plain) / sum(n for _, n in plain))
    mixed = [step is None for epoch in epochs[1:5] for step in epoch]
    assert 0 < sum(mixed) < len(mixed)
    assert all(step is not None for step in epochs[5])


def test_deferred_weighting_begins_at_its_epoch(tiny, tmp_path):
    """0.8 of five epochs: four are those of plain LDAM, the fifth is not."""
    losses = {}
    for method in ("ldam", "ldam-drw"):
        train(tiny(method=method, epochs=5, imbalance=20), tmp_path / method)
        losses[method] = [record["loss"] for record in RunFolder(tmp_path / method).history()]
    assert losses["ldam"][:4] == losses["ldam-drw"][:4]
    assert losses["ldam"][4] != losses["ldam-drw"][4]


def test_layers_of_timm_at_their_own_rates_continue_to_the_bit(tiny, tmp_path):
    recipe = tiny(
        backbone="timm:test_resnet", width=None, method="ce", class_counts=(70,) * 10, batch_size=32, layer_decay=0.7
    )
    train(recipe, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "run", progress=stop_at(0, 10))
    train(recipe, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    train(recipe.with_(layer_decay=1.0), tmp_path / "even")
    assert history_of(tmp_path / "even") != history_of(tmp_path / "whole")


def test_a_rate_that_adamw_does_not_like_is_noted(tiny, tmp_path):
    said = []
    train(tiny(optimizer="adamw", lr=0.05), tmp_path / "run", say=said.append)
    assert "note: AdamW seldom trains at a learning rate of 0.05; --lr 0.001 is usual" in said


def test_pretrained_weights_are_loaded_once(tiny, tmp_path, monkeypatch):
    """A resumed run takes its weights from the checkpoint, and needs no network."""
    import timm

    create, asked = timm.create_model, []

    def offline(*args, pretrained, **options):
        asked.append(pretrained)
        return create(*args, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    recipe = tiny(backbone="timm:test_resnet", width=None, pretrained=True, class_counts=(70,) * 10, method="ce")
    with pytest.raises(Interrupted):
        train(recipe.with_(batch_size=32), tmp_path / "run", progress=stop_at(0, 10))
    train(recipe.with_(batch_size=32), tmp_path / "run", resume=True)
    evaluate_run(tmp_path / "run")
    assert asked == [True, False, False]


def test_stopped_again_and_again(tiny, tmp_path, whole):
    path = tmp_path / "run"
    for epoch in range(3):
        with pytest.raises(Interrupted):
            train(tiny(epochs=3), path, resume=epoch > 0, progress=stop_at(epoch, 10))
    train(tiny(epochs=3), path, resume=True)
    assert_same_run(path, whole)


def test_stopped_between_two_epochs(tiny, tmp_path, whole):
    path = tmp_path / "run"

    def progress(state):
        if state.get("done") and state["epoch"] == 0:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        train(tiny(epochs=3), path, progress=progress)
    train(tiny(epochs=3), path, resume=True)
    assert_same_run(path, whole)


def test_a_second_signal_acts_at_once(tiny, tmp_path, whole):
    path = tmp_path / "run"

    def progress(state):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tiny(epochs=3), path, progress=lambda state: (progress(state), progress(state)))
    assert RunFolder(path).load_checkpoint() is None
    train(tiny(epochs=3), path, resume=True)
    assert_same_run(path, whole)


@pytest.mark.parametrize("call", range(3))
@pytest.mark.parametrize("method", ["save_checkpoint", "append_history"])
def test_killed_between_history_and_checkpoint(tiny, tmp_path, whole, monkeypatch, method, call):
    path, calls, original = tmp_path / "run", [], getattr(RunFolder, method)

    def killed(self, content):
        calls.append(content)
        if len(calls) == call + 1:
            raise KeyboardInterrupt
        original(self, content)

    monkeypatch.setattr(RunFolder, method, killed)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(epochs=3), path)
    monkeypatch.undo()
    train(tiny(epochs=3), path, resume=True)
    assert_same_run(path, whole)


@pytest.mark.parametrize("name", ["model.safetensors", "model.json", "metrics.json"])
def test_killed_while_the_results_are_written(tiny, tmp_path, whole, monkeypatch, name):
    path, write = tmp_path / "run", RunFolder.write

    def killed(self, file, content):
        if file == name:
            raise KeyboardInterrupt
        write(self, file, content)

    monkeypatch.setattr(RunFolder, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(epochs=3), path)
    monkeypatch.undo()
    assert not RunFolder(path).finished
    train(tiny(epochs=3), path, resume=True)
    assert_same_run(path, whole)


def test_interrupted_while_data_is_prepared_leaves_nothing(tiny, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("equiframe.train.prepare_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tmp_path / "run")
    assert os.listdir(tmp_path) == []


def test_a_finished_run_is_left_as_it_is(tiny, finished_run):
    before = {p: p.stat().st_mtime_ns for p in finished_run.rglob("*")}
    said = []
    metrics = train(RunFolder(finished_run).recipe(), finished_run, resume=True, say=said.append)
    assert metrics == RunFolder(finished_run).read_json("metrics.json")
    assert said == [f"{finished_run} is finished"]
    assert before == {p: p.stat().st_mtime_ns for p in finished_run.rglob("*")}


def test_what_was_settled_is_kept_on_resume(tiny, tmp_path):
    """A run continues with the numerics that the machine chose then, not with what it would choose now."""
    path = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(tiny(precision="bfloat16", memory_format="channels-last"), path, progress=stop_at(0, 10))
    train(tiny(precision="auto", memory_format="auto", device="auto"), path, resume=True)
    recipe = RunFolder(path).recipe()
    assert (recipe.device, recipe.precision, recipe.memory_format) == ("cpu", "bfloat16", "channels-last")
    assert RunFolder(path).read_json("environment.json")["trial_images_per_second"] == {}


@pytest.fixture
def stopped(tiny, tmp_path):
    """A run that was stopped, and its data folder."""
    for k, name in enumerate(("cat", "dog")):
        write_class(tmp_path / "pets" / name, k, 60)
    recipe = tiny(data=str(tmp_path / "pets"), batch_size=8, width=4)
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "run", progress=stop_at(0, 10))
    return recipe, tmp_path / "run", tmp_path / "pets"


def test_data_that_changed_under_a_run(stopped):
    recipe, path, data = stopped
    (data / "cat" / "000.png").unlink()
    with pytest.raises(InputError, match=r"the data changed since .*run began"):
        train(recipe, path, resume=True)


def test_a_checkpoint_of_another_recipe(stopped, tmp_path):
    recipe, path, _ = stopped
    with pytest.raises(Interrupted):
        train(recipe.with_(lr=0.2, width=8), tmp_path / "other", progress=stop_at(0, 10))
    shutil.copy(tmp_path / "other" / "checkpoints" / "last.pt", path / "checkpoints")
    (path / "checksums.json").unlink()
    with pytest.raises(InputError, match=r"belongs to another recipe \(width was 8, now 4; lr was 0.2, now 0.05\)"):
        train(recipe, path, resume=True)
    assert (path / "recipe.yaml").is_file()


@pytest.mark.parametrize("change", [{"model": {}}, {"optimizer": None}, {"progress": 1}, {"recipe": {"x": 1}}])
def test_a_checkpoint_that_does_not_fit(stopped, change):
    recipe, path, _ = stopped
    folder = RunFolder(path)
    folder.save_checkpoint(folder.load_checkpoint() | change)
    with pytest.raises(InputError, match="does not fit this run"):
        train(recipe, path, resume=True)
    folder.save_checkpoint({})
    with pytest.raises(InputError, match="does not fit this run"):
        train(recipe, path, resume=True)


def test_a_signal_to_a_process(tmp_path, whole):
    """Ctrl-C in a real process: it saves, says how to continue, exits with 130; the rest is the same to the bit."""
    command = [sys.executable, "-m", "equiframe", "train", *tiny_flags(epochs=3, method="etf-la"), "--out", "run"]
    slowed = "import time, equiframe.train as t; step = t.Trainer.train_step\n" \
             "t.Trainer.train_step = lambda *a: (time.sleep(0.05), step(*a))[1]\n" \
             "import sys; from equiframe.cli import main; sys.exit(main(sys.argv[1:]))"  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", slowed, *command[3:]], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    said = []
    for line in process.stderr:
        said.append(line.decode())
        if said[-1].startswith("epoch 1/3"):
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
    output = process.stdout.read()
    process.stdout.close()
    process.stderr.close()
    assert process.wait(60) == 130
    assert output == b""
    assert said[-1].startswith("stopped and saved in run; continue with: equiframe train --resume --out run")
    saved = RunFolder(tmp_path / "run").load_checkpoint()["progress"]
    assert saved["epoch"] == 1
    assert saved["step"] > 0
    train(Recipe(**RunFolder(tmp_path / "run").recipe().to_dict()), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_training_outside_the_main_thread(tiny, tmp_path):
    thread = threading.Thread(target=train, args=(tiny(), tmp_path / "run"))
    thread.start()
    thread.join()
    assert RunFolder(tmp_path / "run").finished


# --- losses that are not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ce", "etf-la", "etf-dr"])
def test_a_loss_that_is_not_finite_stops_and_leaves_no_folder(tiny, tmp_path, method):
    with pytest.raises(InputError, match=r"in epoch 1, step \d+ \(learning rate .*Try a lower --lr than 1e\+30"):
        train(tiny(lr=1e30, method=method, epochs=2, warmup=0.0), tmp_path / "a" / "run")
    assert os.listdir(tmp_path) == []


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tiny, tmp_path, whole, monkeypatch):
    step = Trainer.train_step

    def bad(self, *args):
        loss = step(self, *args)
        return loss * (math.nan if self.epoch == 1 and self.step == 4 else 1)

    monkeypatch.setattr(Trainer, "train_step", bad)
    with pytest.raises(InputError, match=r"the loss became nan in epoch 2, step 5 \(learning rate 0.05"):
        train(tiny(epochs=3), tmp_path / "run")
    monkeypatch.undo()
    assert RunFolder(tmp_path / "run").load_checkpoint()["progress"]["epoch"] == 1
    assert len(RunFolder(tmp_path / "run").history()) == 1
    train(tiny(epochs=3), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_weights_that_are_not_finite_are_not_saved(tiny, tmp_path, monkeypatch):
    """The last step of an epoch may break the weights after a finite loss."""
    step = Trainer.train_step

    def bad(self, *args):
        loss = step(self, *args)
        if self.epoch == 1 and self.step == self.loader.steps - 1:
            next(self.model.parameters()).data.fill_(math.inf)
        return loss

    monkeypatch.setattr(Trainer, "train_step", bad)
    with pytest.raises(InputError, match="a weight became infinite or NaN in epoch 2, step 17"):
        train(tiny(epochs=3), tmp_path / "run")
    assert RunFolder(tmp_path / "run").load_checkpoint()["progress"]["epoch"] == 1


def test_a_damaged_image_in_a_stream_leaves_no_folder(tiny, tmp_path, class_folder):
    data = class_folder({"a": 20, "b": 12})
    picture = data / "b" / "003.png"
    picture.write_bytes(picture.read_bytes()[:100])
    with pytest.raises(InputError, match=r"b/003\.png"):
        train(tiny(data=str(data), data_mode="stream", batch_size=16, width=4), tmp_path / "out" / "run")
    assert not (tmp_path / "out").exists()


# --- what trains, and what is recorded --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_what_it_says(tiny, tmp_path, method):
    recipe = tiny(method=method, imbalance=10)
    said = []
    metrics = train(recipe, tmp_path / "run", say=said.append)
    assert metrics["top1"] > 0.1
    model, card = load_classifier(tmp_path / "run")
    recorded = RunFolder(tmp_path / "run").read_json("environment.json")["training_parameters"]
    in_head = {name for name in recorded if name.startswith("head.")}
    learns = {"linear": {"head.linear.weight", "head.linear.bias"}, "cosine": {"head.weight"}}
    head = card.method_fields["head"]
    assert {name for name in in_head if "batch_norm" not in name} == learns.get(head, set())
    torch.manual_seed(0)
    before, after = build_classifier(card, seed=0).head.state_dict(), model.head.state_dict()
    for name in after:
        moves = head == "nearest-frame"  # with the class means, and nothing in it trains
        fixed = ("frame" in name and not moves) or (head == "frozen-linear" and "linear" in name)
        assert torch.equal(before[name], after[name]) == fixed, name
    line = next(s for s in said if s.startswith("method: "))
    assert f"method: {method} on mlp, 16 features; trains {sum(recorded.values()):,} parameters, in the head: " in line
    assert all(name in line for name in in_head)
    assert ("nothing" in line) == (not in_head)


def test_the_reloaded_model_is_the_trained_one(tiny, tmp_path, monkeypatch):
    trained = []

    def keeping(folder, model, *rest):
        trained.append(model)
        return finish(folder, model, *rest)

    monkeypatch.setattr("equiframe.train.finish", keeping)
    train(tiny(), tmp_path / "run")
    images = torch.randn(9, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(trained[0].eval()(images).logits, load_classifier(tmp_path / "run")[0](images).logits)


def test_history_and_checkpoint_of_a_run(tiny, tmp_path):
    recipe = tiny(epochs=2, validation=0.0)
    metrics = train(recipe, tmp_path / "run")
    history = RunFolder(tmp_path / "run").history()
    assert all("val_top1" not in record for record in history)
    assert history[-1]["lr"] == pytest.approx(0.05 * 0.01)
    assert metrics["temperature_from"] == "train"
    assert metrics["seconds"] == pytest.approx(sum(r["seconds"] for r in history), abs=0.002)
    state = RunFolder(tmp_path / "run").load_checkpoint()
    assert state["progress"]["epoch"] == 2
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(state["model"][name], weights[name]) for name in weights)


def test_progress_and_words_for_a_person(tiny, tmp_path):
    states, said = [], []
    train(tiny(epochs=2), tmp_path / "run", progress=states.append, say=said.append)
    assert [s["epoch"] for s in states if s.get("done")] == [0, 1]
    assert {s["step"] for s in states if not s.get("done")} == {10}
    assert said[1] == "data: digits, 1,132 train / 126 validation / 539 test images, 10 classes of 115 to 110"
    assert said[-3].startswith("note: only 34 steps in all")
    assert said[-1] == "machine: cpu, float32, contiguous"


def test_evaluating_again_gives_the_same_measures(finished_run):
    before = {p: p.stat().st_mtime_ns for p in finished_run.rglob("*")}
    saved = metrics_of(finished_run)
    again = evaluate_run(finished_run, device="cpu")
    assert again == {name: saved[name] for name in again}
    assert set(saved) - set(again) <= {"epochs", "selected"}
    assert before == {p: p.stat().st_mtime_ns for p in finished_run.rglob("*")}


def test_evaluating_where_the_data_changed(tiny, tmp_path, class_folder):
    data = class_folder({"a": 12, "b": 12})
    train(tiny(data=str(data), width=4, batch_size=8), tmp_path / "run")
    (data / "a" / "new.png").write_bytes((data / "a" / "000.png").read_bytes())
    with pytest.raises(InputError, match="belongs to other data"):
        evaluate_run(tmp_path / "run")


def test_a_run_on_the_images_of_another(tiny, tmp_path):
    train(tiny(imbalance=10, subset_seed=3), tmp_path / "one")
    train(tiny(method="ce", split=str(tmp_path / "one" / "split.json")), tmp_path / "two")
    one, two = (json.loads((tmp_path / run / "split.json").read_text()) for run in ("one", "two"))
    assert one == two


# --- schedule and machine ---------------------------------------------------------------------------------------------


def test_learning_rate():
    steps = Recipe(lr=1.0, warmup=0.1)
    for done, expected in ((0.05, 0.5), (0.1, 1), (0.5, 1), (0.79, 1), (0.8, 0.1), (0.89, 0.1), (0.9, 0.01), (1, 0.01)):
        assert learning_rate(steps, done) == pytest.approx(expected), done
    cosine = steps.with_(schedule="cosine")
    for done, expected in ((0.05, 0.5), (0.1, 1), (0.55, 0.5), (1, 0)):
        assert learning_rate(cosine, done) == pytest.approx(expected, abs=1e-12), done
    for schedule in ("steps", "cosine"):
        assert learning_rate(Recipe(lr=1.0, warmup=1.0, schedule=schedule), 1.0) == 1.0
        assert learning_rate(Recipe(lr=1.0, warmup=0.0, schedule=schedule), 0.0) == 1.0


def test_settled_backbones(tiny, class_folder):
    recipe = tiny(backbone="auto", width=None)
    for size, expected in ((12, "resnet20"), (32, "resnet32"), (128, "timm:resnet18")):
        data = prepare_data(tiny(data=str(class_folder({"a": 4, "b": 4})), image_size=size, validation=0.5))
        assert settle(recipe, data)[0].backbone == expected


def test_a_trial_changes_neither_model_nor_random_state(tiny):
    _recipe, card = settle(tiny(backbone="resnet20", width=4), prepare_data(tiny()))
    model = build_classifier(card)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    numerics = choose_numerics(model, 8, 8, device="cpu", precision="float32", memory_format="auto")
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert set(numerics.trial) == {"float32 contiguous", "float32 channels-last"}
    first, second = (
        numerics.trial.values()
    )  # the default stays unless the other is clearly faster: noise must not choose
    if abs(second / first - 1.1) > 0.01:
        assert numerics.memory_format == ("channels-last" if second > 1.1 * first else "contiguous")
    fixed = choose_numerics(model, 8, 8, device="cpu", precision="bfloat16", memory_format="contiguous")
    assert fixed.trial == {}
    with fixed.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert isinstance(fast_bfloat16(torch.device("cpu")), bool)
    assert not fast_bfloat16(torch.device("mps"))


@pytest.mark.parametrize("name", ["cpux", "", "meta", "hpu"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(InputError, match="cannot be used here"):
        choose_device(name)
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
