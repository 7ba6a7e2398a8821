"""Several processes train one model: the same result, one voice, and nobody left waiting."""

import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo  # every optimiser imports it; here it is done once, before processes are forked
import torch.distributed.fsdp
from torch import nn

from conftest import caught, tiny_fields, write_class
from equiframe import files
from equiframe.cli import main
from equiframe.data.prepare import prepare_data
from equiframe.errors import InputError
from equiframe.model import build_classifier
from equiframe.parallel import Lost, blocks_of, is_sharded, own
from equiframe.recipe import Recipe
from equiframe.runs import RunFolder
from equiframe.train import Interrupted, Trainer, train

pytestmark = pytest.mark.usefixtures("plain_pages")

TIMES = ("seconds", "images_per_second")


# --- the same result --------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """Without BatchNorm; computes in torch's default dtype."""

    def __init__(self, inputs, width, dropout):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(inputs, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, width)
        )
        self.num_features = width

    def forward(self, x):
        return self.layers(x.to(self.layers[1].weight.dtype))


class Normed(Plain):
    def __init__(self, inputs, width, dropout):
        super().__init__(inputs, width, dropout)
        self.layers.insert(2, nn.BatchNorm1d(width))


@pytest.fixture
def backbone(monkeypatch):
    """``backbone(kind, dropout)``: what every run trains from here on."""

    def use(kind=Plain, dropout=0.0):
        monkeypatch.setattr(
            "equiframe.model.make_backbone",
            lambda name, image_size, width, **_: kind(3 * image_size**2, width, dropout),
        )

    return use


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    prepared = prepare_data(recipe_of())
    train(
        recipe_of(epochs=1), tmp_path_factory.mktemp("first") / "run", data=prepared
    )  # loads once what each fork needs
    return prepared


def recipe_of(**changes):
    fields = {"class_counts": (40, 33, 30, 25, 20, 16, 12, 9, 6, 5), "epochs": 2, "batch_size": 30, "warmup": 0.1}
    return Recipe(**tiny_fields(**fields | {"method": "ce"} | changes))


def outcome(path):
    """Weights, history and metrics of a run."""
    from safetensors.torch import load_file

    folder = RunFolder(path)
    history = [{k: v for k, v in record.items() if k not in TIMES} for record in folder.history()]
    metrics = {k: v for k, v in folder.read_json("metrics.json").items() if k not in TIMES}
    return load_file(path / "model.safetensors"), history, metrics


def assert_close(one, two, tolerance):
    """Two outcomes: numbers within a tolerance, relative and absolute; everything else, and what counts images, the same.
    Losses are recorded from float32 and class statistics look at features in float32: they differ by its rounding."""
    (weights, history, metrics), (weights_, history_, metrics_) = one, two
    assert weights.keys() == weights_.keys()
    for name in weights:
        torch.testing.assert_close(weights[name], weights_[name], rtol=tolerance, atol=tolerance)
    for record, record_ in ((dict(enumerate(history)), dict(enumerate(history_))), (metrics, metrics_)):
        flat, flat_ = flatten(record), flatten(record_)
        assert flat.keys() == flat_.keys()
        for name, value in flat.items():
            if isinstance(value, float):
                loose = max(tolerance, 1e-5) if tolerance and re.search(FLOAT32, name) else tolerance
                assert value == pytest.approx(flat_[name], rel=loose, abs=loose), name
            else:
                assert value == flat_[name], name
    for name in ("top1", "macro", "worst"):
        assert metrics[name] == metrics_[name]


FLOAT32 = "/loss$|nc[1-9]|angle|cosine|cdnv|etf|norm|spectr|rank|means|self_duality|uniformity|equi"


def flatten(tree, name=""):
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in flatten(value, f"{name}/{key}").items()}
    if isinstance(tree, list):
        return flatten(dict(enumerate(tree)), name)
    return {name: tree}


def compute_in(dtype):
    """From here on in this process."""
    torch.set_default_dtype(dtype)
    sys.modules["equiframe.train"].build_classifier = lambda *a, **options: build_classifier(*a, **options).to(dtype)


