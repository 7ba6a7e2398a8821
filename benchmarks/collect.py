"""Keep a grid's raw results: copy what is small and readable of every finished run of a comparison to benchmarks/results.

Weights, checkpoints, index lists, predictions and pages stay where they are. Absolute folders of this machine are cut from the
recorded commands, so that the record is the same wherever the grid ran.

Run: python benchmarks/collect.py runs/cifar10-r100-resnet20
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

KEPT = ("recipe.yaml", "environment.json", "history.jsonl", "metrics.json", "details.json", "model.json")
KEPT_OF_GRID = ("comparison.json", "comparison.md")


def without_machine(text: str, folder: Path) -> str:
    """The text with the grid's absolute folder written as ``runs/NAME``."""
    return re.sub(re.escape(f"{folder.parent}{os.sep}"), "runs/", text)


def collect(folder: Path, target: Path) -> list[Path]:
    """Copy the light files of all finished runs of ``folder``; returns the runs that were copied."""
    copied = []
    for metrics in sorted(folder.glob("*/seed-*/metrics.json")):
        run = metrics.parent
        place = target / run.relative_to(folder)
        place.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            if (run / name).is_file():
                (place / name).write_text(without_machine((run / name).read_text(), folder))
        copied.append(run)
    for name in KEPT_OF_GRID:
        if (folder / name).is_file():
            (target / name).write_text(without_machine((folder / name).read_text(), folder))
    return copied


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="what `equiframe compare --out` wrote")
    parser.add_argument("--results", default="benchmarks/results")
    arguments = parser.parse_args()
    folder = Path(arguments.folder).absolute()
    runs = collect(folder, Path(arguments.results) / folder.name)
    print(f"{len(runs)} runs in {Path(arguments.results) / folder.name}")


if __name__ == "__main__":
    main()
