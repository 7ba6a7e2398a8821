"""The decision of the nearest class mean, and whether the classifier's decision is the same (NC4).

Near its class mean a sample needs no scores: closer to it than half the way to the next mean, and than the linear
classifier's nearest boundary, both decisions are known from one distance. Of collapsed features these are nearly all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from equiframe.errors import InputError

_BLOCK = 1 << 23  # scores (rows × classes) that are held at a time
_CACHE = 1 << 18  # numbers that stay in the cache


class NearestMean:
    r"""Nearest of K class means, :math:`\arg\min_k \|x - \bar x_k\|_2`.

    Args:
        class_means: ``(K, D)``; rows that hold NaN are classes without a mean, which are never chosen.
    """

    def __init__(self, class_means: Tensor) -> None:
        means = class_means.detach().double()
        self.classes = torch.nonzero(torch.isfinite(means).all(1))[:, 0]
        if not len(self.classes):
            raise InputError("no class has a mean")
        self._row = torch.full((len(means),), -1, device=means.device)
        self._row[self.classes] = torch.arange(len(self.classes), device=means.device)
        means = means[self.classes]
        # Distances do not change when all is centred, but their rounding does. The centre is exact in float32.
        self._centre = means.mean(0).float().double()
        self._means = means - self._centre
        self._casts: dict[torch.dtype, tuple[Tensor, Tensor, Tensor]] = {}
        self._own: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        self._reach: Tensor | None = None

    def _cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        if dtype not in self._casts:
            half = self._means.square().sum(1) / 2
            self._casts[dtype] = self._centre.to(dtype), self._means.to(dtype), half.to(dtype)
        return self._casts[dtype]

    def __call__(self, features: Tensor) -> Tensor:
        """Nearest class of ``features (B, D)``: ``(B,)``. Ties go to the smaller class number."""
        centre, means, half = self._cast(features.dtype)
        rows = max(1, _BLOCK // len(means))
        chosen = [torch.addmm(half, x - centre, means.T, beta=-1).argmax(1) for x in features.split(rows)]
        return self.classes[torch.cat(chosen)] if chosen else self.classes.new_empty(0)

    def agrees(self, features: Tensor, predictions: Tensor) -> Tensor:
        r"""Whether the nearest class is the predicted one, ``(B,)`` booleans.

        A sample closer to the mean of its predicted class than half the way from there to the next mean is decided
        without looking at the others (triangle inequality): of features that have collapsed, nearly all.
        """
        row = self._row[predictions]
        agrees = (row >= 0) & (self._distance(features, row) < self._half_gaps()[row])
        unsure = torch.nonzero((row >= 0) & ~agrees)[:, 0]
        if len(unsure):
            agrees[unsure] = self(features[unsure]) == predictions[unsure]
        return agrees

    def _distance(self, features: Tensor, row: Tensor) -> Tensor:
        """Upper bound for the distance of each sample from the mean of that row, ``(B,)``; says little for row −1."""
        if features.dtype not in self._own:
            means = self._means + self._centre
            narrow = means.to(features.dtype)
            lost = torch.linalg.vector_norm(narrow.double() - means, dim=1)
            self._own[features.dtype] = narrow, lost.to(features.dtype)
        means, lost = self._own[features.dtype]
        row = row.clamp_min(0)
        rows = max(64, _CACHE // means.shape[1])
        distance = torch.empty_like(features[:, 0])
        for part, x, r in zip(distance.split(rows), features.split(rows), row.split(rows), strict=True):
            torch.linalg.vector_norm(means.index_select(0, r).sub_(x), dim=1, out=part)
        return distance.add_(lost[row]).mul_(1.001)

    def _half_gaps(self) -> Tensor:
        """Lower bound for half the distance from each mean to the next one, ``(K',)``."""
        if self._reach is None:
            means = self._means if self._means.is_cuda else self._means.float()
            squares = means.square().sum(1)
            reach = torch.full_like(squares, torch.inf)
            rows = max(1, _BLOCK // len(means))
            for start in range(0, len(means), rows):
                part = slice(start, start + rows)
                both = squares[part, None] + squares
                gaps = torch.addmm(both, means[part], means.T, alpha=-2)
                gaps.sub_(both, alpha=1e-4)  # more than float32 can have lost
                gaps[:, part].fill_diagonal_(torch.inf)
                reach[part] = gaps.amin(1)
            self._reach = reach.clamp_min(0).sqrt() / 2
        return self._reach


class LinearAgreement:
    r"""Whether a linear classifier and the nearest class mean decide alike, from features alone.

    .. math:: \arg\max_j (w_j^\top x + b_j) = \arg\min_j \|x - \bar x_j\|_2

    A sample whose distance from the mean of class k is less than that mean's distance from the edge of the classifier's
    cell k, :math:`\min_j \frac{(w_k-w_j)^\top\bar x_k + b_k - b_j}{\|w_k-w_j\|}`, and than half the way to the next
    mean, is decided for k by both. Only the other samples are given scores.

    Args:
        class_means: ``(K, D)``; rows that hold NaN are classes without a mean, which are never nearest.
        class_vectors: ``(K, D)``.
        bias: ``(K,)``, or None.
    """

    def __init__(self, class_means: Tensor, class_vectors: Tensor, bias: Tensor | None = None) -> None:
        if class_vectors.shape != class_means.shape:
            raise InputError(f"class_vectors must be {tuple(class_means.shape)}, got {tuple(class_vectors.shape)}")
        self._nearest = NearestMean(class_means)
        vectors = class_vectors.detach().to(class_means.device, torch.float64)
        self._bias = vectors.new_zeros(len(vectors)) if bias is None else bias.detach().to(vectors)
        self._vectors = vectors - vectors.mean(0)  # no decision changes, and rounding shrinks
        self._casts: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        self._reach: Tensor | None = None

    def __call__(self, features: Tensor, targets: Tensor) -> Tensor:
        """``(B,)`` booleans for ``features (B, D)``. ``targets (B,)`` say near which mean a sample may be expected; wrong
        ones cost time and change nothing."""
        nearest = self._nearest
        row = nearest._row[targets]
        agrees = (row >= 0) & (nearest._distance(features, row) < self._radius()[row])
        unsure = torch.nonzero(~agrees)[:, 0]
        if len(unsure):
            there = features[unsure]
            agrees[unsure] = nearest(there) == self.decisions(there)
        return agrees

    def decisions(self, features: Tensor) -> Tensor:
        """The classifier's class of ``features (B, D)``: ``(B,)``. Ties go to the smaller class number."""
        if features.dtype not in self._casts:
            self._casts[features.dtype] = self._bias.to(features.dtype), self._vectors.to(features.dtype)
        bias, vectors = self._casts[features.dtype]
        rows = max(1, _BLOCK // len(vectors))
        chosen = [torch.addmm(bias, x, vectors.T).argmax(1) for x in features.split(rows)]
        return torch.cat(chosen) if chosen else self._nearest.classes.new_empty(0)

    def _radius(self) -> Tensor:
        """Lower bound for the distance from each mean to where either decision changes, ``(K',)``."""
        if self._reach is None:
            nearest = self._nearest
            means = nearest._means + nearest._centre
            dtype = means.dtype if means.is_cuda else torch.float32
            means, vectors, bias = means.to(dtype), self._vectors.to(dtype), self._bias.to(dtype)
            squares, sizes = vectors.square().sum(1), torch.linalg.vector_norm(means, dim=1)
            edge = torch.empty_like(sizes)
            rows = max(1, _BLOCK // len(vectors))
            for start in range(0, len(means), rows):
                part = slice(start, start + rows)
                own = nearest.classes[part]
                both = squares[own, None] + squares
                scores = torch.addmm(bias, means[part], vectors.T)
                lead = scores.gather(1, own[:, None]) - scores
                lead -= 1e-5 * (sizes[part, None] * both.sqrt() + bias[own, None].abs() + bias.abs())  # float32's loss
                apart = torch.addmm(both, vectors[own], vectors.T, alpha=-2).add_(both, alpha=1e-4).sqrt_()
                distance = lead.div_(apart).scatter_(1, own[:, None], torch.inf)
                edge[part] = distance.nan_to_num_(nan=0.0, posinf=torch.inf).amin(1)
            self._reach = torch.minimum(edge, nearest._half_gaps().to(dtype))
        return self._reach


def nc4_agreement(features: Tensor, decisions: Tensor, class_means: Tensor) -> float:
    r"""NC4: the share of samples that the classifier and the nearest class mean decide alike.

    .. math:: \frac1N \sum_i 1\big[\arg\max_k (w_k^\top x_i + b_k) = \arg\min_k \|x_i - \bar x_k\|_2\big]

    Shapes: features ``(N, D)``; decisions, the classifier's own: predicted classes ``(N,)`` or logits ``(N, K)``, which
    hold the bias; class_means ``(K, D)``, such as `ClassStatistics.class_means`. Range [0, 1], 1 at collapse.
    Source: Papyan, Han & Donoho (PNAS 2020), NC4. Sums over calls are up to the caller: weight by N.
    """
    if decisions.is_floating_point():
        decisions = decisions.argmax(1)
    features = features.detach()
    features = features if features.dtype == torch.float64 else features.float()
    if not len(features):
        return float("nan")
    return float(NearestMean(class_means.to(features.device)).agrees(features, decisions).double().mean())
