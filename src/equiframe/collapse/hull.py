r"""Generalised neural collapse for K > D+1: how far each class vector is from the hull of the others, by a proper QP.

.. math:: d_k = \min_{\alpha \ge 0,\ \sum_j \alpha_j = 1} \Big\| w_k - \sum_{j\ne k} \alpha_j w_j \Big\|_2 .
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from equiframe.errors import InputError


def min_norm_point(points: np.ndarray, *, tolerance: float = 1e-14) -> np.ndarray:
    """The point of least norm in the convex hull of the rows ``(n, D)``; returns ``(D,)`` (Wolfe 1976, active set).

    Stops when no point lies nearer along it: ‖x‖² ≤ x·p + ``tolerance``·max‖p‖² for all p, which bounds ‖x‖² from above
    by the optimum and that gap. Finite: each major cycle has a new set of affinely independent points.
    """
    squares = (points**2).sum(1)
    gap = tolerance * squares.max()
    active = [int(squares.argmin())]
    weights = np.ones(1)
    nearest = points[active[0]]
    for _ in range(50 * len(points)):
        along = points @ nearest
        entering = int(along.argmin())
        if nearest @ nearest - along[entering] <= gap or entering in active:
            return nearest
        active.append(entering)
        weights = np.append(weights, 0.0)
        while True:
            chosen = points[active]
            affine = _affine_weights(chosen)
            if (affine > 1e-12).all():
                weights = affine
                break
            falling = affine <= 1e-12
            fall = weights - affine
            steps = np.divide(weights, fall, out=np.full_like(fall, np.inf), where=falling & (fall > 0))
            step = min(1.0, steps.min())
            weights = weights + step * (affine - weights)
            weights[int(steps.argmin())] = 0.0
            keep = weights > 1e-12
            active = [a for a, k in zip(active, keep, strict=True) if k]
            weights = weights[keep] / weights[keep].sum()
        nearest = weights @ points[active]
    raise ArithmeticError("the min-norm point did not converge")  # cycles only by rounding; never seen


def _affine_weights(points: np.ndarray) -> np.ndarray:
    """Weights (sum 1, any sign) of the point of least norm in the affine hull."""
    scale = (points**2).sum() / len(points) or 1.0
    gram = points @ points.T + scale  # adding 11ᵀ changes nothing under the sum and makes it regular
    try:
        u = np.linalg.solve(gram, np.ones(len(points)))
    except np.linalg.LinAlgError:
        u = np.linalg.lstsq(gram, np.ones(len(points)), rcond=None)[0]
    return u / u.sum()


def one_vs_rest_distances(vectors: Tensor, *, classes: Sequence[int] | None = None) -> Tensor:
    r"""One-vs-rest distance :math:`\min_{j\ne k}` of ``w_k`` to conv{w_j, j ≠ k}, for each class: ``(K,)`` float64.

    Vectors ``(K, D)`` are taken as they are; the literature normalises them to length 1 first. Range [0, ∞): K/(K−1)
    for a unit simplex, 1 for a full orthoplex, 1 − cos(2π/K) for K points on a circle; 0 if w_k is inside the hull.
    Its minimum is the margin that softmax codes maximise. Source: Jiang et al. (2023), generalised NC2.

    Classes for which the foot of the perpendicular to the affine hull lies in the hull are solved together, in closed
    form; each other one is a quadratic programme (`min_norm_point`): milliseconds up to D ≈ 100, seconds for D ≈ 1,000,
    so name ``classes`` if K is large.
    """
    if vectors.ndim != 2 or len(vectors) < 2:
        raise InputError(f"one-vs-rest distances need vectors (K >= 2, D), got {tuple(vectors.shape)}")
    w = vectors.detach().double().cpu().numpy()
    wanted = range(len(w)) if classes is None else classes
    direct = _perpendicular_distances(w)
    distances = [
        direct[k] if np.isfinite(direct[k]) else np.linalg.norm(min_norm_point(np.delete(w, k, axis=0) - w[k]))
        for k in wanted
    ]
    return torch.tensor(np.array(distances), dtype=torch.float64)


def _perpendicular_distances(w: np.ndarray) -> np.ndarray:
    """Distances of affinely independent vectors from the affine hulls of the others, NaN where the foot lies outside
    the hull. With C⁺ the pseudo-inverse of the centred Gram matrix, d_k² = 1/C⁺_kk and the weights are −C⁺_jk/C⁺_kk."""
    num = len(w)
    none = np.full(num, np.nan)
    if num > w.shape[1] + 1 or not np.isfinite(w).all():
        return none
    _, singular, right = np.linalg.svd((w - w.mean(0)).T, full_matrices=False)
    singular, right = singular[: num - 1], right[: num - 1]
    if singular[-1] <= 1e-8 * singular[0]:
        return none
    inverse = (right.T / singular**2) @ right
    own = inverse.diagonal().copy()
    worst = (inverse - np.diag(own)).max(1)  # the diagonal is positive, its zeros do not hide a positive entry
    return np.where(worst <= 1e-12 * own, own**-0.5, np.nan)
