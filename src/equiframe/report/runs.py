"""What the report knows of the runs: read once from their folders, grouped by method."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from equiframe.errors import InputError
from equiframe.method import METHODS
from equiframe.recipe import WITHOUT_EFFECT, Recipe
from equiframe.runs import MACHINE_FIELDS, RunFolder
from equiframe.variants import Variant


@dataclass
class RunData:
    """One finished run."""

    path: Path
    recipe: Recipe
    metrics: dict
    history: list[dict]
    details: dict
    environment: dict
    split_hash: str
    predictions: dict[str, np.ndarray] | None = None

    @property
    def row(self) -> str:
        """The variant of the method that a comparison keeps in a folder of that name; else the method, with a second stage that is
        not its own: ``etf-la+crt``."""
        method, stage = self.recipe.method, self.recipe.second_stage
        variant = Variant.from_folder(self.path.resolve().parent.name)
        if variant is not None and variant.method == method:
            return variant.name
        own = METHODS[method].fields.get("second_stage", "none") if method in METHODS else stage
        return f"{method}+{stage}" if stage not in (None, "none", own) else method

    @property
    def classes(self) -> list[dict]:
        """Class records, most training images first."""
        return sorted(self.metrics["classes"], key=lambda c: -c["num_train"])


@dataclass
class Group:
    """The runs of one method (one setting), over seeds."""

    name: str
    runs: list[RunData]

    def values(self, key: str) -> list[float]:
        return [r.metrics[key] for r in self.runs if r.metrics.get(key) is not None]

    def mean(self, key: str) -> float | None:
        values = self.values(key)
        return statistics.fmean(values) if values else None

    def sd(self, key: str) -> float | None:
        values = self.values(key)
        return statistics.stdev(values) if len(values) > 1 else None

    def class_accuracy(self) -> list[float | None]:
        """Mean accuracy of each class over the runs, most training images first."""
        columns = zip(*([c["accuracy"] for c in r.classes] for r in self.runs), strict=True)
        return [None if any(v is None for v in column) else statistics.fmean(column) for column in columns]

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Epochs and the mean over the runs of a history key."""
        by_epoch: dict[int, list[float]] = {}
        for run in self.runs:
            for record in run.history:
                if record.get(key) is not None:
                    by_epoch.setdefault(record["epoch"] + 1, []).append(record[key])
        return sorted(by_epoch), [statistics.fmean(by_epoch[e]) for e in sorted(by_epoch)]


def find_runs(paths: Sequence[str | Path]) -> list[RunData]:
    """All finished runs named or inside the named folders (a comparison's, say).

    Raises:
        InputError: if a path holds none, or a run is damaged.
    """
    found: dict[Path, RunData] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise InputError(f"no such run folder: {path}")
        metrics = [path / "metrics.json"] if (path / "metrics.json").is_file() else sorted(path.rglob("metrics.json"))
        metrics = [file for file in metrics if "tuning" not in file.relative_to(path).parts]  # trials are no results
        if not metrics:
            raise InputError(f"no finished run in {path} (a run is finished when it has metrics.json)")
        for file in metrics:
            found[file.parent.resolve()] = _read(RunFolder(file.parent))
    return list(found.values())


def _read(folder: RunFolder) -> RunData:
    metrics = folder.read_json("metrics.json")
    details = folder.read_json("details.json") if (folder.path / "details.json").is_file() else {}
    split = folder.read_json("split.json") if (folder.path / "split.json").is_file() else {}
    return RunData(
        folder.path, folder.recipe(), metrics, folder.history(), details,
        folder.read_json("environment.json"), split.get("hash", "not kept"), folder.read_arrays("predictions.npz"),
    )  # fmt: skip


def group_runs(runs: Sequence[RunData]) -> list[Group]:
    """Groups by method (or variant), best macro accuracy first. Runs of one that differ in more than the seed are kept apart.

    What the machine chose (precision, …) makes no group of its own, unless a seed would be counted twice.

    Raises:
        InputError: if the runs do not share their classes (they cannot be drawn into one picture), or if two are the same
            training: an sd over copies would be a lie.
    """
    names = [c["name"] for c in runs[0].metrics["classes"]]
    for run in runs:
        if [c["name"] for c in run.metrics["classes"]] != names:
            raise InputError(f"{run.path} has other classes than {runs[0].path}; report them separately")
    groups: dict[str, list[RunData]] = {}
    for run in runs:
        same_row = [r for r in runs if r.row == run.row]
        seeds = [(r.recipe.seed, tuple(map(str, _settings(r).values()))) for r in same_row]
        machine = len(set(seeds)) < len(seeds)
        own = [
            f"{k.replace('_', ' ')} {v}"
            for k, v in _settings(run, machine=machine).items()
            if any(_settings(r, machine=machine)[k] != v for r in same_row)
        ]
        groups.setdefault(run.row + (f" ({', '.join(own)})" if own else ""), []).append(run)
    for name, members in groups.items():
        first: dict[int, RunData] = {}
        for run in members:
            if run.recipe.seed in first:
                raise InputError(
                    f"{first[run.recipe.seed].path} and {run.path} are both {name} with seed {run.recipe.seed}: one training "
                    "counts once; report one of them"
                )
            first[run.recipe.seed] = run
    ordered = [Group(name, sorted(members, key=lambda r: r.recipe.seed)) for name, members in groups.items()]
    return sorted(ordered, key=lambda g: -(g.mean("macro") or 0))


def _settings(run: RunData, *, machine: bool = False) -> dict[str, object]:
    """What makes a run another method: not its name, its seed, nor (without ``machine``) the machine's choices."""
    left_out = ("method", "seed", *WITHOUT_EFFECT, *(() if machine else MACHINE_FIELDS))
    return {k: v for k, v in run.recipe.to_dict().items() if k not in left_out}
