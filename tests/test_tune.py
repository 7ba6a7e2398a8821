"""Tuning: equal budgets, the declared space, chosen on validation images alone."""

import json

import numpy as np
import pytest

from equiframe import InputError, tune
from equiframe.cli import main
from equiframe.compare import compare
from equiframe.recipe import FIELD_NAMES
from equiframe.runs import RunFolder
from equiframe.variants import Variant

pytestmark = pytest.mark.usefixtures("plain_pages")

CE, LA = Variant("ce"), Variant("etf-la")


def test_the_space_is_that_of_the_method_and_of_what_nobody_fixed(tiny):
    recipe = tiny(lr=0.08, weight_decay=0.0)
    assert tune.space_of(CE, recipe) == {"lr": pytest.approx((0.01, 0.32))}, "a weight decay of 0 stays 0"
    assert set(tune.space_of(LA, recipe)) == {"lr", "tau", "logit_scale"}
    assert set(tune.space_of(Variant.parse("etf-la:tau=1"), recipe)) == {"lr", "logit_scale"}
    assert set(tune.space_of(LA, tiny(logit_scale=2.0))) == {"lr", "weight_decay", "tau"}
    assert tune.space_of(Variant("cosine"), recipe)["logit_scale"] == (4, 64)


def test_trials_are_log_uniform_seeded_and_shared_between_methods(tiny):
    recipe = tiny()
    assert tune.trial_fields(LA, recipe, 0) == {}, "the defaults come first"
    one = tune.trial_fields(LA, recipe, 3)
    assert one == tune.trial_fields(LA, recipe, 3)
    assert one["lr"] == tune.trial_fields(CE, recipe, 3)["lr"], "all methods look at the same places"
    low, high = tune.space_of(LA, recipe)["lr"]
    rates = np.array([tune.trial_fields(LA, recipe, i)["lr"] for i in range(1, 400)])
    assert rates.min() >= 0.99 * low
    assert rates.max() <= 1.01 * high
    place = np.log(rates / low) / np.log(high / low)
    assert np.abs(np.histogram(place, 4, (0, 1))[0] / 399 - 0.25).max() < 0.07
    assert np.corrcoef(place, [tune.trial_fields(LA, recipe, i)["tau"] for i in range(1, 400)])[0, 1] < 0.15


def test_every_method_gets_as_many_trials_in_turn(tiny, tmp_path):
    cells = tune.trial_cells([CE, LA], tiny(), tmp_path, num=3, epochs=1)
    assert [c.label for c in cells][:3] == ["tuning ce, trial 0", "tuning etf-la, trial 0", "tuning ce, trial 1"]
    assert {c.path.relative_to(tmp_path).as_posix() for c in cells} == {
        f"tuning/{method}/trial-{i}" for method in ("ce", "etf-la") for i in range(3)
    }
    assert {c.recipe.seed for c in cells} == {0}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    from conftest import tiny_fields
    from equiframe.recipe import Recipe

    out = tmp_path_factory.mktemp("tune") / "g"
    recipe, said = Recipe(**tiny_fields(imbalance=10, epochs=2)), []
    content = compare(recipe, ("ce", "etf-la"), (4,), out, tune=3, tune_epochs=1, say=said.append)
    return recipe, out, content, said


def test_the_best_on_validation_images_trains_the_cells(tuned):
    _, out, content, said = tuned
    for method in ("ce", "etf-la"):
        scores = [
            json.loads((out / f"tuning/{method}/trial-{i}/metrics.json").read_text())["val_macro"] for i in range(3)
        ]
        record = content["tuning"][method]
        assert record == RunFolder(out / "tuning" / method).read_json("tuning.json")
        assert [t["val_macro"] for t in record["trials"]] == scores
        assert record["chosen"] == int(np.argmax(scores))
        cell = RunFolder(out / method / "seed-4").recipe()
        assert cell.epochs == 2
        for name, value in record["trials"][record["chosen"]]["fields"].items():
            assert getattr(cell, name) == value
        assert any(line.startswith(f"tuned {method}: trial {record['chosen']} of 3") for line in said)
        assert any(line.startswith(f"tuning {method}: 3 trials, the first with its defaults; lr ") for line in said)
    assert set(content["summary"]) == {"ce", "etf-la"}, "trials are no results"


