r"""Losses of the layer-peeled model: logits in, loss per sample out, with the gradient in closed form.

All are convex in the logits ``z = W h``; nothing here is averaged or weighted. Float64 is meant, and small values
keep their relative accuracy: the cross-entropy of a logit margin of 40 is 4e-18, not 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from equiframe.errors import unknown

LOSSES = ("ce", "dr", "mse", "balanced", "adjusted")


@dataclass(frozen=True)
class LogitLoss:
    """A loss of logits ``(M, K)`` and integer targets ``(M,)``.

    Attributes:
        name: one of `LOSSES`.
        value: ``(M,)`` losses.
        gradient: ``(M, K)``, each row the gradient with respect to that row of logits.
        smoothness: an upper bound on the largest eigenvalue of the Hessian in the logits.
        shift_invariant: adding a constant to all logits of a sample changes nothing.
    """

    name: str
    value: Callable[[Tensor, Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]
    smoothness: float
    shift_invariant: bool


def _margins(logits: Tensor, targets: Tensor) -> Tensor:
    """``z_j − z_c`` with −∞ in the target's own place, ``(M, K)``."""
    margins = logits - logits.gather(1, targets[:, None])
    return margins.scatter(1, targets[:, None], -torch.inf)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    r"""``log(1 + Σ_{j≠c} exp(z_j − z_c))``, ``(M, K) -> (M,)``, to full relative accuracy however small."""
    return torch.nn.functional.softplus(torch.logsumexp(_margins(logits, targets), 1), threshold=700.0)


def cross_entropy_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    r"""``p − e_c``, ``(M, K)``; the target's entry is ``−Σ_{j≠c} p_j``, free of the cancellation in ``p_c − 1``."""
    others = torch.softmax(logits, 1).scatter(1, targets[:, None], 0.0)
    return others.scatter(1, targets[:, None], -others.sum(1, keepdim=True))


def make_loss(name: str, *, counts: Tensor, scale: float, tau: float = 1.0) -> LogitLoss:
    r"""The loss called ``name``.

    - ``ce``: cross-entropy.
    - ``dr``: dot regression :math:`(z_c - s)^2/(2s)` (Yang et al. 2022), s = ``scale`` = √(E_W E_H).
    - ``mse``: :math:`\tfrac12\lVert z - e_c\rVert^2`.
    - ``adjusted``: cross-entropy of :math:`z_j + \tau\log(n_j/N)` (Menon et al. 2021).
    - ``balanced``: the same with τ = 1 (balanced softmax, Ren et al. 2020).

    Raises:
        InputError: for any other name.
    """
    if name == "ce":
        return LogitLoss(name, cross_entropy, cross_entropy_gradient, 0.5, True)
    if name == "dr":

        def dr_gradient(z: Tensor, y: Tensor) -> Tensor:
            own = z.gather(1, y[:, None])
            return torch.zeros_like(z).scatter(1, y[:, None], own / scale - 1)

        return LogitLoss(
            name, lambda z, y: (z.gather(1, y[:, None])[:, 0] - scale) ** 2 / (2 * scale), dr_gradient, 1 / scale, False
        )
    if name == "mse":

        def residual(z: Tensor, y: Tensor) -> Tensor:
            return z - torch.nn.functional.one_hot(y, z.shape[1]).to(z.dtype)

        return LogitLoss(name, lambda z, y: 0.5 * residual(z, y).square().sum(1), residual, 1.0, False)
    if name in ("balanced", "adjusted"):
        offset = (1.0 if name == "balanced" else tau) * torch.log(counts.to(torch.float64) / counts.sum())
        return LogitLoss(
            name,
            lambda z, y: cross_entropy(z + offset, y),
            lambda z, y: cross_entropy_gradient(z + offset, y),
            0.5,
            True,
        )
    raise unknown("loss", name, LOSSES)
