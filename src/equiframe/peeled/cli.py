"""The verb ``equiframe peeled``: solve one layer-peeled problem, or judge one claim of the paper."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch

from equiframe.errors import InputError, unknown
from equiframe.peeled import claims
from equiframe.peeled.collapse_theory import StepProblem, collapse_threshold
from equiframe.peeled.losses import LOSSES
from equiframe.peeled.model import CONSTRAINTS, PROFILES, PeeledModel, class_counts
from equiframe.peeled.solve import solve_features


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb, for a parser of the caller."""
    parser.add_argument("--classes", type=int, default=10, metavar="K", help="number of classes (10)")
    parser.add_argument("--dim", type=int, default=None, metavar="D", help="feature width (64, or K-1 if that is more)")
    parser.add_argument(
        "--ratio", type=float, default=100.0, metavar="R", help="largest over smallest class count (100)"
    )
    parser.add_argument("--profile", default="step", help="class counts: step or exp")
    parser.add_argument("--minor", type=int, default=None, help="number of minor classes of the step profile (K // 2)")
    parser.add_argument("--energy-w", type=float, default=2.0, help="E_W, squared length of class vectors (2)")
    parser.add_argument("--energy-h", type=float, default=2.0, help="E_H, squared length of features (2)")
    parser.add_argument("--loss", default="ce", help=", ".join(LOSSES))
    parser.add_argument("--constraint", default="vector", help=", ".join(CONSTRAINTS))
    parser.add_argument("--lambda-w", type=float, default=5e-3, help="penalty on W (constraint penalty)")
    parser.add_argument("--lambda-h", type=float, default=5e-3, help="penalty on H (constraint penalty)")
    parser.add_argument("--claim", default=None, help="judge C1, C2 or C3 instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="folder for figures (none are made without it)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: list[str]) -> dict[str, Any]:
    """Run the verb on its command-line words; prints a table (or JSON) and returns the same as a dict.

    Raises:
        InputError: with one clear line, for anything the caller can mend.
    """
    parser = _Parser(prog="equiframe peeled", description=__doc__)
    add_arguments(parser)
    options = parser.parse_args(args)
    if options.dim is None:
        options.dim = max(64, options.classes - 1)
    if options.claim is not None and options.claim.upper() not in claims.STATEMENTS:
        raise unknown("claim", options.claim, claims.STATEMENTS)
    if options.profile not in PROFILES:
        raise unknown("profile", options.profile, PROFILES)
    began = time.perf_counter()
    threads = torch.get_num_threads()
    if options.classes <= 200:  # small matrices: a second thread costs more than it brings
        torch.set_num_threads(1)
    try:
        result = _judge(options) if options.claim else _solve(options)
    finally:
        torch.set_num_threads(threads)
    result["seconds"] = round(time.perf_counter() - began, 2)
    if options.json:
        print(json.dumps(_clean(result)))
    else:
        _show(result)
    return result


def _judge(options: argparse.Namespace) -> dict[str, Any]:
    name = options.claim.upper()
    shape = {"num_classes": options.classes, "dim": options.dim, "seed": options.seed}
    energies = {"energy_w": options.energy_w, "energy_h": options.energy_h}
    if options.classes < 4:
        raise InputError(f"claims are judged for at least 4 classes, got {options.classes}")
    if name == "C1":
        verdict = claims.claim_c1(**shape, **energies, profile=options.profile)
    elif name == "C2":
        verdict = claims.claim_c2(**shape, **energies, ratio=options.ratio, num_minor=options.minor)
    else:
        verdict = claims.claim_c3(**shape)
    result: dict[str, Any] = {
        "claim": name,
        "statement": verdict.statement,
        "verdict": verdict.verdict,
        "rows": verdict.rows,
        "notes": verdict.notes,
        "figures": [],
    }
    if options.out is not None:
        from equiframe.peeled import figures

        k, out, series = options.classes, options.out, verdict.series
        if name == "C1":
            made = [_gap_figure(options, out / "gap.png")] if k <= claims.LARGE else []
            result["figures"] = [*made, figures.features_gif(out / "features.gif")]
        elif name == "C2":
            title = f"K = {k}, s = {math.sqrt(options.energy_w * options.energy_h):g}; rings: solved and certified"
            result["figures"] = [
                figures.angle_ratio(out / "angle_ratio.png", series["curves"], series["simplex"], verdict.rows, title),
                figures.push_pull(out / "push_pull.png", series["tracks"], options.ratio),
            ]
            if k <= 100:
                result["figures"].append(_cosine_figure(options, out / "cosines.png"))
        else:
            result["figures"] = [
                figures.convergence(out / "convergence.png", series["paths"], series["scales"], k),
                figures.race_map(out / "race.png", series["maps"], series["lattice"], series["targets"], k),
            ]
    result["figures"] = [str(path) for path in result["figures"]]
    return result