def training(recipe, out, data, dtype=torch.float32):
    """A function for `processes` that trains; each process gets a folder of its own, and only the first may make it."""

    def run(world):
        compute_in(dtype)
        return train(recipe, Path(f"{out}-{world.rank}"), data=data)

    return run


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"method": "etf-dr-balanced", "norm": "none", "mixup": 0.0},
        {"sam": 0.05, "ema": 0.9, "method": "etf-la", "norm": "none"},
    ],
    ids=["ce", "dot-regression", "sam+ema"],
)
def test_two_processes_are_one_that_accumulates_to_the_bit(processes, backbone, data, tmp_path, fields):
    """Without BatchNorm: the same parts, the same sums in the same order, and halves are exact."""
    backbone()
    recipe = recipe_of(track="collapse-all", **fields)
    processes(training(recipe, tmp_path / "two", data))
    processes(training(recipe.with_(batch_size=15, accumulate=2), tmp_path / "one", data), 1)
    weights, _, metrics = outcome(tmp_path / "two-0")
    weights_, _, metrics_ = outcome(tmp_path / "one-0")
    for name in weights:
        assert torch.equal(weights[name], weights_[name]), name
    for name in ("top1", "macro", "ece", "nll", "temperature", "val_macro"):
        assert metrics[name] == metrics_[name], name
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["one-0", "two-0"]


