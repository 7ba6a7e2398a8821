"""The run folder: whole files or none, documented content, and which recipe may continue which run."""

import json
import os

import pytest
import torch

from equiframe.errors import InputError
from equiframe.model import load_classifier
from equiframe.recipe import FIELD_NAMES, Recipe, dump_recipe, load_recipe
from equiframe.runs import RunFolder, atomic_write, settings_that_differ

MEASURES = "top1 macro many medium few worst ece nll nc1 nc2_angle nc2_norm nc3 nc4 num_train num_test seconds " \
           "images_per_second"  # fmt: skip

# --- files, whole or not at all ---------------------------------------------------------------------------------------


def test_a_write_replaces_the_file(tmp_path):
    for content in ("first", b"\x00second"):
        atomic_write(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == b"\x00second"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("failing", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing, error):
    atomic_write(tmp_path / "file", "old")

    def fail(*args):
        raise error

    monkeypatch.setattr(os, failing, fail)
    expected = InputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left" if isinstance(error, OSError) else None):
        atomic_write(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "below", tmp_path / "none" / "below"):
        with pytest.raises(InputError, match="cannot write"):
            atomic_write(path, "x")


def test_a_file_name_that_is_not_utf8_can_be_written_down(tmp_path):
    atomic_write(tmp_path / "file", os.fsdecode(b"\xff.png"))
    assert (tmp_path / "file").read_bytes() == b"\xff.png"


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_a_recipe_survives_yaml(tmp_path, tiny):
    recipe = tiny(data="bilder/kätzchen", lr=1e-5, imbalance=None, class_counts=(5, 4), weight_decay=2e-4, mixup=0)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert Recipe(**load_recipe(path)) == recipe
    assert list(load_recipe(path)) == list(FIELD_NAMES)


def test_yaml_numbers_in_the_usual_spellings(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("data: digits\nlr: 1e-3\nweight_decay: 5.e-4\nimbalance: 100\nepochs: 7\n")
    recipe = Recipe(**load_recipe(path))
    assert (recipe.lr, recipe.weight_decay, recipe.imbalance, recipe.epochs) == (1e-3, 5e-4, 100.0, 7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"epochs": 1.5}, "'epochs' must be a whole number, got 1.5"),
        ({"epochs": True}, "'epochs' must be a whole number, got True"),
        ({"epochs": "3"}, "'epochs' must be a whole number, got '3'"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"width": 0}, "width must be at least 1"),
        ({"image_size": 3}, "image_size must be at least 4"),
        ({"lr": "fast"}, "'lr' must be a finite number, got 'fast'"),
        ({"lr": float("nan")}, "'lr' must be a finite number"),
        ({"lr": float("inf")}, "'lr' must be a finite number"),
        ({"lr": 10**400}, "'lr' must be a finite number"),
        ({"lr": -1}, "lr must not be negative"),
        ({"mixup": -0.1}, "mixup must not be negative"),
        ({"weight_decay": -1}, "weight_decay must not be negative"),
        ({"seed": -1}, "seed must not be negative"),
        ({"seed": 2**63}, "seed must be below"),
        ({"subset_seed": 2**32}, "subset_seed must be below"),
        ({"validation": 1.0}, "validation must be between 0 and 0.9, got 1.0"),
        ({"validation": -0.1}, "validation must be between"),
        ({"momentum": 2}, "momentum must be between"),
        ({"warmup": 1.1}, "warmup must be between"),
        ({"pretrained": "yes"}, "'pretrained' must be true or false, got 'yes'"),
        ({"data": 5}, "'data' must be text, got 5"),
        ({"data": None}, "'data' must be text, got None"),
        ({"class_counts": 5}, "'class_counts' must be a list of whole numbers, got 5"),
        ({"class_counts": ["a"]}, "'class_counts' must be a whole number, got 'a'"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin'; did you mean 'cosine'"),
        ({"precision": "bfloat61"}, "unknown precision 'bfloat61'; did you mean 'bfloat16'"),
        ({"data_mode": "x"}, "unknown data mode 'x'"),
    ],
)
def test_fields_out_of_range(fields, message):
    with pytest.raises(InputError, match=message):
        Recipe(**fields)


