"""The measures of neural collapse: pure functions of class statistics and class vectors.

``center`` names the global mean that is taken from the class means: ``class``, the mean of the class means (of the
classes that have samples), or ``sample``, the mean of all samples. Classes without samples count nowhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from equiframe.collapse.statistics import ClassStatistics
from equiframe.collapse.vectors import (
    TILE,
    _rows,
    _simplex_distance,
    _unit,
    centred_means,
    cosine_moments,
    mean_angle,
    pair_distances,
)
from equiframe.errors import InputError, unknown

NC1_METHODS = ("pinv", "svd", "quotient")


def _vectors(statistics: ClassStatistics, class_vectors: Tensor) -> Tensor:
    """The class vectors of the classes that are present, float64, where the statistics are."""
    if class_vectors.shape != (statistics.num_classes, statistics.dim):
        raise InputError(
            f"class_vectors must be ({statistics.num_classes}, {statistics.dim}), got {tuple(class_vectors.shape)}"
        )
    return class_vectors.detach().to(statistics.device, torch.float64)[statistics.present]


# --- NC1: scatter within the classes ----------------------------------------------------------------------------------


def _between(statistics: ClassStatistics, method: str, center: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors (in columns) of S_B = McᵀMc/K that its pseudo-inverse keeps."""
    means = centred_means(statistics, center=center)
    num, dim = means.shape

    def rank(squares: Tensor) -> int:
        above = int((squares > dim * torch.finfo(torch.float64).eps * squares[0]).sum())
        return min(above, num - 1) if method == "svd" else above

    wide = num <= dim
    squares, vectors = torch.linalg.eigh(means @ means.T if wide else means.T @ means)
    squares, vectors = squares.flip(0), vectors.flip(1)
    kept = rank(squares)
    if kept and squares[kept - 1] > 1e-6 * squares[0]:
        squares, vectors = squares[:kept], vectors[:, :kept]
        return squares / num, means.T @ vectors / squares.sqrt() if wide else vectors
    # The product has squared the condition number, which small eigenvalues feel: the slower way keeps their digits.
    _, singular, directions = torch.linalg.svd(means, full_matrices=False)
    squares = singular.square()
    kept = rank(squares)
    return squares[:kept] / num, directions[:kept].T


def nc1(statistics: ClassStatistics, *, method: str = "pinv", center: str = "class") -> float:
    r"""Scatter within the classes, relative to that between them.

    .. math:: \text{pinv, svd: } \tfrac1K \mathrm{tr}(S_B^{+} S_W) \qquad
              \text{quotient: } \mathrm{tr}\,S_W / \mathrm{tr}\,S_B, \qquad S_B = \tfrac1K M_c^\top M_c

    ``pinv`` drops eigenvalues of S_B below D·eps of the largest; ``svd`` also keeps no more than K−1. They differ only
    with ``center="sample"``, where S_B can have rank K. Range [0, ∞), 0 at collapse; NaN if all class means coincide.
    Source: Papyan, Han & Donoho (PNAS 2020), NC1; quotient: Hui, Belkin & Nakkiran (2022).
    """
    if method not in NC1_METHODS:
        raise unknown("method", method, NC1_METHODS)
    num = int(statistics.present.sum())
    if num < 2:
        return math.nan
    if method == "quotient":
        between = float(centred_means(statistics, center=center).square().sum()) / num
        return statistics.within_trace / between if between > 0 else math.nan
    spread, directions = _between(statistics, method, center)
    if not len(spread):
        return math.nan
    return float((statistics.within_along(directions) / spread).sum()) / num


def nc1_standard_error(statistics: ClassStatistics, *, center: str = "class") -> float:
    r"""Standard error of `nc1` (``pinv``) when the scatter is sketched, given the data; 0 when it is exact.

    .. math:: \frac1{NK}\Big(2\,\mathrm{tr}(C^2) \sum_k n_k^2\Big)^{1/2}, \qquad
              \mathrm{tr}(C^2) \approx \sum_{i\ne j} (z_i^\top S_B^+ z_j)^2 \Big/ \sum_{i\ne j} n_i n_j

    with C the whitened scatter, taken to be the same in all classes: a sum of many random signs is nearly Gaussian.
    """
    if statistics.within == "full":
        return 0.0
    spread, directions = _between(statistics, "pinv", center)
    white = (statistics.sketched_scatter @ directions) / spread.sqrt()
    gram = white @ white.T if len(white) <= white.shape[1] else white.T @ white  # the same Frobenius norm
    counts = statistics.counts[statistics.present]
    num, squares = counts.sum(), counts.square().sum()
    pairs = (gram.square().sum() - white.square().sum(1).square().sum()).clamp_min(0) / (num.square() - squares)
    return float((2 * pairs * squares).sqrt() / (num * len(counts)))


