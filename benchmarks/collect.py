"""Keep a grid's raw results: copy what is small and readable of every finished run of a comparison to benchmarks/results.

Weights, checkpoints, index lists, predictions, pages and what they draw stay where they are. Absolute folders of this machine are cut from the
recorded commands, so that the record is the same wherever the grid ran.

Run: python benchmarks/collect.py runs/cifar10-r100-resnet20 --against balanced-softmax
"""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path

from equiframe.summaries import Summary, paired_difference

KEPT = ("recipe.yaml", "environment.json", "history.jsonl", "metrics.json", "model.json")
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


def table(results: Path, against: str) -> str:
    """The kept runs as Markdown: percent, mean ± sd over seeds, and the paired difference in macro accuracy to a method."""
    runs: dict[str, dict[int, dict]] = {}
    for path in sorted(results.glob("*/seed-*/metrics.json")):
        runs.setdefault(path.parts[-3], {})[int(path.parts[-2].removeprefix("seed-"))] = json.loads(path.read_text())
    macro = {method: {seed: m["macro"] for seed, m in by.items()} for method, by in runs.items()}
    lines = [f"| method | n | macro | head | middle | tail | ECE | macro − `{against}`, paired |", "|---" * 8 + "|"]
    for method in sorted(runs, key=lambda m: -sum(macro[m].values()) / len(macro[m])):
        cells = [
            Summary.of([m[c] for m in runs[method].values()]).percent()
            for c in ("macro", "head", "middle", "tail", "ece")
        ]
        d = None if method == against else paired_difference(macro[method], macro[against])
        told = "" if d is None else f"{100 * d.mean:+.1f} (n = {d.n})"
        if d is not None and d.low is not None:
            told = f"{100 * d.mean:+.1f} [{100 * d.low:.1f}, {100 * d.high:.1f}]"
        lines.append(f"| `{method}` | {len(runs[method])} | " + " | ".join([*cells, told]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="what `equiframe compare --out` wrote")
    parser.add_argument("--results", default="benchmarks/results")
    parser.add_argument(
        "--against", metavar="METHOD", help="also print the table of what is kept, with differences to this"
    )
    arguments = parser.parse_args()
    folder = Path(arguments.folder).absolute()
    runs = collect(folder, Path(arguments.results) / folder.name)
    print(f"{len(runs)} runs in {Path(arguments.results) / folder.name}")
    if arguments.against:
        print(table(Path(arguments.results) / folder.name, arguments.against))


if __name__ == "__main__":
    main()
