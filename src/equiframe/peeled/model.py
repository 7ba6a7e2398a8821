r"""The layer-peeled model: the last layer alone, with the features as free variables.

.. math:: \min_{W, H}\ \frac1N \sum_k \sum_{i \le n_k} \ell(W h_{k,i},\, k)

under one of three limits on lengths:

- ``vector``: :math:`\lVert w_k\rVert^2 \le E_W`, :math:`\lVert h_{k,i}\rVert^2 \le E_H` (Yang et al. 2022);
- ``average``: :math:`\frac1K\sum_k\lVert w_k\rVert^2 \le E_W`,
  :math:`\frac1K\sum_k\frac1{n_k}\sum_i\lVert h_{k,i}\rVert^2 \le E_H` (Fang et al. 2021);
- ``penalty``: :math:`+\frac{\lambda_W}{2}\lVert W\rVert_F^2 + \frac{\lambda_H}{2}\sum_{k,i}\lVert h_{k,i}\rVert^2`.

One feature per class is enough, weighted by n_k: every loss here is convex in h and so are the limits, so replacing the
samples of a class by their mean lowers (or keeps) the objective, for any W. ``samples="all"`` keeps them all, to look.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from equiframe.errors import InputError, unknown
from equiframe.peeled.losses import LogitLoss, make_loss

CONSTRAINTS = ("vector", "average", "penalty")
PROFILES = ("step", "exp")


def class_counts(num_classes: int, ratio: float, *, profile: str = "step", num_minor: int | None = None) -> Tensor:
    """Class counts ``(K,)`` in float64, smallest 1, largest ``ratio``; the model needs only their proportions.

    ``step``: the last ``num_minor`` classes (default K//2) have 1, the others ``ratio``. ``exp``: geometric.
    """
    if num_classes < 2:
        raise InputError(f"the layer-peeled model needs at least 2 classes, got {num_classes}")
    if not (math.isfinite(ratio) and ratio >= 1):
        raise InputError(f"the imbalance ratio must be a number >= 1, got {ratio}")
    if profile == "exp":
        return torch.logspace(math.log10(ratio), 0, num_classes, dtype=torch.float64)
    if profile != "step":
        raise unknown("profile", profile, PROFILES)
    minor = num_classes // 2 if num_minor is None else num_minor
    if not 1 <= minor < num_classes:
        raise InputError(f"the number of minor classes must lie in 1..{num_classes - 1}, got {minor}")
    counts = torch.full((num_classes,), float(ratio), dtype=torch.float64)
    counts[num_classes - minor :] = 1.0
    return counts


@dataclass(frozen=True)
class PeeledModel:
    """One layer-peeled problem.

    Attributes:
        counts: ``(K,)`` class counts n_k > 0; whole numbers only where ``samples="all"``.
        dim: D.
        energy_w, energy_h: E_W and E_H, squared lengths.
        loss: a name in `LOSSES`.
        constraint: a name in `CONSTRAINTS`.
        lambda_w, lambda_h: penalties, used by ``penalty`` only.
        samples: ``classes`` (one feature per class, weight n_k/N) or ``all`` (N features).
        tau: strength of ``adjusted``.
        nonnegative: features of a ReLU, h ≥ 0 (Dang et al. 2024); learned classifier and ``penalty`` only.
    """

    counts: Tensor
    dim: int
    energy_w: float = 1.0
    energy_h: float = 1.0
    loss: str = "ce"
    constraint: str = "vector"
    lambda_w: float = 5e-3
    lambda_h: float = 5e-3
    samples: str = "classes"
    tau: float = 1.0
    nonnegative: bool = False
    logit_loss: LogitLoss = field(init=False, repr=False)
    targets: Tensor = field(init=False, repr=False)
    weights: Tensor = field(init=False, repr=False)
    num_samples: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        counts = torch.as_tensor(self.counts, dtype=torch.float64)
        if counts.ndim != 1 or len(counts) < 2 or not bool((counts > 0).all() & counts.isfinite().all()):
            raise InputError("class counts must be at least two positive numbers")
        for name in ("energy_w", "energy_h", "lambda_w", "lambda_h"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} must be a positive number, got {value}")
        if self.dim < 1:
            raise InputError(f"dim must be at least 1, got {self.dim}")
        if self.constraint not in CONSTRAINTS:
            raise unknown("constraint", self.constraint, CONSTRAINTS)
        if self.nonnegative and self.constraint != "penalty":
            raise InputError('nonnegative features are solved with constraint="penalty" only')
        if self.samples not in ("classes", "all"):
            raise unknown("samples", self.samples, ("classes", "all"))
        put = object.__setattr__
        put(self, "counts", counts)
        put(self, "logit_loss", make_loss(self.loss, counts=counts, scale=self.scale, tau=self.tau))
        total = counts.sum()
        if self.samples == "classes":
            put(self, "targets", torch.arange(len(counts)))
            put(self, "weights", counts / total)
            put(self, "num_samples", counts)
        else:
            if not torch.equal(counts, counts.round()):
                raise InputError('samples="all" needs whole class counts')
            if self.constraint == "average":
                raise InputError(
                    'the average constraint is solved with samples="classes" only (its optimum is the same)'
                )
            put(self, "targets", torch.repeat_interleave(torch.arange(len(counts)), counts.long()))
            put(self, "weights", torch.full((int(total),), float(1 / total), dtype=torch.float64))
            put(self, "num_samples", torch.ones(int(total), dtype=torch.float64))

    @property
    def num_classes(self) -> int:
        return len(self.counts)

    @property
    def scale(self) -> float:
        """s = √(E_W E_H), the largest logit that the budgets allow."""
        return math.sqrt(self.energy_w * self.energy_h)

    def row_values(self, vectors: Tensor, features: Tensor) -> Tensor:
        """Weighted loss of each feature row, ``(M,)``, the penalty on that row included."""
        values = self.weights * self.logit_loss.value(features @ vectors.T, self.targets)
        if self.constraint == "penalty":
            values = values + 0.5 * self.lambda_h * self.num_samples * features.square().sum(1)
        return values

    def objective(self, vectors: Tensor, features: Tensor, *, fixed: bool = False) -> Tensor:
        """The objective; ``fixed`` leaves out the penalty on class vectors that are not variables."""
        value = self.row_values(vectors, features).sum()
        if self.constraint == "penalty" and not fixed:
            value = value + 0.5 * self.lambda_w * vectors.square().sum()
        return value

    def logit_gradient(self, vectors: Tensor, features: Tensor) -> Tensor:
        """∂(loss part)/∂logits, ``(M, K)``, weights included."""
        return self.weights[:, None] * self.logit_loss.gradient(features @ vectors.T, self.targets)

    def gradients(self, vectors: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients with respect to class vectors ``(K, D)`` and features ``(M, D)``, in closed form."""
        g = self.logit_gradient(vectors, features)
        to_vectors, to_features = g.T @ features, g @ vectors
        if self.constraint == "penalty":
            to_vectors = to_vectors + self.lambda_w * vectors
            to_features = to_features + self.lambda_h * self.num_samples[:, None] * features
        return to_vectors, to_features

    def project_features(self, features: Tensor) -> Tensor:
        """Nearest features within the limit."""
        return features.clamp(min=0) if self.nonnegative else self._project(features, self.energy_h)

    def project_vectors(self, vectors: Tensor) -> Tensor:
        """Nearest class vectors within the limit."""
        return self._project(vectors, self.energy_w)

    def _project(self, rows: Tensor, energy: float) -> Tensor:
        if self.constraint == "penalty":
            return rows
        if self.constraint == "vector":
            return rows * (math.sqrt(energy) / rows.norm(dim=1, keepdim=True)).clamp(max=1.0)
        return rows * (math.sqrt(energy * self.num_classes) / rows.norm()).clamp(max=1.0)

    def random_features(self, seed: int = 0) -> Tensor:
        """Features uniform on the sphere of radius √E_H, ``(M, D)``."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(len(self.targets), self.dim, generator=generator, dtype=torch.float64)
        return math.sqrt(self.energy_h) * rows / rows.norm(dim=1, keepdim=True)

    def random_vectors(self, seed: int = 0) -> Tensor:
        """Class vectors uniform on the sphere of radius √E_W, ``(K, D)``."""
        generator = torch.Generator().manual_seed(seed + 7919)
        rows = torch.randn(self.num_classes, self.dim, generator=generator, dtype=torch.float64)
        return math.sqrt(self.energy_w) * rows / rows.norm(dim=1, keepdim=True)
