"""What the verb ``equiframe peeled`` does: solve one layer-peeled problem, or judge one claim of the paper."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from equiframe.errors import InputError, unknown
from equiframe.peeled import claims
from equiframe.peeled.closed_forms import mse_optimum
from equiframe.peeled.collapse_theory import StepProblem, collapse_threshold, vanishing_threshold
from equiframe.peeled.model import PeeledModel, class_counts
from equiframe.peeled.solve import solve_features

Say = Callable[[str], None]


def laboratory(
    *,
    num_classes: int = 10,
    dim: int | None = None,
    ratio: float = 100.0,
    profile: str = "step",
    num_minor: int | None = None,
    counts: tuple[float, ...] | None = None,
    energy_w: float = 2.0,
    energy_h: float = 2.0,
    loss: str = "ce",
    tau: float = 1.0,
    constraint: str = "vector",
    lambda_w: float = 5e-3,
    lambda_h: float = 5e-3,
    claim: str | None = None,
    seed: int = 0,
    figures: str | Path | None = None,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Solve one problem with the learned classifier and with the fixed frame, or judge ``claim`` C1, C2 or C3.

    Args:
        num_classes: K. dim: D; 64, or K−1 if that is more, by default.
        ratio, profile, num_minor: class counts as `class_counts` makes them; or ``counts``, one number a class.
        energy_w, energy_h, loss, tau, constraint, lambda_w, lambda_h: as in `PeeledModel`.
        figures: a folder for the figures; none are drawn without it.
        say: told what is being done.

    Returns:
        ``claim``, ``statement`` and ``verdict`` (None without a claim), ``rows`` (flat dicts), ``notes``, ``figures``
        (paths), ``seconds``. Numbers that do not exist are None.

    Raises:
        InputError: with one clear line, for anything the caller can mend.
    """
    began = time.perf_counter()
    if counts is not None:
        num_classes, ratio, profile = len(counts), max(counts) / min(counts), "own"
    dim = max(64, num_classes - 1) if dim is None else dim
    threads = torch.get_num_threads()
    if num_classes <= 200:  # small matrices: a second thread costs more than it brings
        torch.set_num_threads(1)
    try:
        if claim is not None:
            if claim.upper() not in claims.STATEMENTS:
                raise unknown("claim", claim, claims.STATEMENTS)
            if num_classes < 4:
                raise InputError(f"claims are judged for at least 4 classes, got {num_classes}")
            if counts is not None:
                raise InputError("claims are judged for the counts of a profile: leave out the class counts")
            say(f"claim {claim.upper()}: solving")
            shape = {"num_classes": num_classes, "dim": dim, "seed": seed}
            energies = {"energy_w": energy_w, "energy_h": energy_h}
            if claim.upper() == "C1":
                verdict = claims.claim_c1(**shape, **energies, profile=profile)
            elif claim.upper() == "C2":
                verdict = claims.claim_c2(**shape, **energies, ratio=ratio, num_minor=num_minor)
            else:
                verdict = claims.claim_c3(**shape)
            result = {"claim": verdict.claim, "statement": verdict.statement, "verdict": verdict.verdict}
            result |= {"rows": verdict.rows, "notes": verdict.notes, "figures": []}
        if claim is None or figures is not None:
            if counts is None:
                sizes = class_counts(num_classes, ratio, profile=profile, num_minor=num_minor)
            else:
                sizes = torch.tensor(counts, dtype=torch.float64)
            model = PeeledModel(
                sizes, dim, energy_w, energy_h, loss, constraint, lambda_w=lambda_w, lambda_h=lambda_h, tau=tau
            )
        if claim is None:
            say("solving with the learned classifier and with the fixed frame")
            found = claims.learned_and_fixed(model, seed)
            result = _told(model, found, profile)
        if figures is not None:
            say("drawing")
            folder = Path(figures)
            made = (
                _problem_figures(model, found, folder, seed)
                if claim is None
                else _figures(model, verdict, folder, seed)
            )
            result["figures"] = [str(path) for path in made]
    finally:
        torch.set_num_threads(threads)
    return _plain(result | {"seconds": round(time.perf_counter() - began, 2)})


def _step_problem(model: PeeledModel) -> StepProblem | None:
    """The two groups of classes, where there are two of at least two classes each under cross-entropy."""
    minor = int((model.counts == model.counts.min()).sum())
    major = int((model.counts == model.counts.max()).sum())
    if model.loss != "ce" or major + minor != model.num_classes or min(major, minor) < 2:
        return None
    mu, unit = math.sqrt(model.lambda_w * model.lambda_h), float(model.counts.min())
    return StepProblem(major, minor, model.constraint, model.scale, penalty=mu, unit=unit)


