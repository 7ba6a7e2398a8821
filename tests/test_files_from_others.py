"""What other people made: images that cannot be read, checkpoints, models, lists and recipes that nobody should trust."""

import json
import os
import pickle
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from conftest import tiny_fields, write_class
from equiframe import files
from equiframe.cli import main
from equiframe.collapse.files import load_features
from equiframe.data.dataset import Dataset, ImageSet
from equiframe.data.lists import read_list
from equiframe.data.prepare import _indices_from_manifest, indices_hash, prepare_data
from equiframe.errors import InputError
from equiframe.model import ModelCard, load_classifier
from equiframe.recipe import Recipe, load_recipe
from equiframe.runs import RunFolder, as_npz
from equiframe.train import train

# --- data -------------------------------------------------------------------------------------------------------------


def test_bad_images_are_skipped_and_listed(class_folder, tmp_path, monkeypatch, capsys, finished_run):
    root = class_folder({"cat": 20, "dog": 20}, test={"cat": 4, "dog": 4})
    for name in ("train/cat/003.png", "train/dog/000.png", "test/dog/501.png"):
        (root / name).write_bytes((root / name).read_bytes()[:100])
    for mode in ("resident", "stream"):
        fields = Recipe(**tiny_fields(data=str(root), batch_size=4, width=4, data_mode=mode))
        with pytest.raises(InputError, match="truncated or damaged"):
            train(fields, tmp_path / mode)
        said = []
        metrics = train(fields.with_(on_bad_image="skip"), tmp_path / mode, say=said.append)
        assert metrics["num_test"] == 7
        skipped = RunFolder(tmp_path / mode).read_json("split.json")["skipped"]
        assert {split: len(reasons) for split, reasons in skipped.items() if split == "test"} == {"test": 1}
        assert sum(map(len, skipped.values())) == 3
        assert any("skipped 1 test image that cannot be read" in line and "501.png" in line for line in said)
    assert main(["predict", str(finished_run), str(root / "test"), "--on-bad-image", "skip", "--device", "cpu"]) == 0
    out, error = capsys.readouterr()
    assert len(out.splitlines()) == 1 + 7
    assert "dog/501.png" not in out
    assert "501.png" in error
    assert "skipped 1 of 8 images" in error


def test_the_same_file_in_training_and_test_is_told(class_folder):
    root = class_folder({"cat": 8, "dog": 8}, test={"cat": 2, "dog": 2})
    fields = Recipe(**tiny_fields(data=str(root), validation=0))
    said = []
    prepare_data(fields, said.append)
    assert not any("to the byte" in line for line in said)
    shutil.copy(root / "train" / "cat" / "001.png", root / "test" / "cat" / "500.png")
    prepare_data(fields, said.append)
    assert any("1 test image is a training image to the byte (test/cat/500.png is train/cat/001.png)" in line
               for line in said)  # fmt: skip


# --- files that nobody should trust -----------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_a_malicious_checkpoint_runs_nothing(recipe, data, stopped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(stopped, "run")
    (Path("run") / "checksums.json").unlink()
    (Path("run") / "checkpoints" / "previous.pt").unlink()
    last = Path("run") / "checkpoints" / "last.pt"
    for write in (lambda: torch.save(Evil(), last), lambda: last.write_bytes(pickle.dumps(Evil()))):
        write()
        with pytest.raises(InputError, match=r"last\.pt cannot be read"):
            train(recipe.with_(epochs=3), "run", data=data, resume=True)
        assert not os.path.exists("hacked")
    torch.load(last, weights_only=False) if zipfile.is_zipfile(last) else pickle.loads(last.read_bytes())
    assert os.path.exists("hacked")  # it is malicious indeed


