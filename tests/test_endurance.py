"""Small versions of benchmarks/kill_harness.py and benchmarks/endurance.py; and that nothing of ours speaks to a network."""

import contextlib
import ctypes
import errno
import importlib.util
import itertools
import json
import os
import socket
import sys
from pathlib import Path

import pytest
import sklearn.datasets  # noqa: F401  what the harness needs; here it is imported once, before processes are forked
import torch._dynamo  # noqa: F401

from conftest import encoded, forked, picture, tiny_fields, tiny_flags, write_class
from equiframe.cli import main
from equiframe.data.folders import load_folder
from equiframe.data.prepare import prepare_data
from equiframe.grid import Cell, Grid
from equiframe.recipe import Recipe
from equiframe.runs import RunFolder
from equiframe.train import train

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def benchmark(name):
    """A script of benchmarks/ as a module; what it does to the environment is undone."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module, before = importlib.util.module_from_spec(spec), dict(os.environ)
    spec.loader.exec_module(module)
    os.environ.update(before)
    return module


def test_real_kills(tmp_path):
    """SIGKILL in a file operation, a step, an evaluation and a checkpoint; the harness's own control comes out different."""

    def harness():
        flags = ["--only", "digits: SAM", "--epochs", "2", "--seed", "3", "--out", str(tmp_path / "kills.json")]
        sys.argv[1:] = ["--kills", "4", *flags]
        benchmark("kill_harness").main()

    code, said = forked(harness)  # it ends by SystemExit(0)
    assert "SystemExit: 0" in said, (code, said)
    summary = json.loads((tmp_path / "kills.json").read_text())
    assert (summary["kills"], summary["different"]) == (4, 0)
    assert "model.safetensors" in summary["control came out different in"]


class Killed(BaseException):
    pass


def same(one, two):
    times = ("seconds", "images_per_second")
    without = lambda record: {k: v for k, v in record.items() if k not in times}  # noqa: E731
    for folder in (one, two):
        assert RunFolder(folder).finished
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    assert without(RunFolder(one).read_json("metrics.json")) == without(RunFolder(two).read_json("metrics.json"))
    assert [*map(without, RunFolder(one).history())] == [*map(without, RunFolder(two).history())]


def test_a_grid_that_is_killed_again_and_again(tmp_path):
    recipe = Recipe(**tiny_fields(epochs=2, width=4, batch_size=512, track="none", method="ce", imbalance=10))
    cells = [Cell(recipe.with_(seed=seed), tmp_path / "grid" / str(seed), str(seed)) for seed in range(6)]
    data, lives = prepare_data(recipe), 0
    while not all(cell.finished for cell in cells):
        steps = 0

        def deadly(state, dies_at=3 + 2 * lives):
            nonlocal steps
            steps += bool(state.get("done"))
            if steps == dies_at:
                raise Killed

        lives += 1
        with contextlib.suppress(Killed):
            Grid(progress=deadly, _data=data).run(cells)
    assert 3 <= lives <= 5
    for seed in (0, 1, 5):
        train(recipe.with_(seed=seed), tmp_path / "peace" / str(seed), data=data)
        same(tmp_path / "grid" / str(seed), tmp_path / "peace" / str(seed))


def test_many_epochs_leave_nothing_behind(tmp_path):
    """Open files stay as many; a line of history is written once, and costs the same in the last epoch as in the first."""
    recipe = Recipe(**tiny_fields(epochs=60, width=4, batch_size=90, class_counts=[20] * 10, track="none", mixup=0))
    handles, history = [], []

    def watch(state):
        if state.get("done"):
            handles.append(len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0)
            history.append((tmp_path / "run" / "history.jsonl").stat())

    train(recipe, tmp_path / "run", data=prepare_data(recipe), progress=watch)
    assert len(handles) == 60
    assert len(set(handles)) == 1
    assert len({line.st_ino for line in history}) == 1, "appended to, never written anew"
    grown = [b.st_size - a.st_size for a, b in itertools.pairwise(history)]
    assert max(grown) < 1.3 * min(grown)


def test_many_files_are_listed_without_being_opened(tmp_path, monkeypatch):
    first = tmp_path / "first.png"
    first.write_bytes(encoded(picture(0, 0)))
    for k in range(10):
        (tmp_path / "data" / str(k)).mkdir(parents=True)
        for i in range(200):
            os.link(first, tmp_path / "data" / str(k) / f"{i}.png")
    monkeypatch.setattr("builtins.open", None)
    dataset = load_folder(tmp_path / "data")
    assert len(dataset.train) == 2000


# --- no network -------------------------------------------------------------------------------------------------------

NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request")


def cut_the_network():
    """Move this process into a network namespace without any network; whether the system lets us."""
    new_user, new_network = 0x10000000, 0x40000000
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None).unshare(new_user | new_network):
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path("/proc/self", name).write_text(text)
    return True


def test_offline_with_the_network_cut(tmp_path):
    """Training with its report, and prediction, in a network namespace without any network (where one can be made) look no
    address up and connect to nothing; the watch itself notices a connection. That importing does neither is a part of
    `test_importing_is_light`."""
    for k, name in enumerate(("cat", "dog")):
        write_class(tmp_path / "pets" / name, k, 12)

    def offline():
        cut, tried = cut_the_network(), []
        # Python tells its audit hooks of every address that is looked up and every connection that is begun
        sys.addaudithook(lambda event, arguments: tried.append(event) if event in NETWORK else None)
        words = tiny_flags(data=tmp_path / "pets", width=4, batch_size=4)
        assert main(["train", *words, "--out", str(tmp_path / "run")]) == 0
        assert main(["predict", str(tmp_path / "run"), str(tmp_path / "pets" / "cat")]) == 0
        assert tried == []
        with pytest.raises(OSError) as caught:
            socket.create_connection(("127.0.0.1", 9), timeout=1)
        assert tried == ["socket.getaddrinfo", "socket.connect"]
        assert not cut or caught.value.errno == errno.ENETUNREACH, "even this machine itself is out of reach"

    code, said = forked(offline)
    assert code == 0, said
    assert (tmp_path / "run" / "report.html").is_file()


def test_the_endurance_benchmark_can_be_read():
    module = benchmark("endurance")
    fitted = module.slope([5 + i / 500 for i in range(1000)])
    assert fitted["per_thousand"] == pytest.approx(2)
    assert abs(module.slope([5.0] * 1000)["per_thousand"]) < 1e-9
