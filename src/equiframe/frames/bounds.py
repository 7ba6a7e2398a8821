r"""How small the largest cosine of K unit vectors in R^D can be: lower bounds, each with its range.

`simplex_bound`      −1/(K−1), every K; attained for K ≤ D+1
`rankin_bound`       0 for K > D+1; attained for K ≤ 2D (Rankin 1955)
`levenshtein_bound`  for K > 2D; attained by the icosahedron, E8, the Leech lattice's shortest vectors, … (Levenshtein 1979, 1992)
`welch_bound`        of the largest *absolute* cosine; K > D; attained by equiangular tight frames (Welch 1974)
`line_bound`         of the largest *absolute* cosine; K > D(D+1)/2; attained by D/2 + 1 unbiased bases (Levenshtein 1992)

A frame with the negatives of its vectors is K/2 lines: the last two bound it, and only it and its like.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from equiframe.errors import InputError
from equiframe.frames.base import check_size


def simplex_bound(num_classes: int) -> float:
    """−1/(K−1), for every K ≥ 2: the squared length of Σ_k m_k is K + Σ cosines ≥ 0."""
    return -1.0 / (num_classes - 1)


def rankin_bound(num_classes: int, dim: int) -> float:
    """0 for K > D+1 (Rankin, *The closest packing of spherical caps in n dimensions*, 1955)."""
    if num_classes <= dim + 1:
        raise InputError(f"Rankin's bound is for K > D+1, got K={num_classes}, D={dim}")
    return 0.0


def welch_bound(num_classes: int, dim: int) -> float:
    r"""Largest absolute cosine: :math:`\sqrt{(K-D)/(D(K-1))}` for K > D (Welch 1974)."""
    if num_classes <= dim:
        raise InputError(f"Welch's bound is for K > D, got K={num_classes}, D={dim}")
    return math.sqrt((num_classes - dim) / (dim * (num_classes - 1)))


def line_bound(num_lines: int, dim: int) -> float:
    r"""Largest absolute cosine s between M lines: :math:`M \le D(D+2)(1-s^2)/(3-(D+2)s^2)`, for M > D(D+1)/2 (Levenshtein 1992).

    Solved for s; Welch's bound where M is smaller. Valid up to M = D(D+1)(D+2)/6, where the next bound of the family takes over.
    """
    m, n = num_lines, dim
    if m <= n * (n + 1) // 2:
        return welch_bound(m, n)
    if m > n * (n + 1) * (n + 2) // 6:
        raise InputError(f"the line bound is for at most D(D+1)(D+2)/6 lines, got {m} in D={n} dimensions")
    return math.sqrt((3 * m - n * (n + 2)) / ((n + 2) * (m - n)))


def _gegenbauer(n: int, degree: int, s: float) -> list[float]:
    """P_0(s) … P_degree(s), the Gegenbauer polynomials of R^n with P_i(1) = 1."""
    values = [1.0, s]
    for i in range(1, degree):
        values.append(((2 * i + n - 2) * s * values[i] - i * values[i - 1]) / (i + n - 2))
    return values[: degree + 1]


def _odd(n: int, k: int, s: float) -> float:
    """L_{2k−1}(n, s)."""
    *_, before, last = _gegenbauer(n, k, s)
    return math.comb(k + n - 3, k - 1) * ((2 * k + n - 3) / (n - 1) - (before - last) / ((1 - s) * last))


def _even(n: int, k: int, s: float) -> float:
    """L_{2k}(n, s)."""
    *_, last, after = _gegenbauer(n, k + 1, s)
    ratio = (1 + s) * (last - after) / ((1 - s) * (last + after))
    return math.comb(k + n - 2, k) * ((2 * k + n - 1) / (n - 1) - ratio)


def design_size(dim: int, strength: int) -> int:
    """The least size of a spherical design of that strength, where one Levenshtein bound hands over to the next
    (Delsarte, Goethals & Seidel 1977)."""
    k, n = strength // 2, dim
    if strength % 2:
        return 2 * math.comb(n + k - 1, n - 1)
    return math.comb(n + k - 1, n - 1) + (math.comb(n + k - 2, n - 1) if k else 0)


def _largest_root(n: int, k: int) -> tuple[float, float]:
    """The second largest (or −1) and the largest root of P_k, the eigenvalues of its Jacobi matrix."""
    import numpy as np

    i = np.arange(1, k)
    off = np.sqrt(i * (i + n - 3) / ((2 * i + n - 2) * (2 * i + n - 4))) if n > 2 else np.r_[0.5**0.5, np.full(k, 0.5)]
    roots = np.linalg.eigvalsh(np.diag(off[: k - 1], 1) + np.diag(off[: k - 1], -1))
    return (float(roots[-2]) if k > 1 else -1.0), float(roots[-1])


def _solve(function: Callable[[float], float], value: float, low: float, high: float) -> float:
    """Where an increasing function takes a value, by bisection to the last bit."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if function(middle) < value else (low, middle)
    return middle


def _solve_odd(n: int, k: int, value: float) -> float:
    low, high = _largest_root(n, k)
    return _solve(lambda s: _odd(n, k, s), value, math.nextafter(low, 1), math.nextafter(high, -1))


def levenshtein_bound(num_classes: int, dim: int) -> float:
    r"""The s at which Levenshtein's bound L_τ(D, s) on the number of vectors with cosines ≤ s reaches K; K > 2D, D ≥ 3.

    .. math:: L_{2k-1}(n,s) &= \tbinom{k+n-3}{k-1}\Bigl[\tfrac{2k+n-3}{n-1} - \tfrac{P_{k-1}(s)-P_k(s)}{(1-s)P_k(s)}\Bigr] \\
              L_{2k}(n,s) &= \tbinom{k+n-2}{k}\Bigl[\tfrac{2k+n-1}{n-1}
                             - \tfrac{(1+s)(P_k(s)-P_{k+1}(s))}{(1-s)(P_k(s)+P_{k+1}(s))}\Bigr]

    with P_i the Gegenbauer polynomials of R^n, and τ such that K lies between the least sizes of spherical τ- and
    (τ+1)-designs. Source: Levenshtein, *Designs as maximum codes in polynomial metric spaces*, 1992. For D = 2
    the regular polygon's cos(2π/K) is the exact answer.

    >>> round(levenshtein_bound(240, 8), 12), round(levenshtein_bound(12, 3) ** -2, 12)
    (0.5, 5.0)
    """
    num_classes, n = check_size(num_classes, dim)
    if num_classes <= 2 * n or n < 2:
        raise InputError(f"Levenshtein's bound is for K > 2D and D >= 2, got K={num_classes}, D={n}")
    if n == 2:
        return math.cos(2 * math.pi / num_classes)
    strength = 3
    while design_size(n, strength + 1) <= num_classes:
        strength += 1
    k = (strength + 1) // 2
    if strength % 2:
        return _solve_odd(n, k, num_classes)
    low = _solve_odd(n, k, design_size(n, strength))
    high = _solve_odd(n, k + 1, design_size(n, strength + 1))
    return _solve(lambda s: _even(n, k, s), num_classes, low, high)


def lower_bound(num_classes: int, dim: int) -> tuple[str, float]:
    """The best of these bounds on the largest cosine: its name and value."""
    num_classes, dim = check_size(num_classes, dim)
    if num_classes <= dim + 1:
        return "simplex", simplex_bound(num_classes)
    if num_classes <= 2 * dim:
        return "Rankin", rankin_bound(num_classes, dim)
    if dim == 1:
        return "only two unit vectors exist", 1.0
    return "Levenshtein", levenshtein_bound(num_classes, dim)