def _told(model: PeeledModel, found: dict[str, Any], profile: str) -> dict[str, Any]:
    rows = [
        {
            "classifier": name,
            "loss": model.loss,
            "constraint": model.constraint,
            "ratio": float(model.counts.max() / model.counts.min()),
        }
        | {k: v for k, v in found[name].items() if k != "solution"}
        for name in ("learned", "frame")
    ]
    frame = found["frame"]["solution"]
    where = claims.alignment(model, frame.vectors, frame.features)
    notes = [
        f"fixed frame: h is {where['degrees']:.2e} degrees off w_c at most, its length {where['shortest']:.6f} to "
        f"{where['longest']:.6f} of {'the mean' if model.constraint == 'penalty' else 'the budget'}"
    ]
    simplex = model.dim >= model.num_classes - 1
    if not simplex:
        notes.append(f"D = {model.dim} < K-1: no simplex frame exists, Theorem 1 does not apply; the frame is another")
    if simplex and model.loss == "ce" and model.constraint == "vector":
        notes.append(f"Theorem 1 gives the value {claims.theorem1_value(model.num_classes, model.scale):.12g}")
    problem = _step_problem(model)
    if problem is not None and simplex:
        text = f"minor classes collapse from R* = {collapse_threshold(problem):.6g} on"
        if model.constraint == "penalty":
            text += f", and their class vectors are zero from R = {vanishing_threshold(problem):.6g} on"
        notes.append(f"{text} (here R = {rows[0]['ratio']:g})")
    if model.loss == "mse" and model.constraint == "penalty":
        best = mse_optimum(model.counts, model.lambda_w, model.lambda_h, dim=model.dim)
        gone = int((best.logits.diagonal() == 0).sum())
        notes.append(f"closed form (learned): value {best.value:.12g}, {gone} of {model.num_classes} classes are zero")
    if profile != "step":
        notes.append("minor: the third of the classes with fewest samples")
    return {"claim": None, "statement": None, "verdict": None, "rows": rows, "notes": notes, "figures": []}


def _problem_figures(model: PeeledModel, found: dict[str, Any], folder: Path, seed: int) -> list[Path]:
    from equiframe.peeled import figures

    made = [_cosines(model, found, folder)]
    problem = _step_problem(model)
    if problem is not None and model.dim >= model.num_classes - 1:
        threshold = collapse_threshold(problem)
        ratio = float(model.counts.max() / model.counts.min())
        curve = claims.angle_curve(problem, threshold, claims.curve_end([threshold], ratio))
        learned = found["learned"]
        ring = {"constraint": problem.constraint, "ratio": ratio, "degrees_found": learned["minor_degrees"]}
        simplex = math.degrees(math.acos(-1 / (model.num_classes - 1)))
        limits = "" if model.constraint == "penalty" else f", s = {model.scale:g}"
        title = f"K = {model.num_classes}{limits}; ring: solved and certified"
        made.append(figures.angle_ratio(folder / "angle_ratio", {model.constraint: curve}, simplex, [ring], title))
    if model.constraint == "vector" and model.num_classes <= claims.LARGE:
        made.append(_gap(model, folder, seed))
    if (model.num_classes, model.dim) == (4, 3):
        made.append(figures.features_gif(folder / "features.gif", loss=model.loss))
    return made


def _figures(model: PeeledModel, verdict: claims.Verdict, folder: Path, seed: int) -> list[Path]:
    from equiframe.peeled import figures

    k, series = model.num_classes, verdict.series
    if verdict.claim == "C1":
        made = [_gap(model, folder, seed)] if k <= claims.LARGE else []
        return [*made, figures.features_gif(folder / "features.gif")]
    if verdict.claim == "C2":
        title = f"K = {k}, s = {model.scale:g}; rings: solved and certified"
        ratio = float(model.counts.max() / model.counts.min())
        made = [
            figures.angle_ratio(folder / "angle_ratio", series["curves"], series["simplex"], verdict.rows, title),
            figures.push_pull(folder / "push_pull", series["tracks"], ratio, k),
        ]
        return [*made, _cosines(model, claims.learned_and_fixed(model, seed), folder)] if k <= 100 else made
    return [
        figures.convergence(folder / "convergence", series["paths"], series["scales"], k),
        figures.race_map(folder / "race", series["maps"], series["lattice"], series["targets"], k),
    ]


def _cosines(model: PeeledModel, found: dict[str, Any], folder: Path) -> Path:
    from equiframe.peeled import figures

    learned, fixed = found["learned"]["solution"], found["frame"]["solution"]
    panels = {
        "learned class vectors": learned.vectors,
        "learned features": learned.features,
        "fixed frame": fixed.vectors,
    }
    two = len(model.counts.unique()) == 2
    num_major = int((model.counts > model.counts.min()).sum()) if two else None
    ratio = float(model.counts.max() / model.counts.min())
    return figures.cosines(folder / "cosines", panels, f"K = {model.num_classes}, R = {ratio:g}", num_major=num_major)


def _gap(model: PeeledModel, folder: Path, seed: int) -> Path:
    from equiframe.peeled import figures

    vectors = claims.frame_vectors(model, seed, geometry="auto")
    budget = 1000 if model.num_classes <= 50 else 100
    runs = {
        name: solve_features(model, vectors, method=method, seed=seed, max_iterations=budget)
        for name, method in (
            ("projected gradient", "projected"),
            ("accelerated", "accelerated"),
            ("spectral (Barzilai–Borwein)", "spectral"),
            ("Riemannian gradient", "riemannian"),
        )
    }
    ratio = float(model.counts.max() / model.counts.min())
    title = f"fixed frame: K = {model.num_classes}, R = {ratio:g}, s = {model.scale:g}"
    return figures.gap(folder / "gap", runs, f"{figures.LOSS_NAMES.get(model.loss, model.loss)}, {title}")


def _plain(value: Any) -> Any:
    """What JSON has: no tensors, and None where a number does not exist."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, torch.Tensor):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