def test_a_zip_bomb_as_checkpoint(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    with zipfile.ZipFile(tmp_path / "run" / "checkpoints" / "last.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 24))
    (tmp_path / "run" / "checkpoints" / "previous.pt").unlink()
    with pytest.raises(InputError, match="would unpack to more than it holds"):
        RunFolder(tmp_path / "run").load_checkpoint()


def test_a_zip_bomb_as_arrays(whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "checksums.json").unlink()
    np.savez_compressed(tmp_path / "run" / "predictions.npz", labels=np.zeros(1 << 22))
    monkeypatch.setattr("equiframe.runs.ARRAYS_LIMIT", 1 << 20)
    with pytest.raises(InputError, match=r"would unpack to 33,554,.* bytes; refused"):
        RunFolder(tmp_path / "run").read_arrays("predictions.npz")


@pytest.mark.parametrize(
    ("at", "value"), [(8, 12), (8, 14), (8, 99), (6, 1)], ids=["bzip2", "lzma", "no such method", "encrypted"]
)
def test_arrays_packed_in_another_way(tmp_path, at, value):
    """Found by fuzzing: compression methods and flags that zipfile answers with errors of its own."""
    content = bytearray(as_npz({"labels": np.arange(4)}))
    for start in (
        0,
        content.rindex(b"PK\1\2") + 2,
    ):  # the local header and the directory, which has two bytes more in front
        content[start + at] = value
    (tmp_path / "predictions.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"predictions\.npz is damaged"):
        RunFolder(tmp_path).read_arrays("predictions.npz")


def test_archives_of_what_is_no_array(tmp_path):
    """Found by fuzzing: NumPy hands out other members of an archive as bytes."""
    with zipfile.ZipFile(tmp_path / "predictions.npz", "w") as archive:
        archive.writestr("features.npy", b"no array")
        archive.writestr("labels", b"nor this")
    for read in (
        lambda: RunFolder(tmp_path).read_arrays("predictions.npz"),
        lambda: load_features(tmp_path / "predictions.npz"),
    ):
        with pytest.raises(InputError, match=r"predictions\.npz is (damaged|not a NumPy archive)"):
            read()


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret"])
def test_a_table_of_checksums_stays_in_its_folder(stopped, tmp_path, name):
    shutil.copytree(stopped, tmp_path / "run")
    (tmp_path / "secret").write_text("x")
    (tmp_path / "run" / "checksums.json").write_text(json.dumps({name: ["00", "11"]}))
    for read in (RunFolder(tmp_path / "run").verify, lambda: files.settle_checksums(tmp_path / "run")):
        with pytest.raises(InputError, match="is outside the folder"):
            read()


@pytest.fixture
def model(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "model")
    (tmp_path / "model" / "checksums.json").unlink()
    return tmp_path / "model"


@pytest.mark.parametrize("change", [
    {"width": 10**9}, {"width": "8"}, {"image_size": 10**6}, {"image_size": 4096}, {"class_names": "ab"},
    {"class_names": ["a", 1]}, {"train_counts": [1]}, {"train_counts": [-1] * 10}, {"mean": [0, 0]}, {"std": [0, 1, 1]},
    {"std": None}, {"mean": [float("nan")] * 3}, {"method_fields": []}, {"method_fields": {"head": "../x"}},
    {"backbone": 3}, {"backbone": "timm:hf-hub:evil/model"}, {"backbone": "timm:local-dir:/"}, {"temperature": 0},
    {"centre_crop": "1"}, {"format": 2}, {"surprise": 1}, {"class_names": [], "train_counts": []},
], ids=str)  # fmt: skip
def test_a_description_that_nobody_wrote(model, change):
    card = json.loads((model / "model.json").read_text())
    (model / "model.json").write_text(json.dumps(card | change))
    with pytest.raises(InputError):
        load_classifier(model)


def test_sizes_have_limits(model, monkeypatch):
    with open(model / "model.json", "ab") as file:
        file.truncate(1 << 30)  # a sparse file: nothing is written, and nothing must be read
    with pytest.raises(InputError, match=r"model\.json has 1,073,741,824 bytes; at most"):
        load_classifier(model)
    for name, read in {
        "split.json": lambda: _indices_from_manifest(str(model / "split.json"), None),
        "metrics.json": lambda: RunFolder(model).read_json("metrics.json"),
        "history.jsonl": RunFolder(model).history,
        "checksums.json": lambda: files.read_checksums(model),
    }.items():
        with open(model / name, "ab") as file:
            file.truncate(1 << 30)
        with pytest.raises(InputError, match=rf"{name} has 1,073,741,824 bytes; at most"):
            read()
    with open(model / "recipe.yaml", "ab") as file:
        file.truncate(1 << 30)
    with pytest.raises(InputError, match=r"recipe\.yaml has 1,073,741,824 bytes; at most"):
        load_recipe(model / "recipe.yaml")


def test_tensors_of_another_shape_or_kind(model):
    weights = {
        k: v.clone() for k, v in load_file(model / "model.safetensors").items()
    }  # not the file, which is written anew
    name = next(name for name, value in weights.items() if value.ndim == 2)
    for value in (weights[name][:1].clone(), weights[name].double(), weights[name].to(torch.int64)):
        save_file(weights | {name: value}, model / "model.safetensors")
        with pytest.raises(InputError, match="damaged or does not fit"):
            load_classifier(model)
    for header in (b"\xff" * 8, (1 << 40).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]"):
        (model / "model.safetensors").write_bytes(header + bytes(10_000))
        with pytest.raises(InputError, match="damaged or does not fit"):
            load_classifier(model)


@pytest.mark.parametrize("positions", [[10**6], [-1], [[0, 1]], [], ["a"], [1e300], [10**30]], ids=str)
def test_positions_that_are_not_in_the_data(tmp_path, positions):
    images = ImageSet(np.zeros(3, np.int64), ["a", "b", "c"], sources=[b"", b"", b""])
    dataset = Dataset("d", ["x", "y"], images)
    try:
        mark = indices_hash(np.array(positions, dtype=np.int64), np.zeros(0))
    except (ValueError, OverflowError):
        mark = ""
    manifest = {"train": positions, "val": None, "hash": mark, "fingerprint": dataset.fingerprint()}
    (tmp_path / "split.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError):
        _indices_from_manifest(str(tmp_path / "split.json"), dataset)


def test_a_list_that_points_elsewhere_shows_nothing(tmp_path, capsys):
    """A path that leaves the folder is only ever read as an image; what it holds is not told."""
    write_class(tmp_path / "data" / "a", 0, 4)
    (tmp_path / "secret.txt").write_text("the password")
    (tmp_path / "data" / "train.txt").write_text("../secret.txt 0\na/000.png 1\na/001.png 0\na/002.png 1\n")
    code = main(["train", str(tmp_path / "data" / "train.txt"), "--out", str(tmp_path / "run"), "--validation", "0.5"])
    said = capsys.readouterr()
    assert code == 2
    assert "password" not in said.out + said.err
    assert not (tmp_path / "run").exists()


def test_class_names_in_html_are_text(tmp_path, class_folder):
    from equiframe.report import find_runs, write_report

    evil = [
        "<script>alert(1)<",
        "<img src=x onerror=document.title='hacked'>",
        "<script>document.title='hacked'<",
        "$\\frac{$",
    ]
    root = class_folder({name.replace("/", ""): 8 for name in evil})
    train(Recipe(**tiny_fields(data=str(root), batch_size=4, validation=0.5)), tmp_path / "run")
    page = write_report(find_runs([tmp_path / "run"]), tmp_path / "page.html").read_text()
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)&lt;" in page
    if shutil.which("chromium"):  # a browser that runs none of it shows the names, and its own title
        done = subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
             "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
             "--dump-dom", (tmp_path / "page.html").as_uri()],
            capture_output=True, text=True, timeout=90, check=True,
        )  # fmt: skip
        assert "hacked" not in done.stdout.partition("</title>")[0]
        assert "&lt;script&gt;document.title='hacked'&lt;" in done.stdout
        assert "CONSOLE" not in done.stderr


# --- whatever the text --------------------------------------------------------------------------------------------------

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
YAML = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(
    ["epochs: ", "!!int ", "!!timestamp ", "!!float ", "&a ", "*a", "[", "]", "{", "}", ": ", "\n", "- ", "1_0", "2001-99-99",
     "'", '"', "? ", "<<: ", "|", "lr: .nan", "data: x", "9" * 5000, "\t", "%", "!!binary ", "seed: 0o7", "~"]),
    max_size=12).map("".join))  # fmt: skip
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
                    max_leaves=8)  # fmt: skip


