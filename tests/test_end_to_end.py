"""From files on disk to a finished run, its measures and its predictions, by the command line."""

import csv
import json
from pathlib import Path

import pytest

from conftest import encoded, picture, tiny_flags
from equiframe.cli import main
from equiframe.cli.flags import default_out
from equiframe.imbalance import class_profile
from equiframe.recipe import Recipe
from equiframe.train import train

pytestmark = pytest.mark.usefixtures("plain_pages")


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    out, error = capsys.readouterr()
    assert code == 0, error
    return out


def test_large_images_by_list_streamed_through_a_timm_backbone(tmp_path, capsys):
    """JPEGs of different sizes, a long tail of 4 classes, lists as ImageNet-LT has them; train, evaluate, predict."""
    counts = {"train": (32, 16, 8, 4), "val": (2, 2, 2, 2), "test": (3, 3, 3, 3)}
    for split, of_class in counts.items():
        lines = []
        for k, count in enumerate(of_class):
            for i in range(count):
                name = f"{'val' if split == 'test' else 'train'}/n{k:08d}/{split}_{i}.JPEG"
                (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
                jpeg = encoded(picture(k, i, (120 + 8 * (i % 3), 104)), "JPEG")
                (tmp_path / "images" / name).write_bytes(jpeg)
                lines.append(f"{name} {k}\n")
        (tmp_path / "lists").mkdir(exist_ok=True)
        (tmp_path / "lists" / f"Pets_LT_{split}.txt").write_text("".join(lines))
    flags = tiny_flags(
        data=tmp_path / "lists", data_root=tmp_path / "images", data_mode="stream", image_size=96, batch_size=10,
        backbone="timm:test_resnet", method="etf-dr-balanced", out=tmp_path / "run",
    )  # fmt: skip
    flags = flags[: (i := flags.index("--width"))] + flags[i + 2 :]
    metrics = json.loads(run(capsys, "train", *flags, "--quiet", "--json"))
    assert (metrics["num_train"], metrics["num_test"], metrics["evaluated_on"]) == (60, 12, "test")
    assert metrics["temperature_from"] == "validation"
    assert [c["name"] for c in metrics["classes"]] == [f"n{k:08d}" for k in range(4)]
    assert [c["num_train"] for c in metrics["classes"]] == [32, 16, 8, 4]

    again = json.loads(run(capsys, "evaluate", tmp_path / "run", "--json", "--device", "cpu"))
    assert again == {name: metrics[name] for name in again}
    (tmp_path / "images").rename(tmp_path / "moved")
    moved = ("--data-root", tmp_path / "moved", "--device", "cpu")
    assert json.loads(run(capsys, "evaluate", tmp_path / "run", "--json", *moved)) == again
    table = run(capsys, "predict", tmp_path / "run", tmp_path / "moved" / "val", "--top", 2, "--device", "cpu")
    rows = list(csv.DictReader(table.splitlines()))
    assert len(rows) == 12
    assert {row["class"] for row in rows} <= {f"n{k:08d}" for k in range(4)}
    right = sum(row["class"] in row["image"] for row in rows)
    assert right / 12 == metrics["top1"]


def test_the_folder_that_a_run_gets(tmp_path):
    (tmp_path / "Pets_LT_train.txt").write_text("a.jpg 0\n")
    for data, name in (
        (str(tmp_path / "Pets_LT_train.txt"), "Pets_LT_train-r10-ce"),
        ("imagenet-lt", "imagenet-lt-r10-ce"),
        ("hf:zoo/pets:small", "pets-small-r10-ce"),
    ):
        assert default_out(Recipe(data=data, imbalance=10), "ce") == Path("runs") / name


def test_a_hundred_classes_at_ratio_100(tmp_path, tiny, balanced_100):
    recipe = tiny(data=str(balanced_100), imbalance=100, validation=0.0, width=100, track="none")
    metrics = train(recipe, tmp_path / "run")
    assert (metrics["num_train"], metrics["num_test"]) == (sum(class_profile(100, 500, 100)), 5000)
    assert metrics["top1"] > 0.02  # chance is 0.01
