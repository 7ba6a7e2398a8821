"""Small versions of benchmarks/kill_harness.py and benchmarks/endurance.py; and that nothing of ours speaks to a network."""

import contextlib
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import encoded, picture, tiny_fields, write_class
from equiframe.data.folders import load_folder
from equiframe.data.prepare import prepare_data
from equiframe.grid import Cell, Grid
from equiframe.recipe import Recipe
from equiframe.runs import RunFolder
from equiframe.train import train

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_real_kills(tmp_path):
    """SIGKILL in a file operation, a step, an evaluation and a checkpoint; the harness's own control comes out different."""
    command = [sys.executable, str(BENCHMARKS / "kill_harness.py"), "--kills", "4", "--only", "digits: SAM",
               "--epochs", "2", "--seed", "3", "--out", str(tmp_path / "kills.json")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
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

# Python tells its audit hooks of every address that is looked up and every connection that is begun
AUDITED = """
import sys
tried = []
def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request"):
        tried.append((event, str(arguments)[:200]))
sys.addaudithook(hook)
import socket
import equiframe
from equiframe.cli import main
out = sys.argv[1]
train = ["train", sys.argv[2], *sys.argv[3:], "--out", out + "/run"]
assert main(train) == 0
assert main(["report", out + "/run", "--out", out + "/page.html"]) == 0
assert main(["predict", out + "/run", sys.argv[2] + "/cat"]) == 0
assert tried == [], tried
try:
    socket.create_connection(("127.0.0.1", 9), timeout=1)
except OSError as error:
    print("told:", tried[-1][0], error.errno)
"""


def test_offline_with_the_network_cut(tmp_path):
    """Import, training, report and prediction in a network namespace without any network (where one can be made) look no
    address up and connect to nothing; the watch itself notices a connection."""
    for k, name in enumerate(("cat", "dog")):
        write_class(tmp_path / "pets" / name, k, 12)
    fields = tiny_fields(width=4, batch_size=4)
    flags = [w for n, v in fields.items() if n != "data" for w in (f"--{n.replace('_', '-')}", str(v))]
    cut = ["unshare", "-rn"]
    if shutil.which("unshare") is None or subprocess.run([*cut, "true"], capture_output=True).returncode:
        cut = []
    done = subprocess.run(
        [*cut, sys.executable, "-c", AUDITED, str(tmp_path), str(tmp_path / "pets"), *flags],
        capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "told: socket.connect" in done.stdout
    if cut:
        assert "told: socket.connect 101" in done.stdout, "even this machine itself is out of reach"


def test_the_endurance_benchmark_can_be_read():
    spec = importlib.util.spec_from_file_location("endurance", BENCHMARKS / "endurance.py")
    module = importlib.util.module_from_spec(spec)
    threads = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "EQUIFRAME_CACHE")}
    spec.loader.exec_module(module)
    os.environ.update({k: v for k, v in threads.items() if v is not None})
    fitted = module.slope([5 + i / 500 for i in range(1000)])
    assert fitted["per_thousand"] == pytest.approx(2)
    assert abs(module.slope([5.0] * 1000)["per_thousand"]) < 1e-9