CASES = {
    "plain": ({}, Plain),
    "batch norm": ({"method": "etf-la"}, Normed),
    "batch-balanced": ({"method": "etf-dr-balanced"}, Normed),
    "effective numbers of the batch": ({"class_weighting": "effective-number-mean"}, Plain),
    "nearest frame": ({"method": "nearest-frame-dr", "frame_rate": 0.1}, Normed),
    "transport": ({"method": "disa"}, Plain),
    "mixed": ({"method": "etf-la", "cutmix": 1.0, "remix": True, "sampler": "class-balanced"}, Normed),
    "mixed as far as it is known": ({"method": "etf-la", "mixup": 1.0, "mix_share": "known"}, Normed),
    "sharpness, average, second stage": ({"sam": 0.05, "ema": 0.9, "second_stage": "crt"}, Normed),
    "gradients": ({"track": "collapse-all,gradients,test", "optimizer": "adamw", "lr": 1e-3}, Normed),
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(processes, backbone, data, tmp_path, case):
    """In float64 to 1e-8 after two epochs: the order of sums is all that differs. Decisions are the same."""
    fields, kind = CASES[case]
    backbone(kind)
    recipe = recipe_of(**fields)
    processes(training(recipe, tmp_path / "two", data, torch.float64))
    processes(training(recipe, tmp_path / "one", data, torch.float64), 1)
    assert_close(outcome(tmp_path / "two-0"), outcome(tmp_path / "one-0"), 1e-8)


def test_the_comparison_can_fail(processes, backbone, data, tmp_path):
    """BatchNorm of each process's own share is another training, if not a bad one."""
    backbone(Normed)
    recipe = recipe_of()
    processes(training(recipe.with_(sync_batch_norm=False), tmp_path / "two", data, torch.float64))
    processes(training(recipe, tmp_path / "one", data, torch.float64), 1)
    with pytest.raises(AssertionError):
        assert_close(outcome(tmp_path / "two-0"), outcome(tmp_path / "one-0"), 1e-3)


@pytest.mark.parametrize("method", ["ce", "etf-dr-balanced"])
def test_accumulation_is_a_larger_batch(processes, backbone, data, tmp_path, method):
    backbone()
    recipe = recipe_of(method=method, **({"norm": "none"} if method != "ce" else {}))
    for name, fields in {"whole": {}, "parts": {"batch_size": 10, "accumulate": 3}}.items():
        processes(training(recipe.with_(**fields), tmp_path / name, data, torch.float64), 1)
    assert_close(outcome(tmp_path / "whole-0"), outcome(tmp_path / "parts-0"), 1e-8)


# --- stopped and continued --------------------------------------------------------------------------------------------


def stopping(recipe, out, data, *, resume=False, at=(1, 10), number=signal.SIGTERM):
    """A function for `processes`: the last process gets a signal at a step of an epoch, and all stop."""

    def run(world):
        compute_in(torch.float64)
        step, said = Trainer.train_step, []

        def signalled(self, *arguments):
            if world.rank == world.size - 1 and (self.epoch, self.step) == at:
                signal.raise_signal(number)
            return step(self, *arguments)

        Trainer.train_step = signalled
        try:
            train(recipe, out, data=data, resume=resume, say=said.append)
        except Interrupted:
            return "interrupted", said
        return "finished", said

    return run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_stops_all_and_saves_once(processes, backbone, data, tmp_path, monkeypatch, number):
    backbone(Normed, dropout=0.2)
    recipe = recipe_of(ema=0.9)
    whole, path = tmp_path / "whole", tmp_path / "run"
    processes(stopping(recipe, whole, data, at=None))
    monkeypatch.setattr(
        RunFolder, "save_checkpoint",
        lambda self, state, save=RunFolder.save_checkpoint: (
            (tmp_path / "saves").open("a").write(f"{os.environ['RANK']} {state['progress']['step']}\n"), save(self, state)),
    )  # fmt: skip
    assert [how for how, _ in processes(stopping(recipe, path, data, at=(1, 3), number=number))] == ["interrupted"] * 2
    assert (tmp_path / "saves").read_text().splitlines() == ["0 0", "0 4"]  # the end of the first epoch, and the stop
    (how, said), (how_, said_) = processes(stopping(recipe, path, data, resume=True, at=None))
    assert how == how_ == "finished"
    assert "continuing at epoch 2, step 4" in said
    assert said_ == []
    assert_close(outcome(path), outcome(whole), 0)  # to the bit, with the dropout of each process


@pytest.mark.parametrize("then", [1, 3])
def test_continued_by_another_number_of_processes(processes, backbone, data, tmp_path, then):
    backbone(Normed)
    recipe = recipe_of(method="etf-la", mixup=1.0)
    assert processes(stopping(recipe, tmp_path / "run", data, at=(0, 3)))[0][0] == "interrupted"
    assert processes(stopping(recipe, tmp_path / "run", data, resume=True, at=None), then)[0][0] == "finished"
    processes(stopping(recipe, tmp_path / "whole", data, at=None), 1)
    assert_close(outcome(tmp_path / "run"), outcome(tmp_path / "whole"), 1e-8)


def test_more_processes_than_the_checkpoint_knew_drop_out_other_features(processes, backbone, data, tmp_path):
    backbone(dropout=0.5)
    recipe = recipe_of()
    processes(stopping(recipe, tmp_path / "run", data, at=(0, 3)))

    def mask(world):
        states = []
        step = Trainer.train_step
        Trainer.train_step = lambda self, *a: (states.append(torch.get_rng_state()), step(self, *a))[1]
        train(recipe, tmp_path / "run", data=data, resume=True)
        return states[0]

    one, two, three = processes(mask, 3)
    assert len({bytes(x.numpy()) for x in (one, two, three)}) == 3


# --- sharded ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer, self.norm = nn.Linear(width, width, bias=False), nn.BatchNorm1d(width)

    def forward(self, x):
        return x + torch.tanh(self.norm(self.layer(x)))


class Stacked(Normed):
    """With blocks, and a parameter of one row, of which one process gets nothing."""

    def __init__(self, inputs, width, dropout):
        super().__init__(inputs, width, dropout)
        self.blocks, self.scale = nn.Sequential(Block(width), Block(width)), nn.Parameter(torch.ones(1, width))

    def forward(self, x):
        return self.scale * self.blocks(super().forward(x))


def test_blocks_are_found():
    stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    stages = nn.ModuleList([nn.Sequential(Block(4), Block(4)), nn.Sequential(nn.Sequential(Block(4)), nn.ReLU())])
    found = blocks_of(nn.Sequential(stem, nn.Flatten(), stages))
    assert [type(block) for block in found] == [Block] * 3
    assert blocks_of(Normed(3, 4, 0.0)) == []


SHARDED = [
    {"method": "etf-la", "optimizer": "adamw", "lr": 1e-3, "batch_size": 45},
    {"sam": 0.05, "batch_size": 30, "accumulate": 2},
]  # few steps: each waits for the other process many times


def test_a_sharded_backbone_trains_as_a_shared_one_and_continues_anywhere(processes, backbone, data, tmp_path):
    backbone(Stacked)
    if not hasattr(torch.cpu.Stream, "record_event"):  # torch 2.6
        said = processes(lambda world: caught(lambda: train(recipe_of(shard=True), tmp_path / "old", data=data)))
        assert all("cannot shard on CPUs" in text for text in said)
        return
    recipes = [recipe_of(**fields, epochs=1, track="none") for fields in SHARDED]

    def in_two(world):
        compute_in(torch.float64)
        parts, steps = [], Trainer.train_step
        for i, recipe in enumerate(recipes):
            train(recipe, tmp_path / f"shared-{i}", data=data)
            train(recipe.with_(shard=True), tmp_path / f"sharded-{i}", data=data)

        def look(self, *arguments):
            loss = steps(self, *arguments)
            kept = [self.optimizer.state[p]["exp_avg"] for p in self.model.backbone.parameters()]
            whole = [p for p in self.model.backbone.parameters()]
            parts.append([(own(p).numel(), own(p.grad).numel(), own(k).numel(), p.numel()) for p, k in zip(whole, kept, strict=True)])  # fmt: skip
            parts.append([is_sharded(x) for x in self.model.state_dict().values()])
            parts.append([is_sharded(x) for x in (*self.model.head.parameters(), *self.model.buffers())])
            return loss

        Trainer.train_step = look
        stopping(recipes[0].with_(shard=True), tmp_path / "run", data, at=(0, 1))(world)
        return parts[:3]

    (parts, sharded, others), (parts_, _, _) = processes(in_two)
    for mine, theirs in zip(parts, parts_, strict=True):
        assert len(set(mine[:3])) == len(set(theirs[:3])) == 1  # weights, gradients and AdamW's averages alike
        assert mine[0] + theirs[0] == mine[3] == theirs[3]
        assert abs(mine[0] - theirs[0]) <= 16
    assert any(sharded)
    assert not any(others)
    for i in range(len(recipes)):
        assert_close(outcome(tmp_path / f"sharded-{i}"), outcome(tmp_path / f"shared-{i}"), 1e-12)
    states = [RunFolder(tmp_path / f"{name}-0").load_checkpoint() for name in ("sharded", "shared")]
    for one, two in zip(*(torch.utils._pytree.tree_leaves([s["model"], s["optimizer"]]) for s in states), strict=True):
        torch.testing.assert_close(one, two)  # checkpoints are of one form
    for name in ("by three", "by one", "shared by one"):
        shutil.copytree(tmp_path / "run", tmp_path / name)

    def in_three(world):
        return stopping(recipes[0].with_(shard=True), tmp_path / "by three", data, resume=True, at=None)(world)

    def alone(world):
        stopping(recipes[0], tmp_path / "shared by one", data, resume=True, at=None)(world)
        return stopping(recipes[0].with_(shard=True), tmp_path / "by one", data, resume=True, at=None)(world)

    assert {how for how, _ in (*processes(in_three, 3), *processes(alone, 1))} == {"finished"}
    for name in ("by three", "by one", "shared by one"):
        assert_close(outcome(tmp_path / name), outcome(tmp_path / "shared-0"), 1e-8)


@pytest.mark.parametrize("fields", [{"ema": 0.9}, {"compile": "on"}, {"precision": "float16"}])
def test_what_a_sharded_backbone_cannot_do_is_said(fields):
    with pytest.raises(InputError, match="a sharded backbone cannot"):
        recipe_of(shard=True, **fields)


# --- when something goes wrong ----------------------------------------------------------------------------------------


def test_a_bad_image_of_one_process_ends_all_with_its_name(processes, tmp_path):
    for k, name in enumerate(("cat", "dog")):
        write_class(tmp_path / "pets" / name, k, 30)
    bad = tmp_path / "pets" / "dog" / "007.png"
    bad.write_bytes(bad.read_bytes()[:90])
    recipe = Recipe(**tiny_fields(data=str(tmp_path / "pets"), data_mode="stream", batch_size=10, mixup=0.0))
    one, two = processes(lambda world: caught(lambda: train(recipe, tmp_path / "run")))
    assert one == two
    assert "dog/007.png" in one
    assert not (tmp_path / "run").exists()


def test_a_disk_that_is_full_for_the_first_is_full_for_all(processes, backbone, data, tmp_path, monkeypatch):
    backbone()

    def full(path, *arguments, write=files.atomic_write, **options):
        if path.name == "last.pt":
            raise InputError(f"cannot write {path}: No space left on device")
        write(path, *arguments, **options)

    monkeypatch.setattr("equiframe.runs.atomic_write", full)
    one, two = processes(lambda world: caught(lambda: train(recipe_of(), tmp_path / "run", data=data)))
    assert one == two
    assert one.endswith("No space left on device")


def test_a_process_that_dies_ends_the_others(processes, backbone, data, tmp_path):
    backbone()

    def die(world):
        step = Trainer.train_step

        def deadly(self, *arguments):
            if world.rank == 1 and (self.epoch, self.step) == (1, 2):
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, *arguments)

        Trainer.train_step = deadly
        with pytest.raises(Lost) as caught:
            train(recipe_of(), tmp_path / "run", data=data)
        return str(caught.value)

    assert processes(die, 3) == ["another process of the run died", None, "another process of the run died"]
    assert RunFolder(tmp_path / "run").load_checkpoint()["progress"]["epoch"] == 1


