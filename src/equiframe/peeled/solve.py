r"""Solvers for the layer-peeled model, and certificates of how far from the optimum they stopped.

With W fixed the problem is convex in H. With W learned it is not convex in (W, H) but convex in the logits Z = W Hᵀ:
a limit on lengths of W and H is a limit on a norm of Z (nuclear norm for ``average`` and ``penalty``, the
max-norm γ₂ for ``vector``), so a dual bound certifies the learned optimum too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from equiframe.errors import InputError, unknown
from equiframe.peeled.model import PeeledModel

METHODS = ("projected", "accelerated", "spectral", "riemannian")
JOINT_METHODS = ("projected", "riemannian")


@dataclass
class Solution:
    """Where a solver stopped.

    Attributes:
        vectors: ``(K, D)``. features: ``(M, D)``.
        value: the objective. gap: certified upper bound on value − optimum.
        iterations: how many were done. converged: the stopping rule was met.
        history: lists ``iteration``, ``value``, ``gap``.
    """

    vectors: Tensor
    features: Tensor
    value: float
    gap: float
    iterations: int
    converged: bool
    history: dict[str, list[float]] = field(default_factory=dict, repr=False)


def feature_gap(model: PeeledModel, vectors: Tensor, features: Tensor) -> float:
    r"""Certified gap of ``features (M, D)`` for fixed ``vectors``: value − optimum is at most this.

    On a ball it is the Frank–Wolfe gap :math:`\max_{\lVert v\rVert\le r}\langle g, h - v\rangle = \langle g,h\rangle +
    r\lVert g\rVert`, summed over rows and written as :math:`\lVert g\rVert(r - \lVert h\rVert) +
    \tfrac12\lVert g\rVert\lVert h\rVert\,\lVert\hat h + \hat g\rVert^2`, which does not cancel. Under ``penalty`` it is
    :math:`\lVert g\rVert^2/(2\lambda_H n)`, from strong convexity.
    """
    g = model.gradients(vectors, features)[1]
    if model.constraint == "penalty":
        return float((g.square().sum(1) / (2 * model.lambda_h * model.num_samples)).sum())
    if model.constraint == "average":
        g, features = g.reshape(1, -1), features.reshape(1, -1)
        radius = math.sqrt(model.energy_h * model.num_classes)
    else:
        radius = math.sqrt(model.energy_h)
    length, size = features.norm(dim=1), g.norm(dim=1)
    turn = (_unit(features) + _unit(g)).square().sum(1)
    return float((size * (radius - length).clamp(min=0) + 0.5 * size * length * turn).sum())


def joint_gap(model: PeeledModel, vectors: Tensor, features: Tensor) -> float:
    r"""Certified gap of a pair (W, H) with learned W: value − global optimum, over every D, is at most this.

    With Z = W Hᵀ and G = ∂f/∂Z, convexity gives f(Z') ≥ f(Z) + ⟨G, Z' − Z⟩, and ⟨G, Z'⟩ is bounded from below by

    - ``average``: −K√(E_W E_H)·σ_max(G), as ‖Z'‖_* ≤ K√(E_W E_H);
    - ``penalty``: −√(λ_W λ_H)‖Z' N^{1/2}‖_* as long as σ_max(G N^{-1/2}) ≤ √(λ_W λ_H), any excess paid for; with
      ``nonnegative`` features σ_max² is the largest eigenvalue of max(0, N^{-1/2} Gᵀ G N^{-1/2}), as h_kᵀh_l ≥ 0;
    - ``vector``: −½(E_W Σa + E_H Σb) for any a, b with [diag a, G; Gᵀ, diag b] ⪰ 0; the multipliers of the
      constraints are tried, shifted until the matrix is positive semidefinite.
    """
    if model.samples != "classes":
        raise InputError('the certificate of a learned classifier needs samples="classes"')
    g = model.logit_gradient(vectors, features).T  # (K, K): row j the class vector, column k the feature
    slope = float((g * (vectors @ features.T)).sum())
    if model.constraint == "average":
        return slope + model.num_classes * model.scale * float(torch.linalg.matrix_norm(g, 2))
    if model.constraint == "penalty":
        root = model.num_samples.sqrt()
        mu = math.sqrt(model.lambda_w * model.lambda_h)
        norms = 0.5 * (
            model.lambda_w * vectors.square().sum()
            + model.lambda_h * (model.num_samples * features.square().sum(1)).sum()
        )
        if model.nonnegative:
            largest = math.sqrt(float(torch.linalg.eigvalsh(((g / root).T @ (g / root)).clamp(min=0))[-1]))
        else:
            largest = float(torch.linalg.matrix_norm(g / root, 2))
        excess = max(0.0, largest - mu)
        return slope + float(norms) + excess * float(model.objective(vectors, features)) / mu
    w, h = vectors / math.sqrt(model.energy_w), features / math.sqrt(model.energy_h)
    a = (-(w * (g @ h)).sum(1)).clamp(min=0)
    b = (-(h * (g.T @ w)).sum(1)).clamp(min=0)
    block = torch.cat([torch.cat([a.diag(), g], 1), torch.cat([g.T, b.diag()], 1)])
    shift = max(0.0, -float(torch.linalg.eigvalsh(block)[0]))
    return slope + 0.5 * model.scale * float(a.sum() + b.sum() + 2 * model.num_classes * shift)


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1, eps=1e-300)


def solve_features(
    model: PeeledModel,
    vectors: Tensor,
    *,
    method: str = "spectral",
    start: Tensor | None = None,
    seed: int = 0,
    tolerance: float = 1e-10,
    max_iterations: int = 2000,
    every: int = 1,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Solution:
    """Solve for the features with the class vectors ``(K, D)`` fixed.

    Args:
        model: the problem.
        vectors: ``(K, D)``, scaled to length √E_W by the caller.
        method: ``projected`` gradient with step 1/L; ``accelerated`` (FISTA with restarts); ``spectral`` (projected
            gradient with Barzilai–Borwein steps and a non-monotone search, each row its own); ``riemannian``
            (gradient along great circles, features kept at full length).
        start: ``(M, D)`` first features; by default random on the sphere from ``seed``.
        tolerance: stop when every row's gradient points against the row to within this angle (in radians) or, for
            losses whose gradient has a zero, has fallen to this fraction of its first length.
        every: keep every so many iterations in the history.
        callback: called with the iteration and the features.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if method == "riemannian" and model.constraint != "vector":
        raise InputError('method="riemannian" moves on spheres and needs constraint="vector"')
    if model.nonnegative:
        raise InputError("nonnegative features are solved together with the class vectors: use solve_joint")
    h = model.project_features(model.random_features(seed) if start is None else start.to(torch.float64))
    coupled = model.constraint == "average"
    # A loss that always falls with scale has no zero of its gradient: a small one only says that s is large.
    # Dot regression's gradient is of second order in the angle: where that is about 1e-7 it is all rounding.
    smallest = max(tolerance**2, 1e-15 * math.sqrt(model.dim)) if model.loss == "dr" else tolerance
    smallest = 0.0 if model.logit_loss.shift_invariant and model.constraint != "penalty" else smallest

    def dot(a: Tensor, b: Tensor) -> Tensor:  # per row, or over all rows where the limit couples them
        return (a * b).sum() if coupled else (a * b).sum(1, keepdim=True)

    def values(x: Tensor) -> Tensor:
        rows = model.row_values(vectors, x)
        return rows.sum() if coupled else rows[:, None]

    def gradient(x: Tensor) -> Tensor:
        return model.gradients(vectors, x)[1]

    def settled(x: Tensor, g: Tensor) -> bool:
        small = dot(g, g).sqrt() <= smallest * first
        if model.constraint == "penalty":
            return bool(small.all())
        flat_x, flat_g = (x.reshape(1, -1), g.reshape(1, -1)) if coupled else (x, g)
        radius = math.sqrt(model.energy_h * (model.num_classes if coupled else 1))
        aligned = (flat_x / radius + _unit(flat_g)).norm(dim=1, keepdim=True) <= tolerance
        return bool((aligned | small).all())

    weights = model.weights[:, None]
    bound = weights * model.logit_loss.smoothness * float(torch.linalg.matrix_norm(vectors, 2)) ** 2
    if model.constraint == "penalty":
        bound = bound + model.lambda_h * model.num_samples[:, None]
    g = gradient(h)
    first = dot(g, g).sqrt().clamp(min=1e-300)
    history: dict[str, list[float]] = {"iteration": [], "value": [], "gap": []}

    def record(iteration: int) -> None:
        history["iteration"].append(iteration)
        history["value"].append(float(model.row_values(vectors, h).sum()))
        history["gap"].append(feature_gap(model, vectors, h))
        if callback is not None:
            callback(iteration, h)

    record(0)
    step = 1 / (bound.max() if method != "spectral" or coupled else bound)
    recent = [values(h)]
    momentum, ahead = 1.0, h
    iteration = 0
    done = settled(h, g)
    while not done and iteration < max_iterations:
        iteration += 1
        if method == "projected":
            h = model.project_features(h - step * g)
            g = gradient(h)
        elif method == "riemannian":
            h = great_circle(h, -_tangent(h, g) / (bound + g.norm(dim=1, keepdim=True) / math.sqrt(model.energy_h)))
            g = gradient(h)
        elif method == "accelerated":
            new = model.project_features(ahead - step * gradient(ahead))
            if float(((ahead - new) * (new - h)).sum()) > 0:  # O'Donoghue & Candès 2015: forget the momentum
                momentum = 1.0
            later = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
            ahead = new + (momentum - 1) / later * (new - h)
            h, momentum = new, later
            g = gradient(h)
        else:
            h, g, step = _spectral_step(model, h, g, step, torch.stack(recent).amax(0), values, gradient, dot)
            recent = [*recent[-7:], values(h)]
        done = settled(h, g)
        if iteration % every == 0 or done:
            record(iteration)
    value = float(model.objective(vectors, h, fixed=True))
    return Solution(vectors, h, value, feature_gap(model, vectors, h), iteration, done, history)


def _spectral_step(model, h, g, step, highest, values, gradient, dot):
    """One projected Barzilai–Borwein step with a non-monotone Armijo search (Birgin, Martínez & Raydan 2000)."""
    for _ in range(60):
        new = model.project_features(h - step * g)
        move = new - h
        enough = values(new) <= highest + 1e-4 * dot(g, move) + 1e-14 * highest.abs()
        if bool(enough.all()):
            break
        step = torch.where(enough, step, 0.25 * step)
    later = gradient(new)
    moved, turned = dot(move, move), dot(move, later - g)
    longer = torch.where(turned > 0, moved / turned.clamp(min=1e-300), 10 * step)
    return new, later, torch.where(moved > 0, longer.clamp(max=1e100), step)


def _tangent(points: Tensor, directions: Tensor) -> Tensor:
    units = _unit(points)
    return directions - (directions * units).sum(1, keepdim=True) * units


def great_circle(points: Tensor, tangents: Tensor) -> Tensor:
    """Exponential map of spheres: rows move along ``tangents`` by their length, ``(M, D)`` each; radii are kept."""
    radius = points.norm(dim=1, keepdim=True)
    angle = tangents.norm(dim=1, keepdim=True) / radius
    moved = torch.cos(angle) * points + torch.sinc(angle / math.pi) * tangents
    return radius * _unit(moved)


def minimise(
    function: Callable[[Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    *,
    tolerance: float = 1e-11,
    max_iterations: int = 1000,
    memory: int = 30,
    patience: int = 300,
) -> tuple[Tensor, int]:
    """L-BFGS on a flat float64 vector; ``function`` returns value and gradient.

    Armijo search with a slack of a few roundings, so that it keeps going on gradients alone once the value no longer
    changes. Stops when ‖g‖ ≤ tolerance·max(1, ‖x‖), or when neither value nor ‖g‖ has fallen for ``patience`` iterations.
    """
    x = start.clone()
    value, g = function(x)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    iteration = 0
    best, stalled = float(g.norm()), 0
    while float(g.norm()) > tolerance * max(1.0, float(x.norm())) and iteration < max_iterations and stalled < patience:
        q, kept = g.clone(), []
        for s, y, rho in reversed(pairs):
            alpha = rho * (s @ q)
            q -= alpha * y
            kept.append(alpha)
        if pairs:
            s, y, rho = pairs[-1]
            q *= 1 / (rho * (y @ y))
        else:
            q /= max(1.0, float(g.norm()))
        for (s, y, rho), alpha in zip(pairs, reversed(kept), strict=True):
            q += (alpha - rho * (y @ q)) * s
        slope = -(g @ q)
        if slope >= 0:
            pairs, q, slope = [], g.clone(), -(g @ g)
        step = 1.0
        for _ in range(40):
            new = x - step * q
            new_value, new_g = function(new)
            if new_value <= value + 1e-4 * step * slope + 2e-15 * (abs(value) + 1e-300):
                break
            step *= 0.5
        s, y = new - x, new_g - g
        if s @ y > 1e-12 * s.norm() * y.norm():
            pairs = [*pairs[-(memory - 1) :], (s, y, 1 / (s @ y))]
        fell = float(new_value) < float(value) - 1e-12 * abs(float(value)) or float(new_g.norm()) < 0.99 * best
        x, value, g = new, new_value, new_g
        iteration += 1
        stalled = 0 if fell else stalled + 1
        best = min(best, float(g.norm()))
    return x, iteration


def solve_joint(
    model: PeeledModel,
    *,
    method: str | None = None,
    seed: int = 0,
    tolerance: float = 1e-11,
    max_iterations: int = 3000,
    certify: bool = True,
) -> Solution:
    """Solve for class vectors and features together, from a random start.

    Args:
        model: the problem.
        method: ``projected`` gradient, for every model; ``riemannian`` gradient, along great circles at full length
            (``vector``: of each row; ``average``: of W and of H as a whole). By default ``riemannian`` where a loss
            that falls with scale ends at full length, else ``projected``. Both take Barzilai–Borwein steps.
        tolerance: stop where a step of size 1 moves no further than this.

    The problem is not convex in (W, H): the returned gap tells whether the global optimum was met.

    Raises:
        InputError: for a method that the model does not allow.
    """
    if method is None:
        full = model.constraint != "penalty" and model.logit_loss.shift_invariant
        method = "riemannian" if full else "projected"
    if method not in JOINT_METHODS:
        raise unknown("method", method, JOINT_METHODS)
    if method == "riemannian" and model.constraint == "penalty":
        raise InputError('method="riemannian" moves on spheres and needs constraint="vector" or "average"')
    w, h = model.random_vectors(seed), model.random_features(seed)
    if model.constraint == "penalty":
        w, h = w / math.sqrt(model.energy_w), h / math.sqrt(model.energy_h)
    w, h, iterations = _joint_gradient(
        model, w, h, riemannian=method == "riemannian", tolerance=tolerance, max_iterations=max_iterations
    )
    gap = joint_gap(model, w, h) if certify else math.nan
    return Solution(w, h, float(model.objective(w, h)), gap, iterations, iterations < max_iterations)


def _joint_gradient(
    model: PeeledModel, w: Tensor, h: Tensor, *, riemannian: bool, tolerance: float, max_iterations: int
) -> tuple[Tensor, Tensor, int]:
    """Gradient descent on both, projected or along great circles, with a non-monotone Armijo search.

    Features of a class of weight n/N take a step that is longer by N/(Kn) where rows are limited one by one: they would
    lag behind by the class ratio otherwise.
    """
    whole = model.constraint == "average"
    scale = 1.0 if whole else 1 / (model.num_classes * model.weights[:, None])

    def spheres(rows: Tensor) -> Tensor:
        return rows.reshape(1, -1) if whole else rows

    def gradient(w: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        gw, gh = model.gradients(w, h)
        if riemannian:
            gw, gh = (_tangent(spheres(x), spheres(g)).reshape(g.shape) for x, g in ((w, gw), (h, gh)))
        return gw, gh

    def moved(w: Tensor, h: Tensor, gw: Tensor, gh: Tensor, step: float) -> tuple[Tensor, Tensor]:
        if not riemannian:
            return model.project_vectors(w - step * gw), model.project_features(h - step * scale * gh)
        along = ((w, -step * gw), (h, -step * scale * gh))
        return tuple(great_circle(spheres(x), spheres(t)).reshape(x.shape) for x, t in along)

    def inner(aw: Tensor, ah: Tensor, bw: Tensor, bh: Tensor) -> float:
        return float((aw * bw).sum() + (ah * bh).sum())

    gw, gh = gradient(w, h)
    recent, step, iteration = [float(model.objective(w, h))], 1.0, 0
    while iteration < max_iterations:
        ahead_w, ahead_h = moved(w, h, gw, gh, 1.0)
        far = math.sqrt(inner(ahead_w - w, ahead_h - h, ahead_w - w, ahead_h - h))
        if far <= tolerance or recent[-1] <= tolerance**2:  # no loss is negative
            break
        iteration += 1
        for _ in range(60):
            new_w, new_h = moved(w, h, gw, gh, step)
            value = float(model.objective(new_w, new_h))
            dw, dh = new_w - w, new_h - h
            if value <= max(recent) + 1e-4 * inner(gw, gh, dw, dh) + 2e-15 * abs(recent[-1]):
                break
            step *= 0.25
        later_w, later_h = gradient(new_w, new_h)
        turned = inner(dw, dh, later_w - gw, later_h - gh)
        size = inner(dw, dh / scale, dw, dh)
        step = min(size / turned, 1e6) if turned > 0 else 10 * step
        w, h, gw, gh = new_w, new_h, later_w, later_h
        recent = [*recent[-7:], value]
    return w, h, iteration
