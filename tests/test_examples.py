"""Every example runs as it stands."""

import os
import re
import runpy
import subprocess
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


@pytest.mark.filterwarnings("ignore")  # the advice of each trainer to its users
@pytest.mark.parametrize("path", OF_TRAINERS, ids=lambda p: p.stem)
def test_example_of_a_trainer(path, tmp_path, monkeypatch, capsys):
    """In this process, so that each library is imported once."""
    assert len(path.read_text().splitlines()) < 80
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), *ARGUMENTS.get(path.stem, ())])
    runpy.run_path(str(path), run_name="__main__")
    pattern, least = FLOORS[path.stem]
    assert float(re.search(pattern, capsys.readouterr().out).group(1)) > least


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path not in OF_TRAINERS], ids=lambda p: p.stem)
def test_example(path, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(path), *ARGUMENTS.get(path.stem, ())],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if path.stem == "own_loop":
        macro = float(re.search(r"macro accuracy ([\d.]+)", done.stdout).group(1))
        assert macro > 65
    if path.stem == "million_classes":
        accuracy = float(re.search(r"2,000 classes: accuracy ([\d.]+)", done.stdout).group(1))
        assert accuracy > 90
    if path.stem == "incremental":
        rows = {
            line[:24].strip(): [float(n) for n in re.findall(r"([\d.]+) ±", line)] for line in done.stdout.splitlines()
        }
        assert len(rows["frame, reserved vectors"]) == 9
        assert rows["frame, reserved vectors"][3] > 70  # of ten digits, three of them seen five times
        assert rows["frame, reserved vectors"][3] > rows["linear, no memory"][3]
        assert rows["frame"][0] > 80  # AUROC