def cdnv(statistics: ClassStatistics, *, dist_exp: float = 1.0, tile: int = TILE) -> float:
    r"""Class-distance normalised variance: :math:`\mathrm{mean}_{i<j}\,\frac{v_i+v_j}{2\,\|\bar x_i-\bar x_j\|^{2p}}`,
    p = ``dist_exp``, :math:`v_k` the trace of class k's covariance.

    Range [0, ∞), 0 at collapse. Source: Galanti, György & Hutter (ICLR 2022), with p = 1.
    """
    means = centred_means(statistics)  # differences do not depend on the centre, their rounding does
    v = statistics.within_variance[statistics.present]
    total, num = 0.0, 0
    for i, j, gaps in pair_distances(means, tile=tile):
        total += float(((v[i] + v[j]) / (2 * gaps.pow(dist_exp))).sum())
        num += len(gaps)
    return total / num if num else math.nan


def mean_norms(statistics: ClassStatistics, *, center: str = "class") -> Tensor:
    """Norms of the centred class means, ``(K',)``, one a class that is present."""
    return torch.linalg.vector_norm(centred_means(statistics, center=center), dim=1)


# --- NC3: class means and class vectors -------------------------------------------------------------------------------


def nc3_distance(statistics: ClassStatistics, class_vectors: Tensor, *, center: str = "class") -> float:
    r"""Squared distance of means and vectors as wholes.

    .. math:: \Big\|\frac{W}{\|W\|_F}-\frac{M_c}{\|M_c\|_F}\Big\|_F^2

    Class vectors ``(K, D)``. Range [0, 4], 0 at collapse. Source: Papyan, Han & Donoho (PNAS 2020), NC3; it is the
    paper's :math:`\|\tilde H-\tilde M\|_F^2`, for which its released code takes ``center="sample"``.
    """
    w, m = _vectors(statistics, class_vectors), centred_means(statistics, center=center)
    gap = (w / torch.linalg.vector_norm(w) - m / torch.linalg.vector_norm(m)).square().sum()
    return float(gap) if len(w) else math.nan


def nc3_duality_error(
    statistics: ClassStatistics, class_vectors: Tensor, *, center: str = "class", tile: int = TILE
) -> float:
    r"""Self-duality error :math:`\big\|\frac{WM_c^\top}{\|WM_c^\top\|_F}-\frac{I-\frac1K11^\top}{\sqrt{K-1}}\big\|_F`.

    Range [0, 2], 0 at collapse. Source: Zhu et al. (NeurIPS 2021), NC3.
    """
    return _simplex_distance(_vectors(statistics, class_vectors), centred_means(statistics, center=center), tile)


def nc3_cosines(statistics: ClassStatistics, class_vectors: Tensor, *, center: str = "class") -> Tensor:
    """cos(w_k, centred mean k), ``(K',)``, one a class that is present; in [−1, 1], 1 at collapse."""
    return (_unit(_vectors(statistics, class_vectors)) * _unit(centred_means(statistics, center=center))).sum(1)


def nc3_distances(statistics: ClassStatistics, class_vectors: Tensor, *, center: str = "class") -> Tensor:
    """‖w_k/‖w_k‖ − m_k/‖m_k‖‖, ``(K',)``, one a class that is present; in [0, 2], 0 at collapse."""
    gaps = _unit(_vectors(statistics, class_vectors)) - _unit(centred_means(statistics, center=center))
    return torch.linalg.vector_norm(gaps, dim=1)


def nc3_uniform_duality(
    statistics: ClassStatistics, class_vectors: Tensor, *, cos: bool = False, center: str = "class"
) -> float:
    r"""Variance over the classes of :math:`\langle w_k, m_k\rangle` (of their cosine if ``cos``), dividing by K−1.

    Range [0, ∞), 0 at collapse. Source: Wu & Papyan (NeurIPS 2024), uniform duality.
    """
    if cos:
        products = nc3_cosines(statistics, class_vectors, center=center)
    else:
        products = (_vectors(statistics, class_vectors) * centred_means(statistics, center=center)).sum(1)
    return float(products.var()) if len(products) > 1 else math.nan


