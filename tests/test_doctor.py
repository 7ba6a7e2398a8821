"""equiframe doctor: what it finds is what is there, what it says follows from it, and it changes nothing."""

import io
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from conftest import encoded, picture, tiny_fields, tiny_flags, write_class
from equiframe.cli import main
from equiframe.cli.doctor import ROWS, bar, duration, print_report, quantity
from equiframe.data.sources import load_dataset
from equiframe.doctor import data_on_the_command_line, diagnose, timing
from equiframe.doctor.advice import EVIDENCE, advise, find_problems
from equiframe.doctor.images import describe_data, look_at
from equiframe.doctor.machine import EXTRAS, describe_machine, matrix_speed
from equiframe.doctor.timing import time_training
from equiframe.recipe import Recipe

RESULTS = Path(__file__).parents[1] / "docs" / "results.md"


@pytest.fixture(scope="module")
def sick(tmp_path_factory):
    """Class folders in which everything is wrong that can be; what exactly is told in `test_what_is_there`."""
    root = tmp_path_factory.mktemp("sick") / "pets"
    for k, (name, count) in enumerate({"ant": 130, "bee": 25, "cat": 9, "dog": 1}.items()):
        write_class(root / "train" / name, k, count)
        write_class(root / "test" / name, k, {"ant": 30, "bee": 5, "cat": 2}.get(name, 0), start=500)
    train, test = root / "train", root / "test"
    shutil.copy(train / "ant" / "003.png", train / "ant" / "again.png")  # twice in its class
    shutil.copy(train / "ant" / "004.png", train / "bee" / "other.png")  # under two classes
    shutil.copy(train / "bee" / "000.png", test / "bee" / "shared.png")  # in training and test
    (train / "cat" / "bad.png").write_bytes(encoded(picture(2, 99))[:80])
    (test / "ant" / "bad.jpg").write_text("no image")
    picture(1, 77, (60, 20)).convert("L").save(train / "bee" / "gray.png")
    picture(1, 78, (14, 30)).convert("RGBA").save(train / "bee" / "clear.png")
    return root


@pytest.fixture(scope="module")
def facts(sick):
    recipe = Recipe(**tiny_fields(data=str(sick)))
    return describe_data(recipe, load_dataset(str(sick)), images=0)


def test_what_is_there(facts):
    found, readable, numbers = facts
    assert found["class_names"] == ["ant", "bee", "cat", "dog"]
    whole = np.array(found["counts"]) + found["validation_counts"]
    assert whole.tolist() == [131, 28, 10, 1]  # "bad.png" counts: training would find it
    assert found["test_counts"] == [31, 6, 2, 0]
    assert numbers == (sum(found["counts"]), sum(found["validation_counts"]), 39)
    assert found["ratio"] == max(found["counts"]) / 1
    assert sum(map(len, found["unreadable"].values())) == 2
    assert "bad.jpg" in found["unreadable"]["test"][0]
    assert len(readable) == numbers[0] - len(found["unreadable"].get("training", []))
    assert found["problem"] is None


def test_duplicates(sick):
    """All images train, so that no validation split takes one of a pair."""
    recipe = Recipe(**tiny_fields(data=str(sick), validation=0))
    found, *_ = describe_data(recipe, load_dataset(str(sick)), images=0)
    assert found["duplicates"] == {
        "same_class": [("train/ant/003.png", "train/ant/again.png")],
        "two_classes": [("train/ant/004.png", "train/bee/other.png")],
        "train_and_test": [("train/bee/000.png", "test/bee/shared.png")],
    }
    assert found["sizes"]["width"] == {"least": 12, "median": 12, "most": 60}
    assert found["sizes"]["height"]["most"] == 30
    assert found["sizes"]["long"] == 2
    assert not found["sizes"]["alike"]
    assert found["modes"] == {"RGB PNG": 167, "L PNG": 1, "RGBA PNG": 1}


def test_a_part_is_looked_at(sick):
    images = load_dataset(str(sick)).train
    looked = look_at(images, at_most=10)
    assert len(looked.positions) == len(looked.digests) == 10
    assert looked.positions[0] == 0
    assert looked.positions[-1] == len(images) - 1
    assert len(look_at(images, at_most=0).positions) == len(images)
    digits = load_dataset("digits").train
    looked = look_at(digits, at_most=5)
    assert looked.modes == ["RGB pixels"] * 5
    assert looked.sizes[0] == (8, 8)


