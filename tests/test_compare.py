"""Methods × seeds on the same images: what is kept, what is continued, and the table."""

import json
import os
import signal
import statistics

import pytest

from equiframe.compare import COLUMNS, Summary, compare, markdown_table, summarise
from equiframe.errors import InputError
from equiframe.runs import RunFolder
from equiframe.train import Interrupted

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
    assert lines[0] == "| method | n | " + " | ".join(COLUMNS) + " |"
    assert set(lines[1]) == {"|", "-"}
    for method, line in zip(METHODS, lines[2:4], strict=True):
        top1 = content["summary"][method]["top1"]
        assert line.startswith(f"| {method} | 2 | {100 * top1['mean']:.1f} ± {100 * top1['sd']:.1f} | ")
        assert line.count("|") == lines[0].count("|")


def test_finished_cells_are_kept(grid):
    recipe, out, content, _ = grid
    before = files(out)
    again = compare(recipe, METHODS, SEEDS, out, on_cell=lambda *cell: pytest.fail("trained again"))
    assert again == content
    assert files(out) == before


def test_more_methods_and_seeds_join(grid, tmp_path):
    import shutil

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


def test_summary():
    assert Summary.of([1.0, 3.0, None]) == Summary(2.0, 2**0.5, 2)
    assert Summary.of([0.5]) == Summary(0.5, None, 1)
    assert Summary.of([None, float("nan")]) == Summary(None, None, 0)
    assert Summary(0.7131, 0.004, 3).percent() == "71.3 ± 0.4"
    assert Summary(0.7131, None, 1).percent() == "71.3"
    assert Summary(None, None, 0).percent() == "–"


def test_a_table_with_gaps():
    metrics = {c: 0.5 for c in COLUMNS} | {"few": None}
    table = markdown_table(summarise({"ce": {0: metrics}, "etf-ce": {}}))
    assert table.splitlines()[2] == "| ce | 1 | 50.0 | 50.0 | 50.0 | 50.0 | – | 50.0 | 50.0 |"
    assert len(table.splitlines()) == 3