def only_input_errors(read, *arguments):
    said = ""
    try:
        read(*arguments)
    except InputError as error:
        said = str(error)
    assert len(said) < 20_000


@FEW
@given(YAML)
def test_any_recipe(tmp_path, text):
    (tmp_path / "r.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    only_input_errors(lambda: Recipe(**load_recipe(tmp_path / "r.yaml")))


def test_recipes_made_to_hurt(tmp_path):
    laughs = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    laughs = "class_counts: &a0 [1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
        f"{name}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i, name in enumerate(
            ["epochs", "seed", "width", "sam", "lr", "ema", "tau", "head", "loss", "norm", "length"]))  # fmt: skip
    for text in (laughs, "[" * 50_000, "epochs: !!int ''", "lr: !!timestamp x", "seed: " + "9" * 5000):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(InputError) as caught:
            Recipe(**load_recipe(tmp_path / "r.yaml"))
        assert len(str(caught.value)) < 20_000


@FEW
@given(
    st.binary(max_size=80)
    | st.lists(st.sampled_from([b"a.png 0\n", b"a b 1", b"\n", b"\xff 2\n", b" ", b"-1"])).map(b"".join)
)
def test_any_list(tmp_path, text):
    (tmp_path / "l.txt").write_bytes(text)
    only_input_errors(read_list, tmp_path / "l.txt")


@FEW
@given(JSON | st.fixed_dictionaries({name: JSON for name in ("train", "val", "hash", "fingerprint")}))
def test_any_split(tmp_path, value):
    (tmp_path / "split.json").write_text(json.dumps(value))
    dataset = Dataset("d", ["x", "y"], ImageSet(np.zeros(3, np.int64), ["a", "b", "c"], sources=[b"", b"", b""]))
    only_input_errors(_indices_from_manifest, str(tmp_path / "split.json"), dataset)


GOOD_CARD = {"backbone": "mlp", "width": 8, "image_size": 8, "class_names": ["a", "b"], "train_counts": [2, 1],
             "mean": [0.5] * 3, "std": [0.5] * 3, "method": "ce", "method_fields": {}}  # fmt: skip


@FEW
@given(st.binary(max_size=60) | JSON.map(lambda v: json.dumps(v).encode()) | st.builds(
    lambda name, value: json.dumps(GOOD_CARD | {name: value}).encode(), st.sampled_from(sorted(GOOD_CARD)), JSON))  # fmt: skip
def test_any_description(text):
    only_input_errors(ModelCard.from_json, text, "model.json")
    only_input_errors(ModelCard.from_json, b"[" * 100_000, "model.json")