def paper_cosines(
    statistics: ClassStatistics, class_vectors: Tensor, *, center: str = "class", tile: int = TILE
) -> dict[str, float]:
    r"""The curves of the paper: mean and sd of cos HH, WW and HW over pairs of different classes, of cos HW of the same
    class (``diag``), and :math:`\|\tilde H-\tilde M\|_F^2` (``hm_distance``).

    H are the centred class means, W the class vectors ``(K, D)``. At collapse the means are −1/(K−1), −1/(K−1),
    −1/(K−1) and 1, the sds and the distance 0. The sd divides by one less than the number of cosines.
    Source: Yang et al. (NeurIPS 2022). Their code centres on the sample mean, and of HW (which is not symmetric) takes
    the upper triangle alone; this takes both.
    """
    h, w = centred_means(statistics, center=center), _vectors(statistics, class_vectors)
    diagonal = (_unit(h) * _unit(w)).sum(1)
    values: dict[str, float] = {}
    for name, moments in {
        "cos_hh": cosine_moments(h, tile=tile),
        "cos_ww": cosine_moments(w, tile=tile),
        "cos_hw": cosine_moments(h, w, tile=tile),
        "diag_hw": (float(diagonal.mean()), float(diagonal.std()) if len(diagonal) > 1 else math.nan),
    }.items():
        values[f"{name}_mean"], values[f"{name}_sd"] = moments
    return values | {"hm_distance": nc3_distance(statistics, class_vectors, center=center)}


# --- NC4, NC5 ---------------------------------------------------------------------------------------------------------


def nc4(statistics: ClassStatistics, *, weighted: bool = True) -> float:
    """NC4 as counted by ``update(…, predictions)`` against the ``class_means`` that the statistics were made with.

    The share of samples that the classifier and the nearest class mean decide alike; ``weighted=False`` is the mean of
    the classes' shares. Range [0, 1], 1 at collapse; NaN if no predictions were given. See `nc4_agreement`.
    """
    decided, agreed = statistics.decided, statistics.agreed
    there = decided > 0
    if not bool(there.any()):
        return math.nan
    return float(agreed.sum() / decided.sum()) if weighted else float((agreed / decided)[there].mean())


def mean_decisions(statistics: ClassStatistics, class_vectors: Tensor, bias: Tensor | None = None) -> float:
    r"""Share of the class means that the classifier decides for their own class, bias included:
    :math:`\arg\max_j (w_j^\top \bar x_k + b_j) = k`. What NC4 says of samples, of the means; needs no second look.
    """
    w = class_vectors.detach().to(statistics.device, torch.float64)
    own = torch.nonzero(statistics.present)[:, 0]
    logits = statistics.class_means[own] @ w.T
    if bias is not None:
        logits = logits + bias.detach().to(logits)
    return float((logits.argmax(1) == own).double().mean()) if len(own) else math.nan


def nc5_orthogonality(statistics: ClassStatistics, ood_mean: Tensor) -> float:
    r"""NC5: :math:`\mathrm{mean}_k|\cos(\bar x_k, \bar x_{ood})|` with uncentred means; ood_mean ``(D,)`` is the mean
    feature of out-of-distribution samples. Range [0, 1], 0 at collapse. Source: Ammar et al. (ICLR 2024), NECO.
    """
    means = _unit(statistics.class_means[statistics.present])
    other = ood_mean.detach().to(means)
    return float((means @ other / torch.linalg.vector_norm(other)).abs().mean())


# --- norms and minorities ---------------------------------------------------------------------------------------------


def feature_norm_spread(statistics: ClassStatistics, *, over: str = "classes") -> float:
    r"""Coefficient of variation of the (uncentred) feature norm ‖x‖: of the classes' mean norms (``classes``) or of the
    norms of all samples (``samples``). sd divides by the number. Range [0, ∞), 0 if all norms are equal.
    """
    there = statistics.present
    means = statistics.norm_mean[there]
    if over == "classes":
        return float(means.std(correction=0) / means.mean()) if len(means) else math.nan
    if over != "samples":
        raise unknown("over", over, ("classes", "samples"))
    share = statistics.counts[there] / statistics.counts.sum()
    mean = share @ means
    variance = share @ (statistics.norm_variance[there] + (means - mean).square())
    return float(variance.sqrt() / mean)


def minority_angle(source: ClassStatistics | Tensor, few: Tensor, *, center: str = "class", tile: int = TILE) -> float:
    """Mean angle in degrees among the few-shot classes: of their centred means, or of the vectors ``(K, D)`` given.

    ``few (K,)`` is the mask of the few-shot classes. At collapse arccos(−1/(K−1)), just above 90; under minority
    collapse it falls towards 0 (Fang et al., PNAS 2021). NaN for fewer than 2 such classes.
    """
    few = torch.as_tensor(few)
    num = source.num_classes if isinstance(source, ClassStatistics) else len(source)
    if few.dtype != torch.bool or few.shape != (num,):
        raise InputError(f"few must be {num} booleans, one a class, got {tuple(few.shape)} {few.dtype}")
    rows = _rows(source, center)
    few = few.to(rows.device)
    return mean_angle(rows[few[source.present] if isinstance(source, ClassStatistics) else few], tile=tile)
