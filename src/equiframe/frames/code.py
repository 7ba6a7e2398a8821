r"""A spherical code found by optimisation, for few vectors where no closed form is better.

It minimises the smooth maximum of the cosines,

.. math:: \frac1\beta \log \sum_{i \ne j} e^{\beta\, m_i^\top m_j},

over unit vectors, with β rising from 4 to 1,000, by momentum steps along the sphere. At β → ∞ this is Tammes' problem (Jiang et
al., *Generalized neural collapse for a large number of classes*, ICML 2024, call its solutions softmax codes).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from equiframe.errors import InputError
from equiframe.frames.base import DenseFrame, check_size

MOST = 1024  # classes; the work of a step grows with K²
_STEPS, _BETAS, _RATE = 600, (4.0, 1000.0), 0.1


@torch.no_grad()
def optimise_code(num_classes: int, dim: int, *, seed: int = 0, steps: int = _STEPS) -> Tensor:
    """K unit vectors ``(K, D)``, float64, with a small largest cosine; a local optimum that the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    code = F.normalize(torch.randn(num_classes, dim, generator=generator), dim=1)
    momentum, power = torch.zeros_like(code), torch.zeros(())
    for step in range(steps):
        done = step / steps
        beta = _BETAS[0] * (_BETAS[1] / _BETAS[0]) ** done
        cosines = (code @ code.T).fill_diagonal_(-2.0)
        push = torch.softmax((beta * cosines).flatten(), 0).view_as(cosines) @ code
        push -= (push * code).sum(1, keepdim=True) * code  # along the sphere
        momentum = 0.9 * momentum + 0.1 * push
        power = 0.99 * power + 0.01 * push.square().mean()
        scale = math.sqrt(dim) * (1 - 0.9 ** (step + 1)) * (power / (1 - 0.99 ** (step + 1))).sqrt().clamp_min(1e-30)
        code = F.normalize(code - _RATE * (1 - done) / scale * momentum, dim=1)
    return F.normalize(code.double(), dim=1)


def largest_cosine(vectors: Tensor) -> float:
    """The largest cosine between two different rows of unit length."""
    return (vectors @ vectors.T).fill_diagonal_(-2.0).max().item()


class CodeFrame(DenseFrame):
    """An optimised spherical code with a stored ``(K, D)`` buffer, K ≤ 1,024; its coherence is measured."""

    geometry = "code"

    def __init__(self, num_classes: int, dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        num_classes, dim = check_size(num_classes, dim)
        if num_classes > MOST:
            raise InputError(f"an optimised code has K <= {MOST} classes, got K={num_classes}; use geometry='auto'")
        if dim < 2:
            raise InputError(f"an optimised code needs D >= 2, got D={dim}")
        code = optimise_code(num_classes, dim, seed=seed)
        super().__init__(code.to(dtype), coherence=largest_cosine(code))