def test_problems_follow_from_the_facts(facts):
    found, *_ = facts
    problems = find_problems(
        found
        | {"duplicates": {"same_class": [("a", "b")], "two_classes": [("c", "d")], "train_and_test": [("e", "f")]}}
    )
    told = {
        level: "\n".join(p["text"] for p in problems if p["level"] == level) for level in ("error", "warning", "note")
    }
    assert [p["level"] for p in problems] == sorted(
        (p["level"] for p in problems), key=("error", "warning", "note").index
    )
    assert "1 of 39 test images cannot be read" in told["error"]
    assert "--on-bad-image skip" in told["error"]
    for text in (
        "under two classes, such as d and c", "test image is a training image to the byte, such as f and e",
        "has a single training image, and none for validation: dog", "has no test image and would not count: dog",
    ):  # fmt: skip
        assert text in told["warning"]
    for text in (
        "1 of 4 classes have 2 to 19 training images",
        "twice in their class",
        "2 classes have fewer than 20 test images",
    ):
        assert text in told["note"]
    healthy = found | {
        "unreadable": {}, "counts": [100, 50], "class_names": ["a", "b"], "validation_counts": None, "test_counts": [30, 30], "sizes": {}, "modes": {"RGB PNG": 3},
        "duplicates": {key: [] for key in found["duplicates"]},
    }  # fmt: skip
    assert find_problems(healthy) == []
    (part,) = find_problems(healthy | {"looked_at": {"training": 5}, "numbers": {"training": 9}})
    assert part["text"].startswith("looked at 5 of 9 training images")
    alone = healthy | {"counts": [100, 1]}
    assert "has a single training image" in find_problems(alone)[0]["text"]
    assert not any(
        "single" in p["text"] for p in find_problems(alone | {"validation_counts": [11, 1]})
    )  # one was held out
    (stop,) = find_problems(healthy | {"problem": "too small"})
    assert stop == {"level": "error", "text": "too small"}


# --- advice -----------------------------------------------------------------------------------------------------------


