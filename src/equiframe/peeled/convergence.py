r"""How fast the angle to the class vector falls on the fixed simplex frame: Theorem 2, looked at.

A feature on the sphere that starts in the plane of its own and one other class vector stays there under each of these
losses, so Riemannian gradient descent is a map of one number θ. Steps are in units of E_H: θ ← θ − η·L'(θ), with
L' the derivative in θ and η the step size over E_H.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from equiframe.errors import unknown

CONTENDERS = ("ce", "dr", "angular", "cosine")


def slope(loss: str, theta: Tensor, scale: float | Tensor, num_classes: int, *, away: bool = False) -> Tensor:
    r"""dL/dθ for a feature :math:`\cos\theta\,w_c + \sin\theta\,u`, u pointing towards another class vector w_j.

    ``dr``: s(1−cos θ) sin θ. ``angular``: sθ. ``cosine``: s·sin θ. ``ce``: from the three kinds of logits
    (own, that of j, the K−2 others), written so that nothing cancels near θ = 0.

    Args:
        away: u points away from w_j, hence a little towards all the others; only ``ce`` can tell.
    """
    sin, half = torch.sin(theta), torch.sin(theta / 2)
    if loss == "dr":
        return scale * 2 * half**2 * sin
    if loss == "angular":
        return scale * theta
    if loss == "cosine":
        return scale * sin
    if loss != "ce":
        raise unknown("loss", loss, CONTENDERS)
    k = num_classes
    cos = torch.cos(theta)
    if k == 2:  # the other class vector is −w_c, whatever u is
        return 2 * scale * sin * torch.sigmoid(-2 * scale * cos)
    rho = -1 / (k - 1)
    sigma = (-1 if away else 1) * math.sqrt(1 - rho**2)
    own, near = scale * cos, scale * (rho * cos + sigma * sin)
    far = -(own + near) / (k - 2)
    lead = scale * (k - 1) / (k - 2) * sigma * sin  # near − far
    log_total = torch.logsumexp(torch.stack([own, near, far + math.log(k - 2)]), 0)
    p_far = torch.exp(far - log_total)
    p_lead = torch.where(lead < 1, p_far * torch.expm1(lead.clamp(max=1)), torch.exp(near - log_total) - p_far)
    missing = (k - 1) * p_far + p_lead  # 1 − p_c
    return p_lead * scale * (sigma * cos - rho * sin) + (p_far + missing) * scale * sin


def curvature_at_optimum(loss: str, scale: float, num_classes: int) -> float:
    r"""Riemannian Hessian in θ at θ = 0, in the span of the frame.

    ``dr``: 0. ``angular``, ``cosine``: s. ``ce``: :math:`K q s\,(1 + s/(K-1))` with
    :math:`q = 1/(e^{sK/(K-1)} + K - 1)`.
    """
    if loss == "dr":
        return 0.0
    if loss in ("angular", "cosine"):
        return scale
    if loss != "ce":
        raise unknown("loss", loss, CONTENDERS)
    k = num_classes
    q = math.exp(-scale * k / (k - 1)) / (1 + (k - 1) * math.exp(-scale * k / (k - 1)))
    return k * q * scale * (1 + scale / (k - 1))


def largest_curvature(loss: str, scale: float, num_classes: int, theta: float, *, away: bool = False) -> float:
    """The largest |L''| on [0, θ], by differences on a fine grid: a step of 1 over it does not overshoot there."""
    grid = torch.linspace(1e-6, theta, 4001, dtype=torch.float64)
    values = slope(loss, grid, scale, num_classes, away=away)
    return float((values.diff() / grid.diff()).abs().max())


def descend(
    loss: str,
    scales: Tensor,
    *,
    num_classes: int,
    step: float | Tensor,
    start: float,
    iterations: int,
    away: bool = False,
) -> tuple[Tensor, Tensor]:
    """Riemannian gradient descent on θ, all scales ``(S,)`` side by side.

    Returns:
        Iterations ``(T,)``, 0 first and then about 40 to a decade, and the angles there ``(T, S)``, float64.
    """
    scales = scales.to(torch.float64)
    theta = torch.full_like(scales, start)
    spread = torch.logspace(0, math.log10(iterations), max(2, int(40 * math.log10(iterations))), dtype=torch.float64)
    marks = sorted({0, *spread.round().long().tolist()})
    wanted, kept = set(marks), []
    for iteration in range(iterations + 1):
        if iteration in wanted:
            kept.append(theta)
        theta = (theta - step * slope(loss, theta, scales, num_classes, away=away)).abs()
    return torch.tensor(marks), torch.stack(kept)


def _time_to(loss: str, grid: Tensor, scale: float, num_classes: int, away: bool) -> Tensor:
    """Time of the gradient flow from grid[0] down to each angle of a falling grid (trapezoid in log θ)."""
    density = grid / slope(loss, grid, scale, num_classes, away=away)
    pieces = 0.5 * (density[1:] + density[:-1]) * -torch.log(grid).diff()
    return torch.cat([grid.new_zeros(1), pieces.cumsum(0)])


def measured_order(iterations: Tensor, theta: Tensor) -> float:
    """Slope of log θ against log t over the last decade: −½ for dot regression, steeper and steeper if linear."""
    late = iterations >= iterations[-1] / 10
    x, y = torch.log(iterations[late].to(torch.float64)), torch.log(theta[late])
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / x.square().sum())


def measured_contraction(loss: str, *, scale: float, num_classes: int, step: float, start: float = 1e-4) -> float:
    """1 − θ_{t+1}/θ_t near the optimum, to be held against step × `curvature_at_optimum`."""
    theta = torch.tensor(start, dtype=torch.float64)
    return float(step * slope(loss, theta, scale, num_classes) / theta)


def race(
    scales: Tensor, targets: Tensor, *, num_classes: int, start: float, own_step: bool = False, away: bool = False
) -> Tensor:
    """log10(time of cross-entropy / time of dot regression) to reach each target angle from ``start``, ``(S, T)``.

    Positive: dot regression is ahead. With ``own_step`` each loss runs at one over its largest curvature between
    start and optimum; otherwise both take the same step. Times are those of the gradient flow, which are iterations ×
    step for small steps.
    """
    table = torch.empty(len(scales), len(targets), dtype=torch.float64)
    grid = torch.logspace(math.log10(start), math.log10(float(targets.min())), 3000, dtype=torch.float64)
    place = torch.searchsorted(-grid, -targets.to(torch.float64)).clamp(max=len(grid) - 1)
    for row, scale in enumerate(scales.tolist()):
        times = []
        for loss in ("ce", "dr"):
            time = _time_to(loss, grid, scale, num_classes, away)[place]
            times.append(time * (largest_curvature(loss, scale, num_classes, start, away=away) if own_step else 1.0))
        table[row] = torch.log10(times[0] / times[1])
    return table


def break_even_scale(
    target: float, *, num_classes: int, start: float, own_step: bool = False, away: bool = False
) -> float:
    """The scale s above which dot regression reaches ``target`` before cross-entropy; 0 or inf if always or never."""
    low, high = 1e-2, 200.0

    def ahead(scale: float) -> float:
        pair = torch.tensor([scale], dtype=torch.float64), torch.tensor([target], dtype=torch.float64)
        return float(race(*pair, num_classes=num_classes, start=start, own_step=own_step, away=away))

    if ahead(low) > 0:
        return 0.0
    if not ahead(high) > 0:
        return math.inf
    while high / low > 1 + 1e-4:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if ahead(middle) > 0 else (middle, high)
    return high