def test_a_tuned_comparison_is_kept_and_extended(tuned, tmp_path):
    import shutil

    recipe, out, content, _ = tuned
    again = compare(
        recipe, ("ce", "etf-la"), (4,), out, tune=3, tune_epochs=1, on_cell=lambda *cell: pytest.fail("trained again")
    )
    assert again == content
    for options, message in (
        ({"tune": 2}, "holds ce tuned with 3 trials, and now there are to be 2.* use --tune 3"),
        ({}, "holds ce tuned with 3 trials, and now there are to be 0"),
    ):
        with pytest.raises(InputError, match=message):
            compare(recipe, ("cosine",), (4,), out, **options)
    shutil.copytree(out, tmp_path / "g")
    cells = []
    compare(
        recipe, ("ce",), (4, 5), tmp_path / "g", tune=3, tune_epochs=1, on_cell=lambda label, *_: cells.append(label)
    )
    assert cells == ["ce, seed 5"]


def test_the_report_leaves_trials_out(tuned):
    from equiframe.report import find_runs

    assert len(find_runs([tuned[1]])) == 2


def test_a_trial_that_diverges_loses(tiny, tmp_path):
    """Factors on a huge learning rate: trials fail, are named, and the ones that do not are chosen from."""
    said = []
    monkey = tune.SPACE | {"lr": tune.Range(1e28, 1e30, relative=True)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "SPACE", monkey)
        content = compare(tiny(warmup=0.0), ("ce",), (0,), tmp_path / "g", tune=2, say=said.append)
    assert content["tuning"]["ce"]["chosen"] == 0
    assert content["tuning"]["ce"]["trials"][1]["val_macro"] is None
    assert content["failed"] == {}
    assert any("tuning ce, trial 1 failed" in line for line in said)


def test_tuning_that_would_not_be_fair_is_refused(tiny, tmp_path, class_folder):
    photos = class_folder({"cat": 12, "dog": 12})
    for recipe, options, message in (
        (tiny(validation=0.0), {"tune": 2}, "validation 0 leaves none"),
        (tiny(data=str(photos)), {"tune": 2}, "has no test split.* choose settings on the very images"),
        (tiny(), {"tune": -1}, "tune must be at least 1 trial a method, got -1"),
        (tiny(), {"tune_epochs": 1}, "tune epochs need tune"),
    ):
        with pytest.raises(InputError, match=message):
            compare(recipe, ("ce",), (0,), tmp_path / "g", **options)
    assert not (tmp_path / "g").exists()


def test_the_space_names_fields_of_the_recipe():
    assert set(tune.SPACE) <= set(FIELD_NAMES)


def test_a_second_stage_is_judged_after_it(tmp_path):
    """What is saved is what is judged: the validation accuracy of the final model, not that of the last epoch."""
    words = "compare digits --imbalance 20 --methods crt --seeds 0 --tune 1 --backbone mlp --epochs 1 --batch-size 64 --quiet"
    assert main([*words.split(), "--out", str(tmp_path / "out")]) == 0
    trial = tmp_path / "out/tuning/crt/trial-0"
    metrics = json.loads((trial / "metrics.json").read_text())
    assert metrics["val_macro"] == pytest.approx(metrics["second_stage_val_macro"], abs=1e-6)
    last = json.loads((trial / "history.jsonl").read_text().splitlines()[-1])["val_macro"]
    content = json.loads((tmp_path / "out/comparison.json").read_text())
    assert content["tuning"]["crt"]["trials"][0]["val_macro"] == metrics["val_macro"] != last
