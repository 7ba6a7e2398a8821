"""Every example runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
ARGUMENTS = {
    "incremental": ["--seeds=1", "--epochs=10", "--steps=40"],
    "million_classes": ["--classes=2000", "--dim=64", "--linear=2000", "--steps=60", "--tests=200"],
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
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
