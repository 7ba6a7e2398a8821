r"""Optima that can be written down: the layer-peeled model under penalties, for any class counts.

Both are the minimisers of :math:`\frac1N\sum_{k,i}\ell(W h_{k,i}, k) + \frac{\lambda_W}{2}\lVert W\rVert_F^2 +
\frac{\lambda_H}{2}\sum_{k,i}\lVert h_{k,i}\rVert^2` with W learned; :math:`\mu = \sqrt{\lambda_W\lambda_H}`. Proofs:
``docs/theory.md``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from equiframe.errors import InputError


@dataclass(frozen=True)
class Optimum:
    """What an optimum is, up to rotations of R^D.

    Attributes:
        logits: ``(K, K)``, column k the logits w_jᵀh_k of the samples of class k.
        vector_gram: ``(K, K)``, W Wᵀ. feature_gram: ``(K, K)``, inner products of the class means.
        value: the objective.
    """

    logits: Tensor
    vector_gram: Tensor
    feature_gram: Tensor
    value: float


def _checked(counts: Tensor, lambda_w: float, lambda_h: float) -> tuple[Tensor, float, float]:
    counts = torch.as_tensor(counts, dtype=torch.float64)
    if counts.ndim != 1 or len(counts) < 2 or not bool((counts > 0).all()):
        raise InputError("class counts must be at least two positive numbers")
    if not (lambda_w > 0 and lambda_h > 0):
        raise InputError(f"penalties must be positive, got lambda_w = {lambda_w} and lambda_h = {lambda_h}")
    return counts, float(counts.sum()), (lambda_w * lambda_h) ** 0.5


def mse_optimum(counts: Tensor, lambda_w: float, lambda_h: float, *, dim: int | None = None) -> Optimum:
    r"""Squared error :math:`\tfrac12\lVert z - e_c\rVert^2`: every class on an axis of its own.

    .. math:: \lVert w_k\rVert^2 = \sqrt{\lambda_H/\lambda_W}\,(\sqrt{n_k} - N\mu)_+, \qquad
              \lVert h_k\rVert^2 = \sqrt{\lambda_W/\lambda_H}\,(\sqrt{n_k} - N\mu)_+/n_k, \qquad
              w_k^\top h_k = (1 - N\mu/\sqrt{n_k})_+

    and all else is orthogonal: class k is zero iff :math:`n_k \le N^2\lambda_W\lambda_H`. With D < K only the D largest
    classes are kept (among equals at the limit, any D of them, or a rotation).

    Source: Dang et al., ICML 2023, arXiv 2301.00437 (their ``s_k`` is our ‖w_k‖ for one linear layer).
    """
    counts, total, mu = _checked(counts, lambda_w, lambda_h)
    singular = (counts.sqrt() - total * mu).clamp(min=0)
    if dim is not None and dim < len(counts):
        singular[counts.argsort(descending=True, stable=True)[dim:]] = 0
    ratio = (lambda_h / lambda_w) ** 0.5
    value = ((counts.sqrt() - singular).square().sum() / (2 * total) + mu * singular.sum()).item()
    return Optimum(
        logits=(singular / counts.sqrt()).diag(),
        vector_gram=(ratio * singular).diag(),
        feature_gram=(singular / (ratio * counts)).diag(),
        value=value,
    )


def relu_optimum(counts: Tensor, lambda_w: float, lambda_h: float) -> Optimum:
    r"""Cross-entropy with features h ≥ 0, D ≥ K: orthogonal class means, class vectors centred and scaled.

    .. math:: m_k = \log\Bigl((K-1)\Bigl(\tfrac{\sqrt{n_k K/(K-1)}}{N\mu} - 1\Bigr)\Bigr)_{\ge 0}, \qquad
              w_j^\top h_k = m_k(\delta_{jk} - \tfrac1K), \qquad
              \lVert h_k\rVert^2 = m_k\sqrt{\tfrac{(K-1)\lambda_W}{K\lambda_H n_k}}, \qquad
              w_k \propto K\sqrt{n_k}\,h_k - \sum_l\sqrt{n_l}\,h_l .

    Class k is zero (its mean, and what its mean adds to W) iff :math:`n_k \le N^2\lambda_W\lambda_H\,K/(K-1)`.

    Source: Dang et al., ICML 2024, arXiv 2401.02058.
    """
    counts, total, mu = _checked(counts, lambda_w, lambda_h)
    k = len(counts)
    odds = (k - 1) * ((counts * k / (k - 1)).sqrt() / (total * mu) - 1)
    margin = odds.clamp(min=1).log()
    centred = torch.eye(k, dtype=torch.float64) - 1 / k
    feature = margin * ((k - 1) * lambda_w / (k * lambda_h * counts)).sqrt()  # ‖h_k‖²
    weight = torch.where(feature > 0, margin.square() / feature, 0.0)  # b_k², with w_j = Σ_k b_k (δ_jk − 1/K) e_k
    loss = torch.nn.functional.softplus(math.log(k - 1) - margin)
    value = ((counts / total * loss).sum() + mu * ((k - 1) / k * counts).sqrt() @ margin).item()
    return Optimum(centred * margin, centred @ weight.diag() @ centred, feature.diag(), value)