def test_the_evidence_is_that_of_the_results_page():
    """Every number of `EVIDENCE` stands in the table under its heading, in the row of its method, with its number of seeds."""
    text = RESULTS.read_text()
    for evidence in EVIDENCE:
        section = re.search(rf"## {re.escape(evidence.data)}\n(.*?)(\n## |\Z)", text, re.S)[1]
        rows = [
            [cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")
        ]
        macro = rows[0].index("macro")
        table = {row[0].strip("`"): (int(row[1]), float(row[macro].split()[0])) for row in rows[2:]}
        for method, value in evidence.macro.items():
            assert table[method][1] == value, (evidence.data, method)
        assert evidence.seeds == min(table[method][0] for method in evidence.macro)


def test_commands_name_the_data_as_it_was_asked_for():
    asked = Recipe(data="my photos", imbalance=50.0, class_counts=None, validation=0.0, draft=not Recipe().draft)
    draft = "--draft" if asked.draft else "--no-draft"
    assert data_on_the_command_line(asked) == f"'my photos' --imbalance 50 --validation 0 {draft}"
    assert data_on_the_command_line(Recipe(data="digits", class_counts=(50, 20, 5))) == "digits --class-counts 50,20,5"
    assert data_on_the_command_line(Recipe(data="digits", split="runs/v1.0")) == "digits --split runs/v1.0"


@pytest.mark.parametrize(
    ("counts", "dim", "method", "decided", "told"),
    [
        ([100, 5], 64, "etf-mix-blend", True, "ahead of the best tuned baseline"),
        ([500, 50] * 5, 64, "etf-mix-blend", True, "ahead of the best tuned baseline"),
        ([500, 50] * 6, 64, "etf-mix-blend", False, "they fit in a simplex. On"),
        (
            [500, 5] * 100,
            64,
            "etf-mix-blend",
            True,
            "more than a simplex holds (K > D+1 = 65); the default takes the features to K-1",
        ),
        ([500, 5] * 32 + [5], 64, "etf-mix-blend", False, "they fit in a simplex. On"),
        ([500, 5] * 101, 64, "etf-mix-blend", False, "Nothing like your data was measured"),
        ([500, 5] * 600, 64, "etf-mix-blend", False, "(K > D+1 = 65). On"),
        ([100, 99, 90], 64, "ce", False, "nearly balanced"),
    ],
)
def test_advice(counts, dim, method, decided, told):
    advice = advise(counts, dim, "photos")
    assert (advice["method"], advice["decided"]) == (method, decided)
    assert told in advice["why"]
    assert ("does not decide" in advice["why"]) != decided
    assert (RESULTS.parents[1] / advice["source"]).is_file()
    assert bool(advice["evidence"]) == ("balanced (" not in advice["why"])
    from equiframe.method import METHODS

    for command in advice["commands"]:
        methods = command.split("--method")[1].split()
        assert set(methods[1 if methods[0] == "s" else 0].split(",")) <= METHODS.keys()


# --- measures ---------------------------------------------------------------------------------------------------------


def test_the_machine():
    machine = describe_machine("cpu")
    assert machine["torch"] == torch.__version__
    assert machine["cores"] == os.cpu_count()
    assert machine["disk_free_bytes"] > 0
    assert machine["gpu"] is None
    assert not machine["packages"].keys() & machine["missing"].keys()
    assert machine["packages"].keys() | machine["missing"].keys() == EXTRAS.keys()
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    for name, extra in EXTRAS.items():  # the extras that it names bring what it says
        assert re.search(rf'^{extra} = \[.*?"{name}>', text, re.S | re.M), name


def test_matrix_speed():
    speed = matrix_speed(torch.device("cpu"), seconds=0.01)
    assert 1e8 < speed < 1e14


def test_the_time_adds_up(tiny):
    recipe = tiny(epochs=7, batch_size=32)
    dataset = load_dataset("digits")
    before = torch.get_rng_state()
    found = time_training(recipe, dataset, dataset.train, (1132, 126, 539), seconds=2.0)
    assert torch.equal(before, torch.get_rng_state())
    assert found["steps"] == 7 * (1132 // 32)
    assert found["batch"] == 32
    assert (found["backbone"], found["dim"], found["image_size"]) == ("mlp", 16, 8)
    assert found["images_per_second"] == pytest.approx(32 / found["step_seconds"])
    assert found["training_seconds"] == pytest.approx(found["steps"] * found["step_seconds"])
    evaluated = 7 * 126 + 2 * 1132 + 126 + 539
    assert found["evaluation_seconds"] == pytest.approx(evaluated / found["evaluated_per_second"])
    assert 0 < found["idle_seconds"] <= found["total_seconds"]
    assert found["total_seconds"] == pytest.approx(found["training_seconds"] + found["evaluation_seconds"])


def test_a_slow_network_is_timed_on_few_images(tiny):
    dataset = load_dataset("digits")
    found = time_training(tiny(batch_size=512), dataset, dataset.train, (1132, 126, 539), seconds=1e-9)
    assert found["batch"] == timing.SMALL_BATCH
    assert found["images_per_second"] == pytest.approx(512 / found["step_seconds"])


def test_streamed_images_are_timed_too(sick, tiny):
    report = diagnose(tiny(data=str(sick), data_mode="stream", image_size=8, on_bad_image="skip"), seconds=0.01)
    assert report["training"]["images_per_second"] > 0
    assert report["advice"]["decided"]


def test_data_that_cannot_be_split_is_told(class_folder, tiny):
    report = diagnose(tiny(data=str(class_folder({"a": 1, "b": 1}))), seconds=0.01)
    assert report["training"] is None
    assert any("too small for a validation split" in p["text"] for p in report["problems"] if p["level"] == "error")


# --- the command ------------------------------------------------------------------------------------------------------


def text_of(report, width=100):
    console = Console(width=width, record=True, file=io.StringIO())
    print_report(report, console)
    return console.export_text()


@pytest.fixture(scope="module")
def report(sick):
    return diagnose(Recipe(**tiny_fields(data=str(sick), epochs=3)), seconds=0.01)


def test_the_report_reads(report):
    text = text_of(report)
    for part in (
        "Machine",
        "Data",
        "Classes",
        "Findings",
        "Training",
        "Method",
        "■ many",
        "ant",
        "dog",
        "docs/results.md",
    ):
        assert part in text
    for width in (60, 100, 200):
        lines = text_of(report, width).splitlines()
        commands = [line.strip() for line in lines if line.startswith("  equiframe ")]
        assert commands == report["advice"]["commands"]  # whole, to be copied
        assert max(len(line) for line in lines if line.strip() not in commands) <= width
    json.dumps(report)


def test_names_are_not_markup(report):
    names = ["[red]x[/red]", "[/]", "c", "d"]
    text = text_of(report | {"data": report["data"] | {"class_names": names}})
    assert "[red]x[/red]" in text
    assert "[/]" in text


def test_many_classes_share_bars(report):
    counts = [1000 - k for k in range(999)]
    data = report["data"] | {
        "class_names": [f"c{k}" for k in range(999)],
        "counts": counts,
        "validation_counts": None,
        "groups": {"many": 900, "medium": 81, "few": 18},
    }
    text = text_of(report | {"data": data})
    assert len(re.findall(r"^\d+ to \d+ ", text, re.M)) == ROWS
    assert re.search(r"^1 to 42 +1,000 to 959 +█", text, re.M)
    assert "to 999" in text


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 100))
def test_bars(one, two, width):
    assert 1 <= len(bar(one, width)) <= width
    assert bar(1.0, width) == "█" * width

    def eighths(text):
        return sum(8 if c == "█" else " ▏▎▍▌▋▊▉".index(c) for c in text)

    assert abs(eighths(bar(one, width)) - max(1, one * width * 8)) <= 0.5 or one * width * 8 < 1
    if one <= two:
        assert eighths(bar(one, width)) <= eighths(bar(two, width))


