r"""Regression of the angle: dot regression's optimum and its pull-only gradient, without its flat bottom.

On the sphere dot regression is :math:`\tfrac{s}{2}(1-\cos\theta)^2 \approx s\theta^4/8`: no curvature at the optimum,
so gradient descent gets there like :math:`t^{-1/2}`. Both losses here have curvature s at the optimum.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SMALL = 1e-3  # below this squared chord the series is used; its first dropped term is then 3e-20 relative


def _unit(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of length 1; rows of length 0 stay 0 and get no gradient (they have no direction to correct)."""
    rows = rows.to(dtype)
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    alive = length > torch.finfo(dtype).tiny ** 0.5
    return torch.where(alive, rows / torch.where(alive, length, torch.ones_like(length)), torch.zeros_like(rows))


def _units(features: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(features.dtype, vectors.dtype), torch.float32)
    return _unit(features, dtype), _unit(vectors, dtype)


def _squared_angle(u: Tensor, w: Tensor) -> Tensor:
    """θ² of unit vectors, ``(…, D) -> (…,)``: Kahan's 2·atan2(‖u−w‖, ‖u+w‖), and its series in ‖u−w‖² near θ = 0."""
    chord = (u - w).square().sum(-1)
    co_chord = (u + w).square().sum(-1)
    small = chord < _SMALL
    series = chord * (1 + chord * (1 / 12 + chord * (1 / 90 + chord * (1 / 560 + chord * (1 / 3150 + chord / 16632)))))
    safe = torch.where(small, torch.ones_like(chord), chord)
    co_safe = co_chord.clamp(min=torch.finfo(chord.dtype).eps ** 2)
    return torch.where(small, series, (2 * torch.atan2(safe.sqrt(), co_safe.sqrt())).square())


def angular_regression(features: Tensor, vectors: Tensor, *, scale: float = 1.0) -> Tensor:
    r"""Half the squared angle between each feature and its class vector.

    .. math:: L = \tfrac{s}{2}\,\theta^2, \qquad \theta = \angle(h, w_c) \in [0, \pi], \qquad
              \nabla_h L = -\frac{s}{\lVert h\rVert}\,\frac{\theta}{\sin\theta}\,
              \bigl(I - \hat h\hat h^\top\bigr)\,\hat w_c .

    The same minimisers on the sphere as dot regression and as cross-entropy on a simplex frame, a gradient that only
    pulls towards :math:`w_c`, and on the sphere an exact contraction: a Riemannian gradient step of size η turns θ into
    :math:`|1 - \eta s/\lVert h\rVert^2|\,\theta`, at every s and from every start but the antipode
    (``docs/theory.md``). Lengths of features and vectors do not matter.

    Args:
        features: ``(B, D)``, any length; half precision is computed in float32.
        vectors: ``(B, D)`` class vectors of the targets, ``frame.vectors(targets)``.
        scale: s > 0.

    Returns:
        ``(B,)`` losses in [0, s·π²/2]. Gradients are finite everywhere, 0 at θ = 0, and of length at most sπ/‖h‖;
        at θ = π exactly, where no direction is preferred, and for h = 0 (θ counts as π/2) the gradient is 0.
    """
    return 0.5 * scale * _squared_angle(*_units(features, vectors))


def cosine_regression(features: Tensor, vectors: Tensor, *, scale: float = 1.0) -> Tensor:
    r"""``s·(1 − cos θ)``, the square root of dot regression: :math:`L_{DR} = L_{cos}^2/(2s)`, ``(B, D) -> (B,)``.

    Curvature s at the optimum, hence a linear rate; but the gradient s·sin θ also vanishes at the antipode.
    Computed as s‖ĥ − ŵ‖²/2, which keeps its accuracy near θ = 0.
    """
    u, w = _units(features, vectors)
    return 0.5 * scale * (u - w).square().sum(-1)
