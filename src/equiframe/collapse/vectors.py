"""What sets of K vectors are measured by: pairs in tiles, so that K = 8,142 needs neither K×K×D nor even K×K numbers.

A *source* is a `ClassStatistics`, which stands for its centred class means, or a tensor ``(K, D)``, taken as it is.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from equiframe.collapse.statistics import ClassStatistics
from equiframe.errors import InputError, unknown

CENTERS = ("class", "sample")
KERNELS = ("dist", "log", "riesz")
TILE = 1024


def global_mean(statistics: ClassStatistics, *, center: str = "class") -> Tensor:
    """The global mean, ``(D,)``: the mean of the class means (``class``) or of all samples (``sample``).

    The two differ as soon as classes are imbalanced, and NC2 with them (by half on the fixture of the tests).
    """
    if center == "class":
        return statistics.class_means[statistics.present].mean(0)
    if center == "sample":
        return statistics.sample_mean
    raise unknown("center", center, CENTERS)


def centred_means(statistics: ClassStatistics, *, center: str = "class") -> Tensor:
    """Class means less the global mean, ``(K', D)`` float64, for the K' classes that are present."""
    means = statistics.class_means[statistics.present]
    return means - global_mean(statistics, center=center)


def _rows(source: ClassStatistics | Tensor, center: str) -> Tensor:
    if isinstance(source, ClassStatistics):
        return centred_means(source, center=center)
    if source.ndim != 2:
        raise InputError(f"vectors must be (K, D), got {tuple(source.shape)}")
    return source.detach().double()


def _unit(vectors: Tensor) -> Tensor:
    return vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)  # a zero vector becomes NaN, and says so


# --- pairs ------------------------------------------------------------------------------------------------------------


def _tiles(num: int, tile: int) -> Iterator[tuple[slice, slice]]:
    """Tiles that cover all pairs i ≤ j."""
    for i in range(0, num, tile):
        for j in range(i, num, tile):
            yield slice(i, min(i + tile, num)), slice(j, min(j + tile, num))


def _above(rows: slice, columns: slice, device: torch.device) -> Tensor:
    """Mask of i < j in a tile."""
    i = torch.arange(rows.start, rows.stop, device=device)
    return i[:, None] < torch.arange(columns.start, columns.stop, device=device)


def pair_distances(vectors: Tensor, *, tile: int = TILE) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """``(i, j, ‖a_i − a_j‖²)`` for all i < j, a tile at a time, each 1-D.

    From inner products, and again by differences where these have cancelled (nearly equal vectors).
    """
    squares = vectors.square().sum(1)
    for rows, columns in _tiles(len(vectors), tile):
        i, j = torch.nonzero(_above(rows, columns, vectors.device), as_tuple=True)
        both = squares[rows, None] + squares[columns]
        gaps = torch.addmm(both, vectors[rows], vectors[columns].T, alpha=-2)[i, j]
        both, i, j = both[i, j], i + rows.start, j + columns.start
        close = torch.nonzero(gaps < 1e-6 * both)[:, 0]
        for part in close.split(4096):
            gaps[part] = (vectors[i[part]] - vectors[j[part]]).square().sum(1)
        yield i, j, gaps


class _Moments:
    """Mean and variance of numbers that come in parts (Chan, Golub & LeVeque)."""

    def __init__(self) -> None:
        self.num, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, values: Tensor) -> None:
        num = values.numel()
        if not num:
            return
        mean = float(values.mean())
        squares = float((values - mean).square().sum())
        total = self.num + num
        step = mean - self.mean if self.num else mean
        self.squares += squares + (step * step * self.num * num / total if self.num else 0.0)
        self.mean += step * num / total
        self.num = total

    def variance(self, *, unbiased: bool) -> float:
        num = self.num - unbiased
        return self.squares / num if num > 0 else math.nan

    def get_mean(self) -> float:
        return self.mean if self.num else math.nan


# --- NC2: the geometry of one set of vectors --------------------------------------------------------------------------


def nc2_equinorm(source: ClassStatistics | Tensor, *, center: str = "class") -> float:
    r"""Coefficient of variation of the norms: :math:`\mathrm{sd}_k\|a_k\| / \mathrm{mean}_k\|a_k\|` (sd divides by K).

    ``a`` are the centred class means, or the vectors given. Range [0, ∞), 0 at collapse.
    Source: Papyan, Han & Donoho (PNAS 2020), NC2.
    """
    norms = torch.linalg.vector_norm(_rows(source, center), dim=1)
    return float(norms.std(correction=0) / norms.mean()) if len(norms) else math.nan


def nc2_equiangle(source: ClassStatistics | Tensor, *, center: str = "class", tile: int = TILE) -> float:
    r"""Mean distance of cosines from a simplex's: :math:`\mathrm{mean}_{i\ne j}|\cos(a_i,a_j)+\tfrac1{K-1}|`.

    Range [0, 2], 0 at collapse (which needs K ≤ D+1). Source: Papyan, Han & Donoho (PNAS 2020), NC2.
    """
    unit, moments = _unit(_rows(source, center)), _Moments()
    ideal = -1 / max(len(unit) - 1, 1)
    for rows, columns in _tiles(len(unit), tile):
        moments.add(((unit[rows] @ unit[columns].T)[_above(rows, columns, unit.device)] - ideal).abs_())
    return moments.get_mean()


def nc2_etf_error(source: ClassStatistics | Tensor, *, center: str = "class", tile: int = TILE) -> float:
    r"""Distance of the Gram matrix from that of a simplex.

    .. math:: \Big\|\frac{AA^\top}{\|AA^\top\|_F} - \frac{I-\frac1K 11^\top}{\sqrt{K-1}}\Big\|_F

    Range [0, 2], 0 exactly for a simplex of any size. Source: Zhu et al. (NeurIPS 2021), NC2; ``nc2_etf_err`` of
    the package neural-collapse.
    """
    vectors = _rows(source, center)
    return _simplex_distance(vectors, vectors, tile)


def _simplex_distance(a: Tensor, b: Tensor, tile: int) -> float:
    """‖ABᵀ/‖ABᵀ‖_F − (I − 11ᵀ/K)/√(K−1)‖_F by tiles."""
    num = len(a)
    if num < 2:
        return math.nan
    products = [(i, j) for i in range(0, num, tile) for j in range(0, num, tile)]
    size = math.sqrt(sum(float((a[i : i + tile] @ b[j : j + tile].T).square().sum()) for i, j in products))
    total = 0.0
    for i, j in products:
        gap = (a[i : i + tile] @ b[j : j + tile].T).div_(size or math.nan).add_(1 / (num * math.sqrt(num - 1)))
        if i == j:
            gap.diagonal().sub_(1 / math.sqrt(num - 1))
        total += float(gap.square_().sum())
    return math.sqrt(total)


def uniformity(
    source: ClassStatistics | Tensor, *, kernel: str = "dist", center: str = "class", tile: int = TILE
) -> tuple[float, float]:
    r"""Mean and population variance over the pairs i < j of a kernel of the unit vectors u = a/‖a‖.

    .. math:: \text{dist: } \|u_i-u_j\| \quad \text{log: } \log\frac1{\|u_i-u_j\|} \quad
              \text{riesz: } \mathrm{sign}(D-2)\,\|u_i-u_j\|^{-(D-2)}

    The mean is at most √(2K/(K−1)) for ``dist`` and at least −log √(2K/(K−1)) for ``log``, with equality (and variance
    0) at collapse. ``riesz`` leaves the range of float64 in high dimension (from D ≈ 2,048 on): then it warns, and
    `log_riesz_energy` is the one to look at. Source: Liu et al. (NeurIPS 2018; ICML 2023), "generalised NC2".
    """
    if kernel not in KERNELS:
        raise unknown("kernel", kernel, KERNELS)
    unit, moments = _unit(_rows(source, center)), _Moments()
    power = unit.shape[1] - 2
    for _, _, gaps in pair_distances(unit, tile=tile):
        if kernel == "dist":
            moments.add(gaps.sqrt())
        elif kernel == "log":
            moments.add(gaps.log() / -2)
        else:
            energies = gaps.pow(-power / 2) * ((power > 0) - (power < 0))
            moments.add(energies)
            size = energies.abs()
            if power and bool(((size < torch.finfo(size.dtype).tiny) | size.isinf()).logical_and(gaps > 0).any()):
                warnings.warn(
                    f"the Riesz kernel ‖u−v‖^-{power} leaves float64; see log_riesz_energy",
                    RuntimeWarning,
                    stacklevel=2,
                )
    return moments.get_mean(), moments.variance(unbiased=False)


def log_riesz_energy(source: ClassStatistics | Tensor, *, center: str = "class", tile: int = TILE) -> float:
    r"""Log of the mean Riesz energy, :math:`\log \mathrm{mean}_{i<j} \|u_i-u_j\|^{-(D-2)}`, finite at any D.

    Smaller is more uniform; :math:`-\tfrac{D-2}2\log\frac{2K}{K-1}` for a simplex. +∞ only if two directions coincide.
    """
    unit = _unit(_rows(source, center))
    parts = [
        torch.logsumexp(gaps.log() * (-(unit.shape[1] - 2) / 2), 0)
        for _, _, gaps in pair_distances(unit, tile=tile)
        if len(gaps)
    ]
    if not parts:
        return math.nan
    return float(torch.logsumexp(torch.stack(parts), 0)) - math.log(len(unit) * (len(unit) - 1) / 2)


def mean_angle(vectors: Tensor, *, tile: int = TILE) -> float:
    r"""Mean angle between two of the vectors ``(K, D)``, in degrees, :math:`\mathrm{mean}_{i<j}\angle(a_i, a_j)`.

    Accurate also for the small angles of a minority collapse. Range [0, 180]; NaN for fewer than 2 vectors.
    """
    moments = _Moments()
    for _, _, gaps in pair_distances(_unit(vectors.detach().double()), tile=tile):
        moments.add(2 * torch.atan2(gaps.sqrt(), (4 - gaps).clamp_min(0).sqrt()))
    return math.degrees(moments.get_mean())


def cosine_moments(a: Tensor, b: Tensor | None = None, *, tile: int = TILE) -> tuple[float, float]:
    r"""Mean and sd (dividing by one less) of cos(a_i, b_j) over i ≠ j; of cos(a_i, a_j) over i < j if b is None."""
    moments = _Moments()
    a = _unit(a)
    if b is None:
        for rows, columns in _tiles(len(a), tile):
            moments.add((a[rows] @ a[columns].T)[_above(rows, columns, a.device)])
    else:
        b = _unit(b)
        for rows, columns in _tiles(len(a), tile):
            above = _above(rows, columns, a.device)
            moments.add((a[rows] @ b[columns].T)[above])
            moments.add((b[rows] @ a[columns].T)[above])  # the transposed tile: a_j with b_i
    return moments.get_mean(), math.sqrt(moments.variance(unbiased=True))