def test_an_unknown_field_names_the_nearest(tmp_path):
    with pytest.raises(InputError, match="unknown field 'epoch'; did you mean 'epochs'"):
        Recipe().with_(epoch=3)
    (tmp_path / "r.yaml").write_text("bacth_size: 3")
    with pytest.raises(InputError, match="unknown field 'bacth_size'; did you mean 'batch_size'"):
        load_recipe(tmp_path / "r.yaml")


# --- claiming a folder ------------------------------------------------------------------------------------------------


def begun(path, asked, settled=None):
    folder = RunFolder(path)
    folder.begin(asked, settled or asked, {"fingerprint": "f", "hash": "h"}, {})
    return folder


def test_a_check_writes_nothing(tmp_path, tiny):
    assert RunFolder(tmp_path / "new" / "run").check(tiny(), resume=False) is None
    assert os.listdir(tmp_path) == []
    (tmp_path / ".hidden").touch()
    assert RunFolder(tmp_path).check(tiny(), resume=False) is None


def test_folders_that_are_not_free(tmp_path, tiny):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    begun(tmp_path / "run", tiny())
    for name, resume, message in (
        ("file", False, "output .*file is a file"),
        ("file/below", False, "cannot create .*: .*file is a file"),
        ("full", False, "not empty and not a run"),
        ("run", False, "already holds a run; continue it with --out"),
        ("full", True, "nothing to resume"),
        ("none", True, "nothing to resume"),
    ):
        with pytest.raises(InputError, match=message):
            RunFolder(tmp_path / name).check(tiny(), resume=resume)
    with pytest.raises(InputError, match=r"another recipe \(lr was 0.05, now 0.1\)"):
        RunFolder(tmp_path / "run").check(tiny(lr=0.1), resume=True)


def test_where_one_may_not_write(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *args: False)  # root may write everywhere
    with pytest.raises(InputError, match="no permission to write in"):
        RunFolder(tmp_path / "run").check(tiny(), resume=False)


def test_a_run_that_failed_at_once_leaves_no_folder(tmp_path, tiny):
    folder = begun(tmp_path / "a" / "b" / "run", tiny())
    folder.append_history({"epoch": 0})
    folder.discard()
    assert os.listdir(tmp_path) == []
    (tmp_path / "mine").mkdir()
    begun(tmp_path / "mine", tiny()).discard()
    assert os.listdir(tmp_path / "mine") == []  # the user's own folder stays
    trained = begun(tmp_path / "trained", tiny())
    trained.save_checkpoint({"x": 1})
    trained.discard()
    assert "recipe.yaml" in os.listdir(tmp_path / "trained")


SETTLED = {"image_size": 8, "data_mode": "resident", "augmentation": "crop", "head": "frame", "loss": "ce", "e_w": 1.0}


def test_a_field_left_open_agrees_only_with_one_that_was_left_open(tmp_path, tiny):
    folder = begun(tmp_path / "run", tiny(method="etf-ce"), tiny(method="etf-ce", **SETTLED))
    assert set(folder.read_json("environment.json")["left_open"]) == set(SETTLED)
    assert folder.agree(tiny(method="etf-ce")).image_size == 8
    assert folder.agree(tiny(method="etf-ce", image_size=8, workers=7, data_root="/x"))
    for change in ({"image_size": 16}, {"e_w": 2.0}, {"augmentation": "none"}, {"method": "etf-la"}, {"seed": 1}):
        with pytest.raises(InputError, match="another recipe"):
            folder.agree(tiny(**{"method": "etf-ce"} | change))
    chosen = begun(tmp_path / "chosen", tiny(augmentation="none", e_w=4.0))
    for change in ({"augmentation": "auto", "e_w": 4.0}, {"augmentation": "none"}):
        with pytest.raises(InputError, match="another recipe"):
            chosen.agree(tiny(**change))


