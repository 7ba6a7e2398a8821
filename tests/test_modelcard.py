"""The model card, and classifiers in the Hugging Face Hub's convention. Nothing here reaches a network."""

import importlib
import inspect
import json
import re
import shlex
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml

import equiframe as package
from conftest import write_class
from equiframe.cli import main
from equiframe.errors import InputError
from equiframe.model import Classifier, load_classifier
from equiframe.modelcard import CLASSES_SHOWN, model_page
from equiframe.publish import published_parts


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub in a local folder, in place of the library's network calls; it takes only what the real functions take."""
    root = tmp_path / "hub"
    calls = []

    def like(real, function):
        def call(*arguments, **options):
            bound = inspect.signature(real).bind(
                *([None] if "self" in inspect.signature(real).parameters else []), *arguments, **options
            )
            calls.append((real.__name__, {k: v for k, v in bound.arguments.items() if k != "self"}))
            return function(**calls[-1][1])

        return call

    real = huggingface_hub.HfApi

    class Api:
        def __init__(self, *, token=None):
            self.create_repo = like(real.create_repo, self._create)
            self.upload_folder = like(real.upload_folder, self._upload)

        def _create(self, repo_id, private=None, exist_ok=False):
            if "/" not in repo_id:
                repo_id = f"somebody/{repo_id}"
            (root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
            return huggingface_hub.RepoUrl(f"https://hub.example/{repo_id}", endpoint="https://hub.example")

        def _upload(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)

    def download(repo_id, allow_patterns, **options):
        if not (root / repo_id).is_dir():
            raise FileNotFoundError(f"404 {repo_id}\nsee the Hub")
        target = tmp_path / "cache" / repo_id
        target.mkdir(parents=True, exist_ok=True)
        for file in (root / repo_id).iterdir():
            if file.name in allow_patterns:
                shutil.copy(file, target)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", like(huggingface_hub.snapshot_download, download))
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    root.mkdir()
    return root, calls


def same_weights(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


# --- folders and the Hub ----------------------------------------------------------------------------------------------


def test_save_and_load_a_folder(finished_run, tmp_path):
    model = Classifier.from_pretrained(finished_run)
    assert package.Classifier is Classifier
    assert not model.training
    folder = model.save_pretrained(tmp_path / "deep" / "pets")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    again = Classifier.from_pretrained(str(folder))
    assert again.card == model.card == load_classifier(finished_run)[1]
    assert same_weights(again, model)
    assert "Nothing was measured" in (folder / "README.md").read_text()
    assert (folder / "config.json").read_bytes() == (finished_run / "model.json").read_bytes()


def test_push_and_pull(finished_run, hub):
    root, calls = hub
    model, page = published_parts(finished_run)
    where = model.push_to_hub("me/pets", private=True, commit_message="first", **page)
    assert where == "https://hub.example/me/pets"
    assert [name for name, _ in calls] == ["create_repo", "upload_folder"]
    assert calls[0][1]["private"] is True
    assert calls[1][1]["commit_message"] == "first"
    again = Classifier.from_pretrained("me/pets", revision="main", local_files_only=False)
    assert same_weights(again, model)
    assert calls[2][1]["revision"] == "main"
    assert sorted(p.name for p in (root / "me" / "pets").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    with pytest.raises(InputError, match=r"the Hub did not give it: FileNotFoundError: 404 me/none see the Hub$"):
        Classifier.from_pretrained("me/none")
    for path in ("./none", "/none/at/all", "a/b/c", "../x"):
        with pytest.raises(InputError, match="no such folder"):
            Classifier.from_pretrained(path)


def test_the_command(finished_run, hub, tmp_path, capsys):
    root, _ = hub
    assert main(["push", str(finished_run), "me/pets", "--license", "mit", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"pushed": "https://hub.example/me/pets"}
    assert main(["push", str(finished_run), "me/pets", "--license", "mit", "--out", str(tmp_path / "look")]) == 0
    assert capsys.readouterr().err == f"written to {tmp_path / 'look'}\n"
    for name in ("README.md", "config.json", "model.safetensors"):
        assert (tmp_path / "look" / name).read_bytes() == (root / "me" / "pets" / name).read_bytes()
    write_class(tmp_path / "new", 3, 2, start=900)
    outputs = []
    for run in (finished_run, tmp_path / "look"):  # a published folder stands for a run
        assert main(["predict", str(run), str(tmp_path / "new"), "--device", "cpu"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    for arguments, message in (
        ([str(finished_run)], "give a REPO"),
        ([str(tmp_path), "me/pets"], "is not a run folder: model.safetensors is missing"),
        ([str(finished_run), "--out", str(finished_run)], "holds a run"),
    ):
        assert main(["push", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_without_the_library(finished_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["push", str(finished_run), "me/pets"]) == 2
    assert "pushing to me/pets needs huggingface_hub: pip install 'equiframe[hub]'" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"no folder me/pets exists, and asking the Hub needs"):
        Classifier.from_pretrained("me/pets")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(InputError, match="needs pyyaml"):
        Classifier.from_pretrained(finished_run).save_pretrained(tmp_path / "x")


def test_the_hub_refuses(finished_run, monkeypatch):
    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, *arguments, **options):
            raise PermissionError("401\nno token")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(InputError, match=r"me/pets could not be pushed: PermissionError: 401 no token$"):
        Classifier.from_pretrained(finished_run).push_to_hub("me/pets")


def test_a_classifier_without_a_card(finished_run, tmp_path):
    model = Classifier.from_pretrained(finished_run)
    built = Classifier(model.backbone, model.head)
    with pytest.raises(InputError, match="has no card"):
        built.save_pretrained(tmp_path / "x")
    built.card = model.card
    assert same_weights(Classifier.from_pretrained(built.save_pretrained(tmp_path / "x")), model)


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(finished_run):
    model, page = published_parts(finished_run)
    return asdict(model.card), page


def test_front_matter_as_the_hub_reads_it(parts):
    description, page = parts
    card = huggingface_hub.ModelCard(model_page("me/pets", description, **page, license="mit"))
    assert card.data.library_name == "equiframe"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.license == "mit"
    results = {r.metric_type: r for r in card.data.eval_results}
    assert results["accuracy"].metric_value == round(page["metrics"]["top1"], 4)
    assert results["balanced_accuracy"].metric_value == round(page["metrics"]["macro"], 4)
    assert results["accuracy"].dataset_name == "pets"
    assert results["accuracy"].dataset_split == "test"
    plain = yaml.safe_load(model_page("x", description).split("---")[1])
    assert set(plain) == {"library_name", "pipeline_tag", "tags"}
    assert yaml.safe_load(model_page("x", description, data="hf:zoo/pets:small").split("---")[1])["datasets"] == [
        "zoo/pets"
    ]


def test_every_number_is_that_of_the_run(finished_run, parts):
    description, page = parts
    text = model_page("pets", description, **page)
    metrics = json.loads((finished_run / "metrics.json").read_text())
    assert f"| all images (top-1) |  | {100 * metrics['top1']:.1f} |" in text
    assert f"| **{100 * metrics['macro']:.1f}** |" in text
    assert "few: fewer than 20" not in text  # 22 images a class train: all are medium
    assert f"| medium: 20 to 100 | 4 | {100 * metrics['medium']:.1f} |" in text
    assert f"softmax(logits / {metrics['temperature']:.3g})" in text
    for row in metrics["classes"]:
        assert f"| {row['name']} | {row['num_train']} | {row['num_test']} | {100 * row['accuracy']:.1f} |" in text
    assert "4 classes had fewer than 20 test images" in text
    assert "epochs 8" in text


def test_no_path_of_this_machine(finished_run, tmp_path):
    model, page = published_parts(finished_run)
    folder = model.save_pretrained(tmp_path / "pets", **page)
    for file in folder.iterdir():
        assert str(finished_run.parent).encode() not in file.read_bytes()


def test_its_code_runs(finished_run, parts, tmp_path, monkeypatch, capsys):
    _, page = parts
    folder = Classifier.from_pretrained(finished_run).save_pretrained(tmp_path / "pets", **page)
    write_class(tmp_path / "photos", 1, 2)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    exec(code, {})
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_limits_follow_from_the_numbers(parts):
    description, page = parts
    assert "had fewer than 20 training images" not in model_page("x", description, **page)
    worse = {**page["metrics"], "evaluated_on": "validation", "temperature_from": "train"}
    worse["classes"] = [
        {**row, "num_test": 0, "accuracy": None} if i == 1 else row for i, row in enumerate(worse["classes"])
    ]
    text = model_page(
        "x",
        {**description, "train_counts": [500, 60, 3, 1]},
        **{**page, "metrics": worse, "recipe": {"imbalance": 50.0}},
    )
    for point in (
        "2 of 4 classes had fewer than 20 training images", "1 class had no image in the test", "those of the validation images",
        "probabilities are too confident", "cut to a long tail on purpose", "(imbalance ratio 500)",
    ):  # fmt: skip
        assert point in text, point


def test_names_are_text_not_markup(parts):
    description, page = parts
    evil = "</td>|<script>alert(1)</script>\n# x `y` *z* [a](b)"
    names = [evil, *description["class_names"][1:]]
    rows = [{**row, "name": names[i]} for i, row in enumerate(page["metrics"]["classes"])]
    text = model_page(
        evil, {**description, "class_names": names}, **{**page, "metrics": {**page["metrics"], "classes": rows}}
    )
    body = text.split("\n---\n")[1]
    assert "<script>" not in body
    assert "[a](b)" not in body
    assert sum(line.startswith("# ") for line in body.splitlines()) == 1
    assert yaml.safe_load(text.split("---\n")[1])["model-index"][0]["name"] == evil


def test_many_classes(parts):
    description, _ = parts
    num = 300
    many = {**description, "class_names": [f"c{k}" for k in range(num)], "train_counts": list(range(num, 0, -1))}
    text = model_page("x", many)
    assert len(re.findall(r"\n\| c\d", text)) == CLASSES_SHOWN
    assert "| c299 | 1 |" in text
    assert f"The {CLASSES_SHOWN} smallest of 300 classes" in text


def test_importing_the_package_needs_none_of_it():
    module = importlib.import_module("equiframe.model")
    assert not hasattr(module, "yaml")
    assert Path(module.__file__).name == "model.py"


def test_a_hub_folder_that_nobody_wrote(finished_run, tmp_path):
    folder = Classifier.from_pretrained(finished_run).save_pretrained(tmp_path / "x")
    card = load_classifier(finished_run)[1]
    for change in ({"backbone": "resnet21"}, {"width": 17}, {"class_names": ["a", "b"], "train_counts": [1, 1]}):
        (folder / "config.json").write_text(replace(card, **change).to_json())
        with pytest.raises(InputError):
            Classifier.from_pretrained(folder)


# --- docs/deploy.md ---------------------------------------------------------------------------------------------------


def test_every_block_of_the_page_runs(finished_run, hub, tmp_path, monkeypatch, capsys):
    """In order, on a run called runs/pets and two images in photos/."""
    from equiframe.export import WRITERS, write_onnx

    known = []  # one graph for float32 and int8: two seconds saved
    monkeypatch.setitem(
        WRITERS, "onnx", lambda *model: known[0] if known else known.append(write_onnx(*model)) or known[0]
    )
    shutil.copytree(finished_run, tmp_path / "runs" / "pets")
    write_class(tmp_path / "photos", 3, 2)
    (tmp_path / "photos" / "000.png").rename(tmp_path / "photos" / "a.png")
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs" / "deploy.md").read_text()
    commands = 0
    for language, block in re.findall(r"```(\w+)\n(.*?)```", text, re.S):
        if language == "python":
            exec(block, {})
            assert capsys.readouterr().out
        for line in block.splitlines() if language == "sh" else ():
            words = shlex.split(line, comments=True)
            assert words[0] == "equiframe"
            assert main([*words[1:], "--quiet"]) == 0, capsys.readouterr().err
            commands += 1
    assert commands == 9
    for file in ("model.onnx", "model.int8.onnx", "model.pt2", "exported.safetensors"):
        assert (tmp_path / "runs" / "pets" / file).is_file()
    assert main(["export", "card", "--format", "safetensors", "--images", "0", "--quiet"]) == 0
