"""The decision of the nearest class mean, and whether the classifier's decision is the same (NC4)."""

from __future__ import annotations

import torch
from torch import Tensor

from equiframe.errors import InputError

_BLOCK = 1 << 23  # scores (rows × classes) that are held at a time


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
        centre, means, _ = self._cast(features.dtype)
        row = self._row[predictions]
        distance = torch.linalg.vector_norm((features - centre).sub_(means[row]), dim=1)
        agrees = (row >= 0) & (distance < 0.999 * self._half_gaps()[row].to(distance.dtype))
        unsure = torch.nonzero((row >= 0) & ~agrees)[:, 0]
        if len(unsure):
            agrees[unsure] = self(features[unsure]) == predictions[unsure]
        return agrees

    def _half_gaps(self) -> Tensor:
        """Lower bounds for half the distance from each mean to the next one, ``(K',)``."""
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