def test_one_folder_by_several_names_is_the_same_data(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets").mkdir()
    for name in ("pets", "./pets", "pets/", str(tmp_path / "pets"), "cats/../pets"):
        assert settings_that_differ(tiny(data="pets"), tiny(data=name)) == ""
    assert settings_that_differ(tiny(data="pets"), tiny(data="cats")) == "data was 'pets', now 'cats'"


def test_what_the_machine_chose_agrees_with_auto(tiny):
    machine = {"device": "auto", "precision": "auto", "memory_format": "auto"}
    assert settings_that_differ(tiny(), tiny(**machine)) == ""
    assert settings_that_differ(tiny(), tiny(precision="bfloat16")) == "precision was 'float32', now 'bfloat16'"


@pytest.mark.parametrize("step", range(4))
def test_a_run_killed_while_it_begins_can_be_resumed(tmp_path, tiny, monkeypatch, step):
    written = []
    write = RunFolder.write

    def killed(self, name, content):
        if len(written) == step:
            raise KeyboardInterrupt
        written.append(name)
        write(self, name, content)

    monkeypatch.setattr(RunFolder, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        begun(tmp_path / "run", tiny(), tiny(**SETTLED))
    monkeypatch.undo()
    folder = RunFolder(tmp_path / "run")
    if step == 0:
        assert folder.check(tiny(), resume=False) is None
    else:
        assert folder.check(tiny(), resume=True) is not None


def test_the_data_may_not_change_under_a_run(tmp_path, tiny):
    folder = begun(tmp_path / "run", tiny())
    folder.check_split({"fingerprint": "f", "hash": "h", "more": 1})
    with pytest.raises(InputError, match="the data changed since"):
        folder.check_split({"fingerprint": "g", "hash": "h"})


# --- history and checkpoints ------------------------------------------------------------------------------------------


def test_history_without_the_line_that_a_crash_cut_short(tmp_path, tiny):
    folder = begun(tmp_path / "run", tiny())
    assert folder.history() == []
    folder.rewind_history(0)
    for epoch in range(3):
        folder.append_history({"epoch": epoch})
    with open(tmp_path / "run" / "history.jsonl", "ab") as file:
        file.write(b'{"epoch": 3, "lo\xff')
    assert [r["epoch"] for r in folder.history()] == [0, 1, 2]
    folder.rewind_history(2)
    folder.append_history({"epoch": 2})
    assert [r["epoch"] for r in folder.history()] == [0, 1, 2]


def test_a_checkpoint_comes_back(tmp_path, tiny):
    folder = begun(tmp_path / "run", tiny())
    assert folder.load_checkpoint() is None
    folder.save_checkpoint({"weights": torch.arange(3.0), "epoch": 2})
    assert torch.equal(folder.load_checkpoint()["weights"], torch.arange(3.0))
    for content in (b"", b"junk", (tmp_path / "run" / "checkpoints" / "last.pt").read_bytes()[:200]):
        (tmp_path / "run" / "checkpoints" / "last.pt").write_bytes(content)
        with pytest.raises(InputError, match=r"checkpoint .*last\.pt cannot be read"):
            folder.load_checkpoint()


def test_damaged_records(tmp_path, tiny):
    folder = begun(tmp_path / "run", tiny())
    with pytest.raises(InputError, match="not a finished run"):
        folder.read_json("metrics.json")
    for content in (b"{", b"\xff", b"[]"):
        (tmp_path / "run" / "metrics.json").write_bytes(content)
        with pytest.raises(InputError, match=r"metrics\.json is damaged"):
            folder.read_json("metrics.json")
    with pytest.raises(ValueError, match="JSON"):  # a NaN in a record would be our bug
        folder.write_json("metrics.json", {"top1": float("nan")})


# --- a finished run ---------------------------------------------------------------------------------------------------


def test_the_files_of_a_finished_run(finished_run):
    assert {p.name for p in finished_run.iterdir()} >= {
        "recipe.yaml", "environment.json", "split.json", "history.jsonl", "checkpoints", "model.safetensors",
        "model.json", "metrics.json",
    }  # fmt: skip
    assert os.listdir(finished_run / "checkpoints") == ["last.pt"]
    assert not [p for p in finished_run.rglob("*") if p.name.endswith(".tmp")]


def test_the_recipe_is_settled_and_loadable(finished_run):
    recipe = RunFolder(finished_run).recipe()
    assert (recipe.image_size, recipe.data_mode, recipe.augmentation) == (12, "resident", "crop-flip")
    assert (recipe.head, recipe.loss, recipe.logit_scale) == ("frame", "logit-adjusted", 1.0)
    assert "auto" not in [v for k, v in recipe.to_dict().items() if k != "geometry"]


def test_the_environment_says_which_parameters_train(finished_run):
    record = json.loads((finished_run / "environment.json").read_text())
    model, _ = load_classifier(finished_run)
    assert record["training_parameters"] == {n: p.numel() for n, p in model.named_parameters()}
    assert not any("frame" in name for name in record["training_parameters"])
    assert record["threads"] == 1
    assert record["torch"] == torch.__version__
    assert {"equiframe", "python", "numpy", "platform", "cpu", "cores", "device", "command"} <= set(record)


def test_the_history_has_a_line_for_each_epoch(finished_run):
    history = RunFolder(finished_run).history()
    assert [r["epoch"] for r in history] == list(range(8))
    for record in history:
        assert {"loss", "lr", "seconds", "images_per_second", "val_top1", "val_macro"} <= set(record)


def test_metrics_hold_every_promised_key(finished_run):
    metrics = RunFolder(finished_run).read_json("metrics.json")
    assert set(MEASURES.split()) <= set(metrics)
    assert metrics["num_train"] == 4 * 22
    assert metrics["num_test"] == 24
    assert metrics["evaluated_on"] == "test"
    assert metrics["temperature_from"] == "validation"
    assert metrics["selected"] == "last epoch"
    assert [c["name"] for c in metrics["classes"]] == ["bright", "dark", "gray", "many words"]
    assert metrics["many"] is None  # no class has more than 100 images
    for name in ("top1", "macro", "medium", "worst", "ece", "nc4"):
        assert 0 <= metrics[name] <= 1, name
    assert metrics["top1"] > 0.8  # brightness is easily learned
    assert metrics["macro"] == pytest.approx(metrics["top1"])  # a balanced test split


def test_the_model_files_rebuild_the_model(finished_run):
    one, card = load_classifier(finished_run)
    torch.manual_seed(123)  # whatever the seed is
    two, _ = load_classifier(finished_run)
    images = torch.randn(5, 3, 12, 12)
    with torch.no_grad():
        assert torch.equal(one(images).logits, two(images).logits)
    assert not one.training
    assert card.class_names == ["bright", "dark", "gray", "many words"]
    assert card.train_counts == [22] * 4
    assert len(card.mean) == len(card.std) == 3
    assert card.temperature > 0


def test_damaged_model_files(finished_run, tmp_path):
    import shutil

    run = tmp_path / "copy"
    description = json.loads((finished_run / "model.json").read_text())
    for name, content, message in (
        ("model.json", "{", "is not a model description"),
        ("model.json", "[1]", "is not a model description"),
        ("model.json", b"\xff\xfe", "is not a model description"),
        ("model.json", json.dumps(description | {"format": 99}), "has format 99; this version reads format 1"),
        ("model.json", json.dumps(description | {"surprise": 1}), "is not a model description"),
        ("model.json", json.dumps(description | {"method_fields": {}}), "is damaged"),
        ("model.json", json.dumps(description | {"width": 8}), "does not fit"),
        ("model.json", json.dumps(description | {"backbone": "mpl"}), "unknown backbone 'mpl'; did you mean 'mlp'"),
        ("model.safetensors", b"junk", "is damaged or does not fit"),
    ):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(finished_run, run)
        (run / "checksums.json").unlink()  # as for files that were put together on purpose
        (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(InputError, match=message):
            load_classifier(run)
    (run / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has not finished training: model\.safetensors is missing"):
        load_classifier(run)
    with pytest.raises(InputError, match="is not a run folder"):
        load_classifier(tmp_path)
