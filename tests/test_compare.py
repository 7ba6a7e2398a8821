"""Methods × seeds on the same images: what is kept, what is continued, and the table."""

import json
import os
import shutil
import signal
import statistics

import pytest

from equiframe.cli import main
from equiframe.compare import COLUMNS, Summary, compare, markdown_table, summarise
from equiframe.errors import InputError
from equiframe.runs import RunFolder
from equiframe.train import Interrupted

pytestmark = pytest.mark.usefixtures("plain_pages")

METHODS, SEEDS = ("ce", "etf-ce"), (0, 3)


def files(path):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in path.rglob("*") if p.is_file() and p.parent != path}


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A finished comparison on a long tail, and what it returned."""
    from conftest import tiny_fields
    from equiframe.recipe import Recipe

    out = tmp_path_factory.mktemp("compare") / "grid"
    recipe, cells = Recipe(**tiny_fields(imbalance=10)), []
    content = compare(recipe, METHODS, SEEDS, out, on_cell=lambda *cell: cells.append(cell))
    return recipe, out, content, cells


def test_every_cell_is_a_finished_run(grid):
    _recipe, out, _, cells = grid
    assert cells == [("ce, seed 0", 1, 4), ("etf-ce, seed 0", 2, 4), ("ce, seed 3", 3, 4), ("etf-ce, seed 3", 4, 4)]
    for method in METHODS:
        for seed in SEEDS:
            folder = RunFolder(out / method / f"seed-{seed}")
            assert folder.finished
            assert (folder.recipe().method, folder.recipe().seed) == (method, seed)
    assert not [p for p in out.rglob("*") if p.name.endswith(".tmp")]


def test_all_cells_share_images_cut_and_validation(grid):
    _, out, _, _ = grid
    splits = [path.read_bytes() for path in out.glob("*/*/split.json")]
    assert len(splits) == 4
    assert len(set(splits)) == 1
    counts = json.loads(splits[0])["train_counts"]
    assert counts[0] > 5 * counts[-1]


def test_mean_and_sample_sd_are_those_of_the_runs(grid):
    _, out, content, _ = grid
    assert json.loads((out / "comparison.json").read_text()) == content
    for method in METHODS:
        runs = [RunFolder(out / method / f"seed-{s}").read_json("metrics.json") for s in SEEDS]
        assert content["runs"][method]["3"] == {k: v for k, v in runs[1].items() if k != "classes"}
        assert content["seeds"][method] == [0, 3]
        for column in COLUMNS:
            values = [r[column] for r in runs]
            expected = {"mean": None, "sd": None, "n": 0}
            if None not in values:
                expected = {"mean": statistics.fmean(values), "sd": statistics.stdev(values), "n": 2}
            assert content["summary"][method][column] == pytest.approx(expected), column
    assert "method" not in content["recipe"]
    assert content["recipe"]["imbalance"] == 10


def test_the_markdown_table(grid):
    _, out, content, _ = grid
    lines = (out / "comparison.md").read_text(encoding="utf-8").splitlines()
    columns = [c for c in COLUMNS if content["summary"]["ce"][c]["n"]]
    assert lines[0] == "| method | n | " + " | ".join(columns) + " |"
    assert set(lines[1]) == {"|", "-"}
    for method, line in zip(METHODS, lines[2:4], strict=True):
        top1 = content["summary"][method]["top1"]
        assert line.startswith(f"| {method} | 2 | {100 * top1['mean']:.1f} ± {100 * top1['sd']:.1f} | ")
        assert line.count("|") == lines[0].count("|")


def test_a_second_stage_beside_a_cell_is_no_cell(grid, tmp_path):
    recipe, out, content, _ = grid
    shutil.copytree(out, tmp_path / "grid")
    assert main(["second-stage", str(tmp_path / "grid/ce/seed-0"), "--stage", "crt", "--quiet"]) == 0
    assert (tmp_path / "grid/ce/seed-0-crt/metrics.json").is_file()
    again = compare(recipe, METHODS, SEEDS, tmp_path / "grid", on_cell=lambda *cell: pytest.fail("trained again"))
    assert again["summary"] == content["summary"]


def test_finished_cells_are_kept(grid):
    recipe, out, content, _ = grid
    before = files(out)
    again = compare(recipe, METHODS, SEEDS, out, on_cell=lambda *cell: pytest.fail("trained again"))
    assert again == content
    assert files(out) == before


def test_more_methods_and_seeds_join(grid, tmp_path):
    recipe, out, _, _ = grid
    shutil.copytree(out, tmp_path / "grid")
    before, cells = files(tmp_path / "grid"), []
    content = compare(recipe, ("etf-dr", "ce"), (0, 3), tmp_path / "grid", on_cell=lambda *cell: cells.append(cell[0]))
    assert cells == ["etf-dr, seed 0", "etf-dr, seed 3"]
    assert files(tmp_path / "grid").items() >= before.items()
    assert set(content["summary"]) == {"ce", "etf-dr", "etf-ce"}, "earlier cells of the folder stay in the table"
    assert content["seeds"]["etf-dr"] == [0, 3]


def test_cells_are_what_train_alone_would_make(grid, tmp_path):
    from equiframe.train import train

    recipe, out, _, _ = grid
    train(recipe.with_(method="etf-ce", seed=3), tmp_path / "alone")
    cell = out / "etf-ce" / "seed-3"
    assert (tmp_path / "alone" / "model.safetensors").read_bytes() == (cell / "model.safetensors").read_bytes()


def test_an_interrupted_grid_continues(grid, tmp_path):
    recipe, _out, _content, _ = grid
    started = []

    def progress(state):
        if state.get("step") == 10 and len(started) == 3:
            signal.raise_signal(signal.SIGINT)

    small = recipe.with_(batch_size=32)
    with pytest.raises(Interrupted):
        compare(small, METHODS, SEEDS, tmp_path / "g", progress=progress, on_cell=lambda *cell: started.append(cell[0]))
    assert started[-1] == "ce, seed 3"
    assert len(json.loads((tmp_path / "g" / "comparison.json").read_text())["seeds"]["etf-ce"]) == 1
    before, cells = files(tmp_path / "g"), []
    resumed = compare(small, METHODS, SEEDS, tmp_path / "g", on_cell=lambda *cell: cells.append(cell[0]))
    assert cells == ["ce, seed 3", "etf-ce, seed 3"]
    after = files(tmp_path / "g")
    assert all(after[p] == before[p] for p in before if "seed-0" in str(p))
    whole = compare(small, METHODS, SEEDS, tmp_path / "whole")
    for method in METHODS:
        for column in COLUMNS:
            assert resumed["summary"][method][column] == whole["summary"][method][column]


def test_numerics_are_chosen_once(tiny, tmp_path):
    said = []
    recipe = tiny(precision="auto", memory_format="auto", device="auto")
    compare(recipe, ("ce", "etf-ce"), (0,), tmp_path / "g", say=said.append)
    machines = [line for line in said if line.startswith("machine: ")]
    assert "tried" in machines[0]
    assert "tried" not in machines[1]
    assert machines[0].split("; tried")[0] == machines[1]
    compare(recipe, ("ce", "etf-ce"), (0,), tmp_path / "g")  # the choice agrees with auto


def test_cells_of_another_recipe_are_refused_before_any_work(grid, tmp_path):
    recipe, out, _, _ = grid
    before = files(out)
    for change, message in (
        ({"epochs": 2}, r"etf-ce.*seed-0 holds a run of another recipe \(epochs was 1, now 2\)"),
        ({"e_w": 4.0}, r"e_w was 1.0, now 4.0"),
        ({"image_size": 16}, "image_size was 8, now 16"),
        ({"imbalance": None}, "imbalance was 10.0, now None"),
    ):
        with pytest.raises(InputError, match=message):
            compare(recipe.with_(**change), ("etf-ce",), SEEDS, out)
    assert files(out) == before


def test_an_override_is_not_forgotten(tiny, tmp_path):
    """Fields that a grid left open do not take over the cells of a grid that had set them."""
    compare(tiny(e_w=4.0, augmentation="none"), ("etf-ce",), (0,), tmp_path / "g")
    for fields, message in (
        ({"augmentation": "none"}, "e_w was 4.0, now 1.0"),
        ({"e_w": 4.0}, "augmentation was 'none', now 'auto'"),
    ):
        with pytest.raises(InputError, match=message):
            compare(tiny(**fields), ("etf-ce",), (0,), tmp_path / "g")


@pytest.mark.parametrize(
    ("methods", "seeds", "message"),
    [
        ((), (0,), "at least one method and one seed"),
        (("ce",), (), "at least one method and one seed"),
        (("ce", "ce"), (0,), "method ce is listed twice"),
        (("ce",), (1, 1), "seed 1 is listed twice"),
        (("ce", "etf-rd"), (0,), "unknown method 'etf-rd'; did you mean 'etf-dr'"),
        (("ce",), (0, -1), "seed must not be negative"),
    ],
)
def test_grids_that_make_no_sense(tiny, tmp_path, methods, seeds, message):
    with pytest.raises(InputError, match=message):
        compare(tiny(), methods, seeds, tmp_path / "g")
    assert os.listdir(tmp_path) == []


def test_an_override_that_a_method_lacks_is_refused_before_any_work(tiny, tmp_path):
    with pytest.raises(InputError, match="field 'e_w' does not belong to head 'linear'"):
        compare(tiny(e_w=2.0), ("etf-ce", "ce"), (0,), tmp_path / "g")
    assert os.listdir(tmp_path) == []


def test_folders_that_hold_something_else(tiny, tmp_path, finished_run):
    (tmp_path / "file").write_text("x")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    for out, message in (
        (tmp_path / "file", "cannot create .*file is a file"),
        (tmp_path / "home", r"holds other files \(thesis.tex\)"),
        (finished_run, "holds other files"),
    ):
        with pytest.raises(InputError, match=message):
            compare(tiny(), ("ce",), (0,), out)


def test_a_cell_that_cannot_be_leaves_no_folder(tiny, tmp_path):
    with pytest.raises(InputError, match="K=10"):
        compare(tiny(width=4, geometry="simplex"), ("etf-ce",), (0,), tmp_path / "a" / "g")
    assert os.listdir(tmp_path) == []


# --- variants, budgets, failures --------------------------------------------------------------------------------------


def test_variants_are_rows_of_their_own(tiny, tmp_path):
    methods = ("ce", "etf-la:tau=0.5:lr=0.02", "etf-la")
    content = compare(tiny(), methods, (0,), tmp_path / "g", reference="ce")
    assert list(content["summary"]) == ["ce", "etf-la:tau=0.5:lr=0.02", "etf-la"]
    assert content["variants"]["etf-la:tau=0.5:lr=0.02"] == {"tau": 0.5, "lr": 0.02}
    cell = RunFolder(tmp_path / "g" / "etf-la+tau=0.5+lr=0.02" / "seed-0").recipe()
    assert (cell.method, cell.tau, cell.lr) == ("etf-la", 0.5, 0.02)
    assert {c["method"] for c in content["verdicts"]["to_reference"]} == set(methods) - {"ce"}
    assert {c["call"] for c in content["verdicts"]["to_reference"]} == {"cannot be told yet (1 seed)"}
    again = compare(tiny(), ("ce",), (0,), tmp_path / "g", on_cell=lambda *cell: pytest.fail("trained again"))
    assert set(again["summary"]) == set(content["summary"]), "earlier rows are told by their folders"
    with pytest.raises(InputError, match="unknown reference 'cosine'"):
        compare(tiny(), ("ce",), (0,), tmp_path / "g", reference="cosine")
    from equiframe.report import find_runs, group_runs

    assert {g.name for g in group_runs(find_runs([tmp_path / "g"]))} == set(content["summary"])


def test_predictions_are_kept_and_agree_with_the_measures(grid):
    _, out, content, _ = grid
    for method in METHODS:
        arrays = RunFolder(out / method / "seed-0").read_arrays("predictions.npz")
        assert {k: v.dtype for k, v in arrays.items()} == {"labels": "u2", "predicted": "u2", "probability": "f2"}
        right = arrays["labels"] == arrays["predicted"]
        recall = [right[arrays["labels"] == k].mean() for k in range(10)]
        assert sum(recall) / 10 == pytest.approx(content["runs"][method]["0"]["macro"])
        assert 0.1 <= arrays["probability"].min() <= arrays["probability"].max() <= 1
    (verdict,) = content["verdicts"]["to_best"]
    assert verdict["over_images"][0] <= verdict["difference"] <= verdict["over_images"][1]
    assert "| points |" in (out / "comparison.md").read_text(encoding="utf-8")


def test_no_cell_begins_after_the_budget(grid, tmp_path):
    recipe, *_ = grid
    content = compare(recipe, METHODS, (0,), tmp_path / "g", budget=1e-9, on_cell=lambda *cell: pytest.fail("began"))
    assert content["missing"] == ["ce, seed 0", "etf-ce, seed 0"]
    assert content["summary"] == {}
    assert content["verdicts"] is None


def test_what_runs_at_the_end_of_the_budget_is_stopped_and_saved(grid, tmp_path, monkeypatch):
    recipe, *_ = grid
    over = []
    monkeypatch.setattr("equiframe.grid.Grid.over", property(lambda self: bool(over)))

    def progress(state):
        if state.get("step") == 10 and state["cell"] == "[2/2] etf-ce, seed 0":
            over.append(True)

    content = compare(recipe.with_(batch_size=32), METHODS, (0,), tmp_path / "g", progress=progress)
    assert content["missing"] == ["etf-ce, seed 0"]
    assert content["seeds"] == {"ce": [0], "etf-ce": []}
    assert (tmp_path / "g" / "etf-ce" / "seed-0" / "checkpoints" / "last.pt").is_file()
    over.clear()
    said = []
    content = compare(recipe.with_(batch_size=32), METHODS, (0,), tmp_path / "g", say=said.append)
    assert content["missing"] == []
    assert "continuing at epoch 1, step 10" in said


def test_a_cell_that_fails_is_named_and_does_not_stop_the_others(tmp_path, capsys, flags, monkeypatch):
    from equiframe.cli import main

    command = ["compare", *flags(geometry="simplex"), "--methods", "etf-ce:width=4,etf-ce", "--seeds", "0"]
    assert main([*command, "--out", str(tmp_path / "g"), "--quiet"]) == 2
    out, error = capsys.readouterr()
    assert "etf-ce " in out
    assert error.startswith("equiframe: etf-ce:width=4, seed 0 failed: ")
    assert error.count("\n") == 1
    assert "K=10" in error
    content = json.loads((tmp_path / "g" / "comparison.json").read_text())
    assert list(content["summary"]) == ["etf-ce"]
    assert list(content["failed"]) == ["etf-ce:width=4, seed 0"]
    assert content["missing"] == []

    from equiframe import grid

    train = grid.train

    def bug(recipe, *args, **kwargs):
        if recipe.method == "ce":
            raise ZeroDivisionError("ours")
        return train(recipe, *args, **kwargs)

    monkeypatch.setattr(grid, "train", bug)
    assert main(["compare", *flags(), "--methods", "ce,etf-ce", "--seeds", "0", "--out", str(tmp_path / "b")]) == 1
    assert "Traceback" in (error := capsys.readouterr().err)
    assert error.endswith("equiframe: ce, seed 0 failed: ZeroDivisionError: ours\n")
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        main(["compare", *flags(), "--methods", "ce", "--seeds", "0", "--out", str(tmp_path / "c"), "--quiet"])


# --- second stages share a network ------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_second_stage_takes_the_network_of_its_first(grid, tmp_path, jobs):
    from equiframe.train import train

    recipe = grid[0].with_(epochs=1)
    cells, methods = [], ("ncm", "crt-adjusted", "ce", "etf-crt", "ncm:lr=0.01")
    content = compare(recipe, methods, (3,), tmp_path / "g", jobs=jobs, on_cell=lambda *cell: cells.append(cell[0]))
    assert set(content["summary"]) == set(methods)
    if jobs == 1:  # first stages first; whoever has none trains for itself
        assert cells == [f"{m}, seed 3" for m in ("ce", "ncm", "crt-adjusted", "etf-crt", "ncm:lr=0.01")]
    network = tmp_path / "g" / "ce" / "seed-3"
    for method in methods:
        folder = RunFolder(tmp_path / "g" / method.replace(":", "+") / "seed-3")
        taken = folder.read_json("environment.json").get("second_stage_of")
        assert taken == (str(network) if method in ("ncm", "crt-adjusted") else None), method
    alone = train(recipe.with_(method="crt-adjusted", seed=3), tmp_path / "alone")
    shared = RunFolder(tmp_path / "g" / "crt-adjusted" / "seed-3").read_json("metrics.json")
    times = dict.fromkeys(("seconds", "images_per_second"))
    assert shared | times == alone | times
    again = compare(recipe, methods, (3,), tmp_path / "g", on_cell=lambda *cell: pytest.fail("trained again"))
    assert again["summary"] == content["summary"]


def test_a_second_stage_trains_itself_where_its_first_fails(grid, tmp_path, monkeypatch):
    from equiframe import grid as module

    recipe, _, _, _ = grid
    whole = module.train

    def fails(recipe, *args, **kwargs):
        if recipe.method == "ce":
            raise InputError("no")
        return whole(recipe, *args, **kwargs)

    monkeypatch.setattr(module, "train", fails)
    content = compare(recipe.with_(epochs=1), ("ce", "ncm"), (0,), tmp_path / "g")
    assert (list(content["failed"]), list(content["summary"])) == (["ce, seed 0"], ["ncm"])


# --- several cells at a time ------------------------------------------------------------------------------------------


def test_side_by_side_cells_are_the_same_cells(grid, tmp_path):
    recipe, out, content, _ = grid
    cells, states, said = [], [], []
    parallel = compare(
        recipe, ("ce", "etf-ce:width=4:geometry=simplex"), (0,), tmp_path / "g", jobs=2,
        on_cell=lambda *cell: cells.append(cell), progress=states.append, say=said.append,
    )  # fmt: skip
    assert [cell[0] for cell in cells] == ["ce, seed 0", "etf-ce:geometry=simplex:width=4, seed 0"]
    one, other = (path / "ce" / "seed-0" / "model.safetensors" for path in (out, tmp_path / "g"))
    assert one.read_bytes() == other.read_bytes()
    times = ("seconds", "images_per_second")
    assert parallel["runs"]["ce"]["0"] | dict.fromkeys(times) == content["runs"]["ce"]["0"] | dict.fromkeys(times)
    (failed,) = parallel["failed"].values()
    assert failed["by_input"]
    assert "K=10" in failed["text"]
    assert {state["cell"] for state in states} == {"[1/2] ce, seed 0"}
    assert len([line for line in said if line.startswith("data: ")]) == 1, "what all cells say is told once"


def test_ctrl_c_stops_and_saves_all_cells_at_a_time(tmp_path, flags):
    import subprocess
    import sys

    command = [
        sys.executable, "-m", "equiframe", "compare", *flags(epochs=100_000, track="none"), "--methods", "ce,etf-ce",
        "--seeds", "0", "--jobs", "2", "--out", "g",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    seen = set()
    for line in process.stderr:
        if "epoch 1/" in line:
            seen.add(line.split("]")[0])
        if len(seen) == 2:
            process.send_signal(signal.SIGINT)
            break
    out, error = process.communicate(timeout=100)
    assert process.returncode == 130, error
    assert out == ""
    assert error.splitlines()[-1] == "stopped and saved in g; the same command continues"
    assert "Traceback" not in error
    for method in ("ce", "etf-ce"):
        assert (tmp_path / "g" / method / "seed-0" / "checkpoints" / "last.pt").is_file()
        assert not RunFolder(tmp_path / "g" / method / "seed-0").finished


def test_a_worker_stops_when_its_parent_is_gone(tiny, tmp_path):
    """The pipe to it closes however this process ends; it then saves and leaves."""
    import queue

    from equiframe.grid import Cell, _Worker

    events = queue.Queue()
    worker = _Worker(Cell(tiny(epochs=100_000, track="none"), tmp_path / "run", "x"), "x", None, {}, 1, events)
    while "progress" not in events.get(timeout=100)[1]:
        pass
    worker._process.stdin.close()
    while events.get(timeout=100)[1] is not None:
        pass
    assert worker._process.returncode == 130
    assert worker.failure() is not None, "nobody asked it to stop"
    assert (tmp_path / "run" / "checkpoints" / "last.pt").is_file()


def test_summary():
    assert Summary.of([1.0, 3.0, None]) == Summary(2.0, 2**0.5, 2)
    assert Summary.of([0.5]) == Summary(0.5, None, 1)
    assert Summary.of([None, float("nan")]) == Summary(None, None, 0)
    assert Summary(0.7131, 0.004, 3).percent() == "71.3 ± 0.4"
    assert Summary(0.7131, None, 1).percent() == "71.3"
    assert Summary(None, None, 0).percent() == "–"


def test_a_table_with_gaps():
    metrics = {c: 0.5 for c in COLUMNS} | {"few": None, "many": None}
    table = markdown_table(summarise({"ce": {0: metrics}, "etf-ce": {}, "etf-la": {0: metrics | {"few": 0.25}}}))
    assert table.splitlines()[0] == "| method | n | top1 | macro | medium | few | worst | ece |"
    assert table.splitlines()[2] == "| ce | 1 | 50.0 | 50.0 | 50.0 | – | 50.0 | 50.0 |"
    assert len(table.splitlines()) == 4
