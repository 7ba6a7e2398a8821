"""Tuning with an equal budget for each method: a seeded random search, judged by validation images alone.

A comparison with baselines that nobody tuned proves nothing. Each method gets the same number of trials, trial 0 being its
defaults, over the fields of `SPACE` that it has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from equiframe.errors import InputError
from equiframe.grid import Cell, Failure
from equiframe.method import METHOD_FIELDS, resolve_method
from equiframe.recipe import Recipe
from equiframe.runs import RunFolder
from equiframe.variants import Variant


@dataclass(frozen=True)
class Range:
    """From low to high, drawn uniformly in the logarithm; ``relative`` ones are factors on the method's own value."""

    low: float
    high: float
    relative: bool = False


SPACE: dict[str, Range] = {
    "lr": Range(1 / 8, 4, relative=True),
    "weight_decay": Range(1 / 4, 8, relative=True),
    "tau": Range(0.5, 2.5),
    "logit_scale": Range(1 / 4, 4, relative=True),
    "vs_gamma": Range(0.05, 0.6),
    "focal_gamma": Range(0.5, 5),
    "max_margin": Range(0.1, 1),
    "mse_kappa": Range(1, 20),
}


def space_of(variant: Variant, recipe: Recipe) -> dict[str, tuple[float, float]]:
    """Field → lowest and highest value, for the fields that this method has and that nobody fixed (in the recipe or in
    the variant). A field whose own value is 0 has no range of factors and stays as it is."""
    cell = variant.recipe(recipe)
    fields = cell.to_dict() | resolve_method(cell.method, {name: getattr(cell, name) for name in METHOD_FIELDS})
    fixed = {name for name in METHOD_FIELDS if getattr(cell, name) is not None} | {name for name, _ in variant.fields}
    space = {}
    for name, bounds in SPACE.items():
        value = fields.get(name)
        if value is None or name in fixed or (bounds.relative and value == 0):
            continue
        scale = float(value) if bounds.relative else 1.0
        space[name] = (bounds.low * scale, bounds.high * scale)
    return space


def trial_fields(variant: Variant, recipe: Recipe, trial: int) -> dict[str, float]:
    r"""The fields of a trial: none for trial 0, else :math:`a\,(b/a)^u` to three digits, u uniform in [0, 1).

    u depends on trial and field alone: the i-th trials of all methods share their place in the range of, say, ``lr``.
    """
    if trial == 0:
        return {}
    place = dict(zip(SPACE, np.random.default_rng((trial, 2022)).random(len(SPACE)), strict=True))
    return {
        name: float(f"{math.exp(math.log(low) + place[name] * math.log(high / low)):.3g}")
        for name, (low, high) in space_of(variant, recipe).items()
    }


def trial_cells(
    variants: Sequence[Variant], recipe: Recipe, out: Path, *, num: int, epochs: int | None = None
) -> list[Cell]:
    """``num`` trials for each variant, in ``out/tuning/METHOD/trial-i``; the first trials of all come before the second.

    Raises:
        InputError: without validation images, or for fewer than one trial.
    """
    if num < 1:
        raise InputError(f"tune must be at least 1 trial a method, got {num}")
    if recipe.validation == 0:
        raise InputError(
            "tuning chooses settings on validation images, and validation 0 leaves none (choosing on test images would "
            "make every number too good); give --validation 0.1, or do not tune"
        )
    base = recipe.with_(seed=0, epochs=epochs or recipe.epochs)
    return [
        Cell(
            variant.recipe(base, **trial_fields(variant, recipe, trial)),
            folder_of(out, variant) / f"trial-{trial}",
            f"tuning {variant.name}, trial {trial}",
        )
        for trial in range(num)
        for variant in variants
    ]


def folder_of(out: Path, variant: Variant) -> Path:
    return out / "tuning" / variant.folder


def choose(
    variant: Variant, recipe: Recipe, out: Path, num: int, failures: Mapping[str, Failure] | None = None
) -> dict[str, object] | None:
    """The trial with the highest macro accuracy on validation images; the earlier one where two are equal.

    Returns:
        ``chosen`` (its number), its ``fields``, and all ``trials`` with fields and ``val_macro`` (None for one that
        failed); None while trials are missing.

    Raises:
        InputError: if all trials failed.
    """
    trials, failures = [], failures or {}
    for trial in range(num):
        folder = RunFolder(folder_of(out, variant) / f"trial-{trial}")
        failed = f"tuning {variant.name}, trial {trial}" in failures
        if not folder.finished and not failed:
            return None
        score = folder.read_json("metrics.json").get("val_macro") if folder.finished else None
        trials.append({"fields": trial_fields(variant, recipe, trial), "val_macro": score})
    known = [i for i, trial in enumerate(trials) if trial["val_macro"] is not None]
    if not known:
        raise InputError(f"all {num} trials of {variant.name} failed; the first: {next(iter(failures.values())).text}")
    chosen = max(known, key=lambda i: trials[i]["val_macro"])
    return {"chosen": chosen, "fields": trials[chosen]["fields"], "trials": trials}


def describe_space(variant: Variant, recipe: Recipe, num: int) -> str:
    ranges = ", ".join(f"{name} {low:.3g} to {high:.3g}" for name, (low, high) in space_of(variant, recipe).items())
    return f"tuning {variant.name}: {num} trials, the first with its defaults; {ranges}"


def describe_choice(variant: Variant, found: Mapping[str, object]) -> str:
    """``tuned ce: trial 3 of 8, lr 0.05, … (validation macro 61.2 %; defaults 59.0 %)``."""
    fields = ", ".join(f"{name} {value:g}" for name, value in found["fields"].items()) or "its defaults"
    trials = found["trials"]

    def percent(trial: int) -> str:
        value = trials[trial]["val_macro"]
        return "failed" if value is None else f"{100 * value:.1f} %"

    return (
        f"tuned {variant.name}: trial {found['chosen']} of {len(trials)}, {fields} "
        f"(validation macro {percent(found['chosen'])}; defaults {percent(0)})"
    )
