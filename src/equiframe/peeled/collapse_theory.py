r"""Minority collapse by symmetry: step imbalance, K_A major classes of R samples and K_B minor ones of 1.

The problem in the logits Z is convex and does not change when classes within a group are permuted, so an optimum has
the same symmetry, and so do the Gram matrices of W and H. What is left are four numbers, whatever K and D ≥ K−1: an
angle for each of w_A, h_A, w_B, h_B (``vector``), or four coefficients of Z (``average``, ``penalty``).
The derivations are in ``docs/theory.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from equiframe.errors import InputError, unknown
from equiframe.peeled.model import CONSTRAINTS
from equiframe.peeled.solve import minimise


@dataclass(frozen=True)
class StepProblem:
    """Cross-entropy with a learned classifier; ``num_major`` classes of R·``unit`` samples, ``num_minor`` of ``unit``.

    Attributes:
        scale: s = √(E_W E_H), for ``vector`` and ``average``.
        penalty: μ = √(λ_W λ_H), for ``penalty``; only μ√``unit`` matters.
    """

    num_major: int
    num_minor: int
    constraint: str = "average"
    scale: float = 1.0
    penalty: float = 5e-3
    unit: float = 1.0

    def __post_init__(self) -> None:
        if self.num_minor < 2 or self.num_major < 2:
            raise InputError(
                "minority collapse is computed for at least 2 major and 2 minor classes, "
                f"got {self.num_major} and {self.num_minor}"
            )
        if self.constraint not in CONSTRAINTS:
            raise unknown("constraint", self.constraint, CONSTRAINTS)

    @property
    def num_classes(self) -> int:
        return self.num_major + self.num_minor

    @property
    def unit_penalty(self) -> float:
        """μ√n_B: the penalty in units of one minor sample."""
        return self.penalty * math.sqrt(self.unit)

    def proportions(self, ratio: float) -> tuple[float, float]:
        """n_A/N and n_B/N."""
        total = self.num_major * ratio + self.num_minor
        return ratio / total, 1 / total

    def mean_loss(self, ratio: float, margins: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy; margins of z_c over its own and over the other group: own_A, cross_A, own_B, cross_B."""
        own_a, cross_a, own_b, cross_b = margins
        share_a, share_b = self.proportions(ratio)
        major = _log_odds(own_a, self.num_major, cross_a, self.num_minor)
        minor = _log_odds(own_b, self.num_minor, cross_b, self.num_major)
        loss = torch.nn.functional.softplus(torch.stack([major, minor]).logsumexp(1), threshold=700.0)
        return self.num_major * share_a * loss[0] + self.num_minor * share_b * loss[1]


def _log_odds(own: Tensor, size: int, cross: Tensor, others: int) -> Tensor:
    """log of Σ e^{z_j − z_c} over the other classes of the own group and over the other group, ``(2,)``."""
    return torch.stack([math.log(size - 1) - own, math.log(others) - cross])


def _solve(objective: Callable[[Tensor], Tensor], start: list[float]) -> Tensor:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_(True)
        with torch.enable_grad():
            value = objective(x)
            (gradient,) = torch.autograd.grad(value, x)
        return value.detach(), gradient

    return minimise(
        function, torch.tensor(start, dtype=torch.float64), tolerance=1e-12, max_iterations=2000, memory=12, patience=80
    )[0]


# --- vector: four angles ---------------------------------------------------------------------------------------------


