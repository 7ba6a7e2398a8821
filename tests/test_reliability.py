"""The promises of docs/reliability.md: killed at any instant, full disks, flipped bits, two processes, bad numbers."""

import builtins
import errno
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import encoded, picture, tiny_fields, write_parquet
from equiframe import files
from equiframe.cli import main
from equiframe.cli.terminal import write_page
from equiframe.errors import InputError
from equiframe.heads import CosineHead, FrameHead
from equiframe.method import METHOD_FIELDS, build_head, build_loss, resolve_method
from equiframe.model import load_classifier
from equiframe.recipe import Recipe
from equiframe.runs import RunFolder
from equiframe.samplers import epoch_order
from equiframe.train import Diverged, Interrupted, Trainer, train

TIMES = ("seconds", "images_per_second")


def outcome(path):
    folder = RunFolder(path)
    metrics = {k: v for k, v in folder.read_json("metrics.json").items() if k not in TIMES}
    history = [{k: v for k, v in r.items() if k not in TIMES} for r in folder.history()]
    return (path / "model.safetensors").read_bytes(), history, metrics


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- killed -----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing catches it on purpose: what comes after it in a process that is killed never happens."""


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_killed_at_every_file_operation(recipe, data, whole, tmp_path, monkeypatch, name):
    """Before each `os.replace` and each `os.fsync` of a run: continued, it is the same to the bit. A killed process does
    not tidy up, so its temporary files stay."""
    call, calls = getattr(os, name), []

    def counted(*arguments):
        calls.append(arguments)
        return call(*arguments)

    monkeypatch.setattr(os, name, counted)
    train(recipe, tmp_path / "count", data=data)
    monkeypatch.undo()
    assert len(calls) > 15
    for number in range(1, len(calls) + 1, 7):
        path, count = tmp_path / str(number), 0

        def deadly(*arguments, number=number):
            nonlocal count
            count += 1
            if count == number:
                monkeypatch.setattr(Path, "unlink", lambda *args, **options: None)
                raise Killed
            return call(*arguments)

        monkeypatch.setattr(os, name, deadly)
        with pytest.raises(Killed):
            train(recipe, path, data=data)
        monkeypatch.undo()
        train(recipe, path, data=data, resume=(path / "recipe.yaml").is_file())
        assert outcome(path) == outcome(whole), number
        assert not list(path.rglob("*.tmp"))


def test_stop_after_a_time(tmp_path, capsys, whole):
    flags = ["--config", str(whole / "recipe.yaml"), "--out", str(tmp_path / "run")]
    assert main(["train", *flags, "--stop-after", "0s"]) == 130
    assert "stopped and saved" in capsys.readouterr().err
    assert RunFolder(tmp_path / "run").load_checkpoint()["progress"]["step"] == 1
    assert main(["train", *flags, "--resume", "--stop-after", "2h", "--quiet"]) == 0
    assert outcome(tmp_path / "run") == outcome(whole)


# --- disks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT], ids=["full", "read-only", "quota"])
def test_a_write_that_fails_leaves_the_checkpoint(recipe, data, stopped, tmp_path, monkeypatch, number):
    """Each write of a continued run in turn fails: one line, and what can be continued."""
    fsync, after = os.fsync, 1
    while True:
        path, count = tmp_path / str(after), 0
        shutil.copytree(stopped, path)

        def failing(file, after=after):
            nonlocal count
            count += 1
            if count == after:
                raise OSError(number, os.strerror(number))
            return fsync(file)

        monkeypatch.setattr(os, "fsync", failing)
        try:
            train(recipe.with_(epochs=3), path, data=data, resume=True)
            said = None
        except InputError as error:
            said = str(error)
        monkeypatch.undo()
        assert said is None or re.fullmatch(
            f"cannot write .*: {os.strerror(number)}; checkpoints/(last|previous).pt is kept", said
        )
        assert RunFolder(path).load_checkpoint()["progress"]["epoch"] >= 2
        assert not list(path.rglob("*.tmp"))
        if count < after:
            break
        after += 4
    assert after > 5


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """``disk(kilobytes)``: a folder that holds no more, and a function that makes it read-only: a real tmpfs where we may
    mount, else what the system would say is imitated for files below it."""
    folder, mounted = tmp_path / "disk", []
    folder.mkdir()

    def mount(*options):
        return subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", folder], capture_output=True).returncode == 0

    def refuse(number):
        raise OSError(number, os.strerror(number))

    def make(kilobytes):
        if mount("-o", f"size={kilobytes}k"):
            mounted.append(folder)
            return folder, lambda: subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        opened, read_only = builtins.open, []

        def opening(file, mode="r", *arguments, **options):
            if str(file).startswith(str(folder)) and mode[0] in "wa":
                if read_only:
                    refuse(errno.EROFS)
                if sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) > 1024 * kilobytes // 2:
                    refuse(errno.ENOSPC)
            return opened(file, mode, *arguments, **options)

        monkeypatch.setattr(builtins, "open", opening)
        return folder, lambda: read_only.append(True)

    yield make
    for place in mounted:
        subprocess.run(["umount", place], check=True)


def test_a_disk_that_is_really_full(recipe, data, disk):
    folder, _ = disk(96)
    with pytest.raises(InputError, match=r"cannot write .*No space left on device"):
        train(recipe.with_(width=16, epochs=3), folder / "run", data=data)
    if (folder / "run").exists():
        assert RunFolder(folder / "run").load_checkpoint()["progress"]["epoch"] >= 1


def test_a_disk_that_became_read_only(recipe, data, whole, disk):
    """Nothing can be written any more: one line, and the checkpoint is there, to be continued on another disk."""
    folder, make_read_only = disk(4096)
    epochs = []
    with pytest.raises(Interrupted):
        train(recipe, folder / "run", data=data, progress=lambda state: state.get("done") and epochs.append(0),
              stop=lambda: bool(epochs))  # fmt: skip
    make_read_only()
    before = content(folder)
    for out, resume in ((folder / "run", True), (folder / "new", False)):
        with pytest.raises(InputError, match=r"Read-only file system|no permission to write") as caught:
            train(recipe, out, data=data, resume=resume)
        assert "\n" not in str(caught.value)
    assert content(folder) == before
    shutil.copytree(folder / "run", folder.parent / "saved")
    train(recipe, folder.parent / "saved", data=data, resume=True)
    assert outcome(folder.parent / "saved") == outcome(whole)


def test_a_write_that_is_cut_short(recipe, data, stopped, tmp_path, monkeypatch):
    """The disk fills in the middle of a write, not at its end: the half is removed, and what was there stays."""
    opened, count, at = builtins.open, 0, 0

    def opening(file, mode="r", *arguments, **options):
        nonlocal count
        result = opened(file, mode, *arguments, **options)
        if mode == "wb" and str(file).endswith(".tmp"):
            count += 1
            if count == at:
                result.write(b"half")
                result.close()
                result = opened("/dev/full", mode, *arguments, **options)
        return result

    for at in range(1, 12, 3):
        path, count = tmp_path / str(at), 0
        shutil.copytree(stopped, path)
        monkeypatch.setattr(builtins, "open", opening)
        with pytest.raises(InputError, match=r"cannot write .*No space left on device"):
            train(recipe.with_(epochs=3), path, data=data, resume=True)
        monkeypatch.undo()
        assert not list(path.rglob("*.tmp"))
        assert RunFolder(path).load_checkpoint()["progress"]["epoch"] >= 2


def test_a_slow_disk_is_told_and_loses_nothing(recipe, data, whole, tmp_path, monkeypatch):
    """Each fsync takes its time; a kill in the middle of one leaves the checkpoint before it."""
    fsync, count, said = os.fsync, 0, []

    def slow(file):
        nonlocal count
        count += 1
        time.sleep(0.02)
        if count == 30:
            monkeypatch.setattr(Path, "unlink", lambda *args, **options: None)
            raise Killed
        return fsync(file)

    monkeypatch.setattr(os, "fsync", slow)
    monkeypatch.setattr("equiframe.train.SLOW_SAVE", 0.04)
    with pytest.raises(Killed):
        train(recipe, tmp_path / "run", data=data, say=said.append)
    monkeypatch.undo()
    assert sum("the disk of" in line and "is slow" in line for line in said) == 1
    assert RunFolder(tmp_path / "run").load_checkpoint()["progress"]["epoch"] >= 1
    train(recipe, tmp_path / "run", data=data, resume=True)
    assert outcome(tmp_path / "run") == outcome(whole)


FILES = ("checkpoints/last.pt", "checksums.json", "details.json", "environment.json", "history.jsonl", "metrics.json", "model.json",
         "model.safetensors", "predictions.npz", "recipe.yaml", "report.html", "split.json")  # fmt: skip


@pytest.fixture(scope="module")
def reported(whole, tmp_path_factory):
    """A finished run with its page; each test leaves it as it was."""
    path = tmp_path_factory.mktemp("reported") / "run"
    shutil.copytree(whole, path)
    write_page(path)
    return path


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found(reported, name):
    """By whoever reads the file, and by the check of the whole folder."""
    folder, path = RunFolder(reported), reported / name
    good = path.read_bytes()
    readers = {"recipe.yaml": folder.recipe, "predictions.npz": lambda: folder.read_arrays(name),
               "checkpoints/last.pt": folder.load_checkpoint, "history.jsonl": folder.history}  # fmt: skip
    if name.startswith("model"):
        readers[name] = lambda: load_classifier(folder.path)
    read = (
        folder.verify
        if name in ("report.html", "checksums.json")
        else readers.get(name, lambda: folder.read_json(name))
    )
    for check in (read, folder.verify):
        check()
    choice = random.Random(name)
    places = [len(good) - 1, *(choice.randrange(len(good)) for _ in range(8))]
    own = good.find(b'"checksums.json"')  # a table of another name for itself says nothing less about the others
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << choice.randrange(8)
        if own >= 0 and own <= place < own + 20:
            continue
        path.write_bytes(bad)
        for check in (read, folder.verify):
            with pytest.raises(InputError):
                check()
    path.write_bytes(good)


def test_each_file_of_a_run_is_known(reported):
    assert (
        tuple(sorted(str(p.relative_to(reported)) for p in reported.rglob("*") if p.is_file() and p.name != ".lock"))
        == FILES
    )


def test_a_history_knows_its_lines(tmp_path):
    """Lines that came after the last checkpoint may be cut by a crash; those before it may not change."""
    folder = RunFolder(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    folder.keep_history([])
    for epoch in range(3):
        folder.append_history({"epoch": epoch, "loss": 1.5})
        if epoch < 2:
            folder.save_checkpoint({})
    content = (tmp_path / "history.jsonl").read_bytes()
    for cut in (0, 1, 2, 26):
        (tmp_path / "history.jsonl").write_bytes(content[: len(content) - cut])
        assert [r["epoch"] for r in RunFolder(tmp_path).history()][:2] == [0, 1]
    for damaged in (content.replace(b"1.5", b"1.7", 1), content[40:], content.splitlines(keepends=True)[0], b""):
        (tmp_path / "history.jsonl").write_bytes(damaged)
        with pytest.raises(InputError, match=r"history\.jsonl is damaged"):
            RunFolder(tmp_path).history()


def test_a_damaged_checkpoint_gives_way_to_the_one_before(recipe, data, whole, stopped, tmp_path):
    path, said = tmp_path / "run", []
    shutil.copytree(stopped, path)
    last = path / "checkpoints" / "last.pt"
    bad = bytearray(last.read_bytes())
    bad[len(bad) // 2] ^= 1
    last.write_bytes(bad)
    train(recipe.with_(epochs=3), path, data=data, resume=True, say=said.append)
    assert any("does not match checksums.json" in line and "previous.pt" in line for line in said)
    assert sorted(os.listdir(path / "checkpoints")) == ["damaged.pt", "last.pt"]
    shutil.copytree(stopped, tmp_path / "undamaged")
    train(recipe.with_(epochs=3), tmp_path / "undamaged", data=data, resume=True)
    assert outcome(path) == outcome(tmp_path / "undamaged")


def test_both_checkpoints_damaged(recipe, data, stopped, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(stopped, path)
    for name in ("last.pt", "previous.pt"):
        (path / "checkpoints" / name).write_bytes(b"junk")
    before = content(path / "checkpoints")
    with pytest.raises(InputError, match=r"checkpoint .*\.pt cannot be read"):
        train(recipe.with_(epochs=3), path, data=data, resume=True)
    assert content(path / "checkpoints") == before


def test_a_crash_between_announcement_and_file(tmp_path):
    files.announce(tmp_path, {"a": b"one"})
    (tmp_path / "a").write_bytes(b"one")
    for later in (b"two", b"three", b"four"):  # killed each time before the file was replaced
        files.announce(tmp_path, {"a": later})
        files.verify(tmp_path, "a", b"one")
        files.settle_checksums(tmp_path)
    assert files.read_checksums(tmp_path) == {"a": [files.checksum(b"one")]}
    with pytest.raises(InputError, match="does not match"):
        files.verify(tmp_path, "a", b"onf")


def test_what_the_dead_left_is_tidied(tmp_path):
    """A temporary file stays as long as its process lives."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    kept = [f".a.{os.getpid()}.tmp", ".a.tmp", f"a.{dead.pid}.tmp", f".a.{'9' * 30}.tmp"]
    for name in (f".comparison.md.{dead.pid}.tmp", *kept):
        (tmp_path / name).touch()
    files.tidy(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


def test_history_damaged_in_the_middle(tmp_path):
    (tmp_path / "history.jsonl").write_text('{"epoch": 0}\n{"epo\n{"epoch": 2}\n')
    with pytest.raises(InputError, match=r"history.jsonl is damaged: line 2"):
        RunFolder(tmp_path).history()


def test_two_processes_on_one_folder(recipe, data, stopped, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(stopped, path)
    code = "import sys, time; from pathlib import Path; from equiframe.files import lock\n" \
           "held = lock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"  # fmt: skip
    other = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        before = content(path)
        with pytest.raises(InputError, match="another process is training in"):
            train(recipe.with_(epochs=3), path, data=data, resume=True)
        assert content(path) == before
    finally:
        other.kill()  # a dead process holds no lock
        other.communicate()
    train(recipe.with_(epochs=3), path, data=data, resume=True)
    assert RunFolder(path).finished


# --- numbers ----------------------------------------------------------------------------------------------------------


SIZES = [(torch.float32, 0.0), (torch.float32, 1e-30), (torch.bfloat16, 1e-38), (torch.float16, 1e-4)]
VAST = [
    (torch.float32, 1e18),
    (torch.bfloat16, 1e18),
    (torch.float16, 65504),
]  # a linear head's logits may overflow; training then stops (below)


@pytest.mark.parametrize(
    ("method", "dtype", "scale"),
    [(m, *size) for m in ("ce", "etf-la", "etf-dr") for size in SIZES + (VAST if m != "ce" else [])],
)
def test_features_at_the_ends_of_the_numbers(method, dtype, scale):
    """All-zero, vast and tiny features: the loss of a frame is finite, and so is its gradient."""
    fields = resolve_method(method, dict.fromkeys(METHOD_FIELDS))
    head = build_head(fields, 16, 4, seed=0)
    features = (torch.linspace(-1, 1, 64).view(4, 16) * scale).to(dtype).requires_grad_()
    loss = build_loss(fields, [5, 4, 3, 1])(head(features), torch.arange(4))
    loss.backward()
    assert loss.isfinite()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize(("counts", "per_class"), [([60, 60], None), ([12] * 10, 1)], ids=["K=2", "one a class"])
def test_the_smallest_problems(tmp_path, class_folder, counts, per_class):
    names = [f"c{k}" for k in range(len(counts))]
    root = class_folder({n: per_class or c for n, c in zip(names, counts, strict=True)}, test=dict.fromkeys(names, 2))
    for method in ("ce", "etf-la", "etf-dr"):
        fields = tiny_fields(data=str(root), batch_size=4, method=method, validation=0)
        metrics = train(Recipe(**fields), tmp_path / method)
        assert all(np.isfinite(v) for v in metrics.values() if isinstance(v, float))


def test_a_ratio_of_ten_thousand_is_trained(tmp_path):
    """10,000 images of one class and a single one of the other, from files to metrics."""
    good = encoded(picture(0, 0, (4, 4)), "BMP")
    write_parquet(tmp_path / "data" / "train.parquet", [good] * 10_001, [0] * 10_000 + [1])
    write_parquet(tmp_path / "data" / "test.parquet", [good] * 4, [0, 0, 1, 1])
    fields = tiny_fields(data=str(tmp_path / "data"), batch_size=4096, width=4, validation=0, track="none", workers=1)
    metrics = train(Recipe(**fields), tmp_path / "run")
    assert metrics["num_train"] == 10_001
    assert all(np.isfinite(v) for v in metrics.values() if isinstance(v, float))


def test_a_batch_of_one_image():
    """BatchNorm has no variance of one image: said in one line; heads without it take it."""
    features = torch.randn(1, 16, requires_grad=True)
    for head in (FrameHead(16, 4, logit_scale=8.0), CosineHead(16, 4, norm="batch", logit_scale=8.0)):
        with pytest.raises(InputError, match="a training batch of one image; take two or more, or norm='none'"):
            head.train()(features)
        assert head.eval()(features).logits.isfinite().all()
    for method in ("ce", "etf-la", "etf-dr", "etf-dr-balanced", "nearest-frame-la", "ldam"):
        fields = resolve_method(method, dict.fromkeys(METHOD_FIELDS))
        fields |= {"norm": "none"} if fields.get("norm") else {}
        loss = build_loss(fields, [5, 4, 3, 1])(build_head(fields, 16, 4, seed=0).train()(features), torch.tensor([2]))
        loss.backward()
        assert loss.isfinite()
        assert features.grad.isfinite().all()


def test_a_ratio_of_ten_thousand():
    for method in ("etf-la", "balanced-softmax", "ldam"):
        fields = resolve_method(method, dict.fromkeys(METHOD_FIELDS))
        head = build_head(fields, 16, 4, seed=0)
        features = torch.randn(8, 16, requires_grad=True)
        loss = build_loss(fields, [10_000, 500, 20, 1])(head(features), torch.arange(8) % 4)
        loss.backward()
        assert loss.isfinite()
        assert features.grad.isfinite().all()


def test_a_gradient_that_is_not_finite_stops(recipe, data, tmp_path, monkeypatch):
    """The loss is finite, the gradient is not: the step is named and the checkpoint before it stays."""
    step = Trainer.train_step

    def bad(self, *args):
        loss = step(self, *args)
        if self.epoch == 1 and self.step == 2:
            next(p for p in self.model.parameters() if p.grad is not None).grad.view(-1)[0] = float("inf")
        return loss

    monkeypatch.setattr(Trainer, "train_step", bad)
    with pytest.raises(InputError, match="a gradient became infinite or NaN in epoch 2, step 3"):
        train(recipe, tmp_path / "run", data=data)
    assert RunFolder(tmp_path / "run").load_checkpoint()["progress"] | {"seconds": 0} == {
        "epoch": 1, "step": 0, "loss_sum": 0.0, "seconds": 0, "skipped": [],
        "known": 0.0, "right": 0.0, "seen": 0.0}  # fmt: skip


@pytest.fixture
def bad_steps(monkeypatch):
    """``bad_steps({(epoch, step): what})``: there the loss or a gradient becomes NaN, in the backward pass itself."""

    def make(steps):
        backward = Trainer._backward

        def bad(self, part, **options):
            what = steps.get((self.epoch, self.step))
            if what == "loss":  # as it happens: an image that is not finite, and so the running statistics of BatchNorm
                part = part._replace(images=part.images * float("nan"))
            loss = backward(self, part, **options)
            if what == "gradient":
                next(p for p in self.model.parameters() if p.grad is not None).grad.view(-1)[0] = float("inf")
            return loss

        monkeypatch.setattr(Trainer, "_backward", bad)

    return make


def batch_names(recipe, data, epoch, step):
    order = epoch_order(data.train.labels, seed=recipe.seed, epoch=epoch, epochs=recipe.epochs)
    return [data.train.names[i] for i in order[step * recipe.batch_size :][: recipe.batch_size]]


def test_a_loss_that_is_not_finite_names_step_files_and_checkpoint(recipe, data, tmp_path, bad_steps):
    bad_steps({(1, 2): "loss"})
    names = batch_names(recipe, data, 1, 2)
    path = tmp_path / "run"
    with pytest.raises(Diverged) as caught:
        train(recipe, path, data=data)
    said = str(caught.value)
    assert (
        f"the loss became nan in epoch 2, step 3 (learning rate 0.005; images {', '.join(names[:3])} and 253 more)"
        in said
    )
    assert f"The last good checkpoint is {path / 'checkpoints/last.pt'}" in said
    record = RunFolder(path).read_json("nonfinite.json")
    assert record["images"] == names
    assert (record["epoch"], record["step"], record["checkpoint"]) == (1, 2, "checkpoints/last.pt")


@pytest.mark.parametrize(
    "changes", [{}, {"ema": 0.9}, {"method": "nearest-frame-la", "width": 16}, {"precision": "float16"}], ids=str
)
def test_steps_that_are_not_finite_are_skipped_and_counted(recipe, data, tmp_path, bad_steps, changes):
    """Model, optimiser and running statistics are those of a run that never saw these batches; the steps are listed."""
    recipe = recipe.with_(on_nonfinite="skip", **{"ema": 0} | changes)
    bad_steps({(0, 1): "loss", (1, 3): "gradient" if recipe.precision == "float32" else "loss"})
    metrics = train(recipe, tmp_path / "skipped", data=data)
    assert metrics["skipped_steps"] == 2
    history = RunFolder(tmp_path / "skipped").history()
    assert [(r["epoch"], r["step"]) for record in history for r in record["skipped"]] == [(0, 1), (1, 3)]
    assert history[0]["skipped"][0]["images"] == batch_names(recipe, data, 0, 1)
    assert all(np.isfinite(r["loss"]) for r in history)

    step = Trainer.train_step
    Trainer.train_step = lambda self, *args: (  # the twin leaves these two batches out before it looks at them
        torch.tensor(0.0) if (self.epoch, self.step) in ((0, 1), (1, 3)) else step(self, *args)
    )
    try:
        train(recipe.with_(on_nonfinite="stop"), tmp_path / "twin", data=data)
    finally:
        Trainer.train_step = step
    if recipe.precision == "float32":  # a scaler halves its scale after such a step
        assert (tmp_path / "skipped/model.safetensors").read_bytes() == (
            tmp_path / "twin/model.safetensors"
        ).read_bytes()


def test_an_epoch_of_nothing_but_bad_steps_stops(recipe, data, tmp_path, bad_steps):
    bad_steps({(1, step): "loss" for step in range(9)})
    with pytest.raises(Diverged, match="the loss became nan in epoch 2") as caught:
        train(recipe.with_(on_nonfinite="skip"), tmp_path / "run", data=data)
    assert "--on-nonfinite" not in str(caught.value)  # that is what was done
    assert RunFolder(tmp_path / "run").load_checkpoint()["progress"]["epoch"] == 1


def test_skipped_steps_survive_an_interruption(recipe, data, tmp_path, bad_steps):
    recipe = recipe.with_(on_nonfinite="skip")
    bad_steps({(0, 1): "loss", (1, 0): "gradient"})
    train(recipe, tmp_path / "whole", data=data)
    calls = []
    with pytest.raises(Interrupted):  # after the third step
        train(recipe, tmp_path / "run", data=data, stop=lambda: calls.append(0) or len(calls) >= 3)
    assert len(RunFolder(tmp_path / "run").load_checkpoint()["progress"]["skipped"]) == 1
    train(recipe, tmp_path / "run", data=data, resume=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_float16_learns_and_its_scale_is_kept(recipe, data, tmp_path, monkeypatch):
    """The first scale (here far too large) overflows, is halved until it fits, and continues from the checkpoint."""
    make = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device: make(device, init_scale=2.0**24, growth_interval=8))
    recipe = recipe.with_(batch_size=64, epochs=3)
    exact = train(recipe, tmp_path / "exact", data=data)
    recipe = recipe.with_(precision="float16")
    metrics = train(recipe, tmp_path / "whole", data=data)
    assert metrics["top1"] > exact["top1"] - 0.1 > 0.3
    calls = []
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "run", data=data, stop=lambda: calls.append(0) or len(calls) >= 8)
    state = RunFolder(tmp_path / "run").load_checkpoint()["scaler"]
    assert 1 <= state["scale"] < 2.0**24
    train(recipe, tmp_path / "run", data=data, resume=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_float16_that_no_scale_saves_stops(recipe, data, tmp_path, bad_steps):
    bad_steps(
        {(1, step): "gradient" for step in range(9)} | {(2 + e, s): "gradient" for e in range(20) for s in range(9)}
    )
    with pytest.raises(Diverged, match="a gradient became infinite or NaN"):
        train(recipe.with_(precision="float16", epochs=9), tmp_path / "run", data=data)


def test_deterministic_is_said_and_holds(recipe, data, whole, tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    said, seen = [], []
    train(
        recipe.with_(deterministic=True), tmp_path / "run", data=data, say=said.append,
        progress=lambda state: seen.append(torch.are_deterministic_algorithms_enabled()),
    )  # fmt: skip
    assert seen
    assert all(seen)
    assert not torch.are_deterministic_algorithms_enabled()
    assert any(", deterministic" in line for line in said)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    weights = (tmp_path / "run/model.safetensors").read_bytes()
    assert weights == (whole / "model.safetensors").read_bytes()  # on CPU nothing changes

    def without_such_an_algorithm(self, part, **options):
        part.images.put_(torch.tensor([0]), torch.tensor([0.0]))

    monkeypatch.setattr(Trainer, "_backward", without_such_an_algorithm)
    with pytest.raises(InputError, match=r"--deterministic cannot work here: put_"):
        train(recipe.with_(deterministic=True), tmp_path / "other", data=data)
    assert not (tmp_path / "other").exists()


def test_the_page_names_tests_and_scripts_that_exist():
    root = Path(__file__).parents[1]
    page = (root / "docs" / "reliability.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    defined = {n for f in (root / "tests").glob("*.py") for n in re.findall(r"^def (test_\w+)", f.read_text(), re.M)}
    assert len(named) > 60
    assert named <= defined
    for path in re.findall(r"`(tests/\w+\.py)`", page) + re.findall(r"python (benchmarks/\w+\.py)", page):
        assert (root / path).is_file(), path