def test_words_for_numbers():
    assert quantity(1.534e11, "Flop/s") == "153 GFlop/s"
    assert quantity(2.1e12, "Flop/s") == "2.1 TFlop/s"
    assert [duration(s) for s in (0.2, 7.3, 80, 340, 5000, 36000, 400000)] == [
        "less than a second", "7.3 s", "80 s", "5.7 min", "83 min", "10 h", "4.6 days",
    ]  # fmt: skip


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = tiny_flags(imbalance=20)
    assert main(["doctor", *flags, "--seconds", "0.01", "--plot", "counts.png"]) == 0
    out, error = capsys.readouterr()
    assert "imbalance ratio" in out
    assert "etf-mix-blend" in out
    assert "looking at the machine" in error
    with Image.open("counts.png") as drawn:
        assert drawn.size[0] > 500
    assert os.listdir(tmp_path) == ["counts.png"]
    assert main(["doctor", *flags, "--seconds", "0.01", "--json"]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    content = json.loads(out)
    assert content["data"]["counts"][0] == max(content["data"]["counts"])
    assert content.keys() == {"machine", "data", "problems", "training", "advice"}


def test_the_machine_alone(capsys):
    flags = [flag for flag in tiny_flags()[1:]]
    assert main(["doctor", *flags, "--seconds", "0.01", "--quiet"]) == 0
    out, error = capsys.readouterr()
    assert "images/s" in out
    assert "Flop/s" in out
    assert "Findings" not in out
    assert error == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere/at/all",), "no such folder: nowhere/at/all"),
        (("digitz",), "did you mean 'digits'"),
        (("digits", "--backbone", "resnet33"), "unknown backbone 'resnet33'"),
        (("digits", "--images", "-1"), "--images must be at least 0"),
        (("digits", "--seconds", "0"), "--seconds above 0"),
        (("--plot", "x.png"), "--plot draws the class counts"),
        (("digits", "--backbone", "mlp", "--seconds", "0.01", "--plot", "x.txt"), "its ending must be one of"),
    ],
)
def test_wrong_input_is_one_line(arguments, message, capsys):
    assert main(["doctor", *arguments, "--quiet"]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert message in error
    assert error.count("\n") == 1


def test_every_block_of_the_page_runs(sick, tmp_path, monkeypatch, capsys):
    """docs/doctor.md, with a small network."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sick, tmp_path / "photos")
    text = (Path(__file__).parents[1] / "docs" / "doctor.md").read_text()
    for block in re.findall(r"```sh\n(.*?)```", text, re.S):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            small = ["--backbone", "mlp", "--image-size", "8", "--seconds", "0.01", "--quiet"]
            assert main([*words[1:], *small]) == 0, capsys.readouterr().err
    assert (tmp_path / "counts.png").is_file()