def _vector_margins(problem: StepProblem, angles: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Margins for w_A, h_A, w_B, h_B at ``angles`` towards the axis e that separates the groups.

    w_A = √E_W (cos φ · simplex vector of A + sin φ · e), w_B = √E_W (cos φ · simplex vector of B − sin φ · e).
    """
    s, ka, kb = problem.scale, problem.num_major, problem.num_minor
    cos, sin = torch.cos(angles), torch.sin(angles)
    spread_a, spread_b = s * cos[0] * cos[1], s * cos[2] * cos[3]
    apart = s * (sin[0] + sin[2])
    return (
        spread_a * ka / (ka - 1),
        spread_a + sin[1] * apart,
        spread_b * kb / (kb - 1),
        spread_b + sin[3] * apart,
    )


def _vector_angles(problem: StepProblem, ratio: float, *, collapsed: bool) -> Tensor:
    def full(x: Tensor) -> Tensor:
        return torch.cat([x, x.new_full((2,), math.pi / 2)]) if collapsed else x

    start = [0.4, 0.4] if collapsed else [0.4, 0.4, 0.6, 0.6]
    return full(_solve(lambda x: problem.mean_loss(ratio, _vector_margins(problem, full(x))), start))


def _vector_excess(problem: StepProblem, ratio: float) -> float:
    """½ log(x_B y_B N²/n_B²) at the collapsed optimum, which is the optimum iff this is ≥ 0."""
    share_a, share_b = problem.proportions(ratio)
    angles = _vector_angles(problem, ratio, collapsed=True)
    own_a, cross_a, _, cross_b = _vector_margins(problem, angles)
    sin_w, sin_h = torch.sin(angles[:2]).tolist()
    to_one_minor = float(_major_probabilities(problem, own_a, cross_a)[2]) / problem.num_minor
    to_majors = 1 / (1 + problem.num_minor / problem.num_major * math.exp(float(cross_b)))
    x = share_b * to_majors * (1 + sin_w)  # multiplier of ‖h_B‖², times E_H / s
    y = problem.num_major * share_a * to_one_minor * sin_h + share_b * to_majors  # of ‖w_B‖², times E_W / s
    return 0.5 * math.log(x * y) - math.log(share_b) if x * y > 0 else -math.inf


def _major_probabilities(problem: StepProblem, own: Tensor, cross: Tensor) -> Tensor:
    """Probabilities of a major sample: its class, the other major classes together, the minor ones together."""
    odds = _log_odds(own, problem.num_major, cross, problem.num_minor)
    return torch.softmax(torch.cat([odds.new_zeros(1), odds]), 0)


# --- average and penalty: four coefficients --------------------------------------------------------------------------


def _norm_weights(problem: StepProblem, ratio: float) -> tuple[float, float]:
    """Weights of the two groups' columns in the nuclear norm: √(n/n_B) for ``penalty``, else 1."""
    return (math.sqrt(ratio), 1.0) if problem.constraint == "penalty" else (1.0, 1.0)


def _coefficients(problem: StepProblem, ratio: float, *, collapsed: bool) -> Tensor:
    """(α_A, α_B, v_A, v_B) of the optimal Z = α_A P_A + α_B P_B + u(v_A e_A − v_B e_B)ᵀ."""
    ka, kb = problem.num_major, problem.num_minor
    weight_a, weight_b = _norm_weights(problem, ratio)

    # What each share of the norm must be for a margin of 1, so that all unknowns are of order 1 for every K and R.
    unit = torch.tensor(
        [(ka - 1) * weight_a, 0.0 if collapsed else (kb - 1) * weight_b, ka * math.sqrt(kb / (ka + kb)) * weight_a],
        dtype=torch.float64,
    )

    def parts(x: Tensor) -> Tensor:  # shares of the nuclear norm: simplex of A, simplex of B, the groups' contrast
        squares = unit * x[:3] ** 2
        return (
            squares
            if problem.constraint == "penalty"
            else problem.num_classes * problem.scale * squares / squares.sum()
        )

    def unpack(x: Tensor) -> Tensor:
        part = parts(x)
        return torch.stack(
            [
                part[0] / ((ka - 1) * weight_a),
                part[1] / ((kb - 1) * weight_b),
                part[2] * torch.cos(x[3]) / weight_a,
                part[2] * torch.sin(x[3]) / weight_b,
            ]
        )

    def objective(x: Tensor) -> Tensor:
        value = problem.mean_loss(ratio, _coefficient_margins(problem, unpack(x)))
        return value + problem.unit_penalty * parts(x).sum() if problem.constraint == "penalty" else value

    return unpack(_solve(objective, [1.0, 1.0, 1.0, math.pi / 4]))


def _coefficient_margins(problem: StepProblem, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ka, kb = problem.num_major, problem.num_minor
    tie = math.sqrt((ka + kb) / (ka * kb))
    return (
        z[0],
        z[0] * (1 - 1 / ka) + tie * z[2] / math.sqrt(ka),
        z[1],
        z[1] * (1 - 1 / kb) + tie * z[3] / math.sqrt(kb),
    )


# --- what the caller asks for ----------------------------------------------------------------------------------------


def minor_cosine(problem: StepProblem, ratio: float) -> float:
    """Cosine between two minor class vectors at the optimum: −1/(K−1) at R = 1, and 1 once they have collapsed.

    NaN where the minor class vectors are zero (from `vanishing_threshold` on).
    """
    ka, kb = problem.num_major, problem.num_minor
    if problem.constraint == "vector":
        phi = float(_vector_angles(problem, ratio, collapsed=False)[2])
        return math.sin(phi) ** 2 - math.cos(phi) ** 2 / (kb - 1)
    if _contrast_excess(problem, ratio) >= 0 and _simplex_excess(problem, ratio) >= 0:
        return math.nan
    # Under a penalty the threshold is known exactly: beyond it α_B is 0, not a small number.
    beyond = problem.constraint == "penalty" and ratio >= collapse_threshold(problem)
    z = _coefficients(problem, ratio, collapsed=beyond).tolist()
    weight_a, weight_b = _norm_weights(problem, ratio)
    own = z[1] * weight_b
    common = math.hypot(z[2] * weight_a, z[3] * weight_b) * ka / (ka + kb)
    size = own * (kb - 1) + common
    return (common - own) / size if size > 0 else math.nan


def optimal_value(problem: StepProblem, ratio: float) -> float:
    """The smallest mean cross-entropy (the penalty included, for ``penalty``)."""
    if problem.constraint == "vector":
        angles = _vector_angles(problem, ratio, collapsed=False)
        return float(problem.mean_loss(ratio, _vector_margins(problem, angles)))
    z = _coefficients(problem, ratio, collapsed=False)
    value = float(problem.mean_loss(ratio, _coefficient_margins(problem, z)))
    if problem.constraint == "penalty":
        a, b = _norm_weights(problem, ratio)
        norm = float(z[0]) * a * (problem.num_major - 1) + float(z[1]) * b * (problem.num_minor - 1)
        value += problem.unit_penalty * (norm + math.hypot(float(z[2]) * a, float(z[3]) * b))
    return value


def collapse_threshold(problem: StepProblem, *, highest: float = 1e12) -> float:
    r"""The ratio R* from which on the minor class vectors coincide; ``inf`` if it lies beyond ``highest``.

    - ``penalty``: :math:`\sqrt{n_B} = N\mu`, hence :math:`R^* = (1/(\mu\sqrt{n_B}) - K_B)/K_A`.
    - ``average``: the root of :math:`R\,(1 - p_{own} + p_{other}) = 1`, the probabilities those of a major sample for
      its own and for one other major class at the collapsed optimum.
    - ``vector``: the root of :math:`x_B y_B = (n_B/N)^2`, x and y the multipliers of ‖h_B‖² and ‖w_B‖² there.
    """
    if problem.constraint == "penalty":
        return max(1.0, (1 / problem.unit_penalty - problem.num_minor) / problem.num_major)

    def excess(log_ratio: float) -> float:
        if problem.constraint == "vector":
            return _vector_excess(problem, math.exp(log_ratio))
        z = _coefficients(problem, math.exp(log_ratio), collapsed=True)
        _, others, minors = _major_probabilities(problem, *_coefficient_margins(problem, z)[:2]).tolist()
        slack = minors + others + others / (problem.num_major - 1)
        return log_ratio + math.log(slack) if slack > 0 else -math.inf

    return _first_root(excess, highest)


def vanishing_threshold(problem: StepProblem, *, highest: float = 1e12) -> float:
    r"""The ratio from which on the minor class vectors are not only equal but zero; ``inf`` for ``vector``.

    Z is then the simplex of the major classes alone, α_A P_A, and the groups' contrast stays zero as long as

    .. math:: \lambda^2 \ge \frac{n_B^2}{N^2}\frac{K_A}{K} + \frac{n_A^2}{N^2}\,r^2 K K_B \quad (\texttt{average}), \qquad
              \mu^2 \ge \frac{n_B}{N^2}\frac{K_A}{K} + \frac{n_A}{N^2}\,r^2 K K_B \quad (\texttt{penalty}),

    r the probability that a major sample gives to one minor class, λ the multiplier of the budget.
    """
    if problem.constraint == "vector":
        return math.inf
    low = math.log(collapse_threshold(problem, highest=highest))
    return (
        _first_root(lambda x: _contrast_excess(problem, math.exp(x)), highest, low=low) if low < math.inf else math.inf
    )


def _major_simplex(problem: StepProblem, ratio: float) -> tuple[float, float]:
    """(multiplier of the norm, r) where Z = α_A P_A; the multiplier is μ√n_B for ``penalty``."""
    ka, kb = problem.num_major, problem.num_minor
    share = problem.proportions(ratio)[0] / _norm_weights(problem, ratio)[0]

    def multiplier(alpha: float) -> tuple[float, float]:
        other, minor = math.exp(-alpha), math.exp(-alpha * (1 - 1 / ka))
        odds = 1 + (ka - 1) * other + kb * minor
        return share * (ka * other + kb * minor) / odds, minor / odds  # 1 − p_own + p_other, without cancellation

    if problem.constraint == "average":
        return multiplier(problem.num_classes * problem.scale / (ka - 1))
    low, high = 0.0, 700.0
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if multiplier(middle)[0] > problem.unit_penalty else (low, middle)
    return problem.unit_penalty, multiplier(high)[1]


def _contrast_excess(problem: StepProblem, ratio: float) -> float:
    """log of the multiplier over what the contrast of the groups would gain where it is zero: it stays zero iff ≥ 0."""
    ka, kb, k = problem.num_major, problem.num_minor, problem.num_classes
    (share_a, share_b), (weight_a, weight_b) = problem.proportions(ratio), _norm_weights(problem, ratio)
    multiplier, minor = _major_simplex(problem, ratio)
    gain = (share_b / weight_b) ** 2 * ka / k + (share_a / weight_a * minor) ** 2 * k * kb
    return math.log(multiplier) - 0.5 * math.log(gain)


def _simplex_excess(problem: StepProblem, ratio: float) -> float:
    """The same for the differences between minor classes, which gain n_B/N."""
    share, weight = problem.proportions(ratio)[1], _norm_weights(problem, ratio)[1]
    return math.log(_major_simplex(problem, ratio)[0]) - math.log(share / weight)


def _first_root(excess: Callable[[float], float], highest: float, *, low: float = 0.0) -> float:
    """exp of the root of a rising function of log R, from ``low`` on; ``inf`` beyond ``highest``."""
    f_low, high = excess(low), low + 0.5
    if f_low >= 0:
        return math.exp(low)
    while (f_high := excess(high)) < 0:
        if high > math.log(highest):
            return math.inf
        low, f_low, high = high, f_high, 2 * high
    side = 0
    while high - low > 1e-9:  # regula falsi with the Illinois weights: the excess is nearly linear in log R
        share = f_low / (f_low - f_high) if math.isfinite(f_low) else 0.5
        middle = low + min(max(share, 1e-3), 1 - 1e-3) * (high - low)
        f_middle = excess(middle)
        if abs(f_middle) < 1e-11:
            return math.exp(middle)
        if f_middle >= 0:
            high, f_high, f_low, side = middle, f_middle, f_low / 2 if side == 1 else f_low, 1
        else:
            low, f_low, f_high, side = middle, f_middle, f_high / 2 if side == -1 else f_high, -1
    return math.exp(high)