def _model(options: argparse.Namespace, **changes: Any) -> PeeledModel:
    counts = class_counts(options.classes, options.ratio, profile=options.profile, num_minor=options.minor)
    chosen = {"loss": options.loss, "constraint": options.constraint} | changes
    return PeeledModel(
        counts,
        options.dim,
        options.energy_w,
        options.energy_h,
        lambda_w=options.lambda_w,
        lambda_h=options.lambda_h,
        **chosen,
    )


def _solve(options: argparse.Namespace) -> dict[str, Any]:
    model = _model(options)
    found = claims.learned_and_fixed(model, options.seed)
    rows = []
    for name in ("learned", "frame"):
        case = found[name]
        rows.append({"classifier": name} | {k: v for k, v in case.items() if k != "solution"})
    where = claims.alignment(model, found["frame"]["solution"].vectors, found["frame"]["solution"].features)
    notes = [
        f"fixed frame: h is {where['degrees']:.2e} degrees off w_c, {where['shortest']:.6f} to {where['longest']:.6f} "
        "of the allowed length"
    ]
    if model.loss == "ce" and model.constraint == "vector":
        notes.append(f"Theorem 1 gives the value {claims.theorem1_value(model.num_classes, model.scale):.12g}")
    minor = int((model.counts == model.counts.min()).sum())
    if model.loss == "ce" and options.profile == "step" and min(minor, model.num_classes - minor) >= 2:
        problem = StepProblem(
            model.num_classes - minor,
            minor,
            model.constraint,
            model.scale,
            math.sqrt(model.lambda_w * model.lambda_h),
        )
        threshold = collapse_threshold(problem)
        notes.append(f"minor classes collapse from R* = {threshold:.6g} on (here R = {options.ratio:g})")
    result: dict[str, Any] = {"claim": None, "rows": rows, "notes": notes, "figures": []}
    if options.out is not None:
        from equiframe.peeled import figures

        out = options.out
        made = [_cosine_figure(options, out / "cosines.png", found)]
        if model.constraint == "vector" and model.num_classes <= claims.LARGE:
            made.append(_gap_figure(options, out / "gap.png"))
        made.append(figures.features_gif(out / "features.gif", loss=model.loss))
        result["figures"] = [str(path) for path in made]
    return result


def _cosine_figure(options: argparse.Namespace, path: Path, found: dict[str, Any] | None = None) -> Path:
    from equiframe.peeled import figures

    model = _model(options)
    found = found or claims.learned_and_fixed(model, options.seed)
    learned, fixed = found["learned"]["solution"], found["frame"]["solution"]
    panels = {
        "learned class vectors": learned.vectors,
        "learned features": learned.features,
        "fixed frame": fixed.vectors,
    }
    num_major = int((model.counts > model.counts.min()).sum()) if options.profile == "step" else None
    return figures.cosines(path, panels, num_major=num_major)


def _gap_figure(options: argparse.Namespace, path: Path) -> Path:
    from equiframe.peeled import figures

    model = _model(options, constraint="vector")
    vectors = claims.frame_vectors(model, options.seed)
    budget = 1000 if model.num_classes <= 50 else 100
    runs = {
        name: solve_features(model, vectors, method=method, seed=options.seed, max_iterations=budget)
        for name, method in (
            ("projected gradient", "projected"),
            ("accelerated", "accelerated"),
            ("spectral (Barzilai–Borwein)", "spectral"),
            ("Riemannian gradient", "riemannian"),
        )
    }
    title = f"Fixed frame, {model.loss}: K = {model.num_classes}, R = {options.ratio:g}, s = {model.scale:g}"
    return figures.gap(path, runs, title)


def _clean(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {k: _clean(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_clean(v) for v in value]
    if isinstance(value, torch.Tensor):
        return _clean(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _text(value: Any) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def _show(result: dict[str, Any]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError as error:  # the core installs without it
        raise InputError("the table needs rich: pip install 'equiframe[train]', or use --json") from error
    console = Console(file=sys.stdout, highlight=False)
    if result["claim"]:
        console.print(f"[bold]{result['claim']}[/bold] {result['statement']}")
    columns = list(dict.fromkeys(key for row in result["rows"] for key in row))
    table = Table(*[name.replace("_", " ") for name in columns])
    for row in result["rows"]:
        table.add_row(*[_text(row.get(name, "")) for name in columns])
    console.print(table)
    for note in result["notes"]:
        console.print(f"- {note}", markup=False)
    if result["claim"]:
        console.print(f"verdict: [bold]{result['verdict']}[/bold]")
    for path in result["figures"]:
        console.print(f"wrote {path}", markup=False)