def test_the_command_line_in_two_processes(processes, data, tmp_path):
    """As torchrun starts it (benchmarks/torchrun_harness.py does, with real kills): process 1 dies in the second epoch, the other ends
    in one line with 3; started again the run goes on from its checkpoint; one process speaks. Other verbs are refused."""
    flags = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in tiny_fields(epochs=2, width=8).items()
        if name != "data"
    ]
    words = ["train", "digits", *flags, "--track", "none", "--out", str(tmp_path / "run")]

    def command(words, restart):
        def run(world):
            os.environ["TORCHELASTIC_RESTART_COUNT"] = str(restart)
            step = Trainer.train_step

            def deadly(self, *arguments):
                if world.rank == 1 and self.epoch == 1 and restart == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return step(self, *arguments)

            Trainer.train_step = deadly
            said = os.open(tmp_path / f"said-{world.rank}", os.O_CREAT | os.O_RDWR | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            sys.stdout = sys.stderr = os.fdopen(said, "w")
            code = main(words)
            sys.stdout.flush()
            return code, (tmp_path / f"said-{world.rank}").read_text()

        return run

    (code, said), died = processes(command(words, 0))
    assert (code, died) == (3, None)
    assert said.count("another process of the run died; this one stops, too") == 1
    assert said.splitlines()[-1].endswith(f"--resume --out {tmp_path / 'run'}")
    assert "Traceback" not in said
    (code, said), (code_, said_) = processes(command(words, 1))
    assert (code, code_, said_) == (0, 0, "")
    assert "continuing at epoch 2, step 0" in said
    assert RunFolder(tmp_path / "run").read_json("environment.json")["processes"] == 2
    assert len(RunFolder(tmp_path / "run").history()) == 2
    for wrong in (["compare", "digits"], ["train", "digits", "--lr", "x"], ["train", "no-such-data", "--resume"]):
        (code, said), (code_, said_) = processes(command(wrong, 1))
        assert (code, code_, said_) == (2, 2, "")
        assert said.count("equiframe: ") == said.count("\n") == 1
