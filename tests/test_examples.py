"""Every example runs as it stands."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
ARGUMENTS = {
    "incremental": ["--seeds=1", "--epochs=10", "--steps=40"],
    "long_tailed_text": ["--largest=300", "--epochs=4"],
    "million_classes": ["--classes=2000", "--dim=64", "--linear=2000", "--steps=60", "--tests=200"],
}


OF_TRAINERS = [path for path in EXAMPLES if path.stem.startswith("swap_") or path.stem == "long_tailed_text"]
FLOORS = {  # what the example prints, and the least that it must be
    "swap_head": (r"macro accuracy ([\d.]+)", 50),
    "swap_timm": (r"accuracy ([\d.]+) %", 75),
    "swap_lightning": (r"val_macro ([\d.]+)", 75),
    "swap_skorch": (r"balanced accuracy ([\d.]+)", 85),
    "swap_keras": (r"macro accuracy ([\d.]+)", 75),
    "long_tailed_text": (r"macro +([\d.]+)", 30),
}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """``run(path)``: what an example prints, in this process, so that each library is imported once."""

    def run(path):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(path), *ARGUMENTS.get(path.stem, ())])
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.filterwarnings("ignore")  # the advice of each trainer to its users
@pytest.mark.parametrize("path", OF_TRAINERS, ids=lambda p: p.stem)
def test_example_of_a_trainer(path, run):
    assert len(path.read_text().splitlines()) < 80
    pattern, least = FLOORS[path.stem]
    assert float(re.search(pattern, run(path)).group(1)) > least


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path not in OF_TRAINERS], ids=lambda p: p.stem)
def test_example(path, run):
    printed = run(path)
    if path.stem == "own_loop":
        macro = float(re.search(r"macro accuracy ([\d.]+)", printed).group(1))
        assert macro > 65
    if path.stem == "million_classes":
        accuracy = float(re.search(r"2,000 classes: accuracy ([\d.]+)", printed).group(1))
        assert accuracy > 90
    if path.stem == "incremental":
        rows = {line[:24].strip(): [float(n) for n in re.findall(r"([\d.]+) ±", line)] for line in printed.splitlines()}
        assert len(rows["frame, reserved vectors"]) == 9
        assert rows["frame, reserved vectors"][3] > 70  # of ten digits, three of them seen five times
        assert rows["frame, reserved vectors"][3] > rows["linear, no memory"][3]
        assert rows["frame"][0] > 80  # AUROC
