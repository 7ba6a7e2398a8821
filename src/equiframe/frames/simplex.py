r"""The simplex equiangular tight frame, turned by a Haar-random rotation.

.. math:: m_i^\top m_j = \frac{K}{K-1}\,\delta_{ij} - \frac{1}{K-1}, \qquad \sum_k m_k = 0 .

It exists exactly for :math:`D \ge K-1`, and no K unit vectors have a smaller largest cosine (simplex bound).
The usual formula :math:`\sqrt{K/(K-1)}\,U(I - \tfrac1K 11^\top)` wastes a dimension (it needs D ≥ K); we write the
simplex in a basis of the complement of the ones vector and need D ≥ K−1 only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from equiframe.errors import InputError
from equiframe.frames.base import DenseFrame, check_size


def haar_columns(rows: int, columns: int, *, seed: int) -> Tensor:
    """A Haar-distributed ``(rows, columns)`` matrix with orthonormal columns, float64.

    QR of a Gaussian matrix with the signs of R's diagonal made positive (Mezzadri 2007): without that fix, or from
    uniform instead of Gaussian numbers, the result is not uniform over rotations. The generator is the function's
    own, so neither the global random state nor other draws matter.
    """
    if columns > rows:
        raise InputError(f"only {rows} orthonormal columns fit in R^{rows}, got columns={columns}")
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def helmert(num_classes: int) -> Tensor:
    """Orthonormal basis of the complement of the ones vector, ``(K, K-1)`` float64 (Helmert's contrasts)."""
    k = torch.arange(1, num_classes, dtype=torch.float64)
    basis = torch.triu(torch.ones(num_classes, num_classes - 1, dtype=torch.float64))
    basis[1:, :] -= torch.diag(k)  # column k-1: k ones, then -k
    return basis / torch.sqrt(k * (k + 1))


def simplex_vectors(num_classes: int, dim: int, *, seed: int = 0) -> Tensor:
    """The K vectors of a Haar-rotated simplex ETF, ``(K, D)`` in float64.

    Args:
        num_classes: K ≥ 2.
        dim: D ≥ K−1.
        seed: of the rotation; the same seed gives the same frame.

    Raises:
        InputError: if K and D do not fit; the message says what would.
    """
    num_classes, dim = check_size(num_classes, dim)
    if dim < num_classes - 1:
        raise InputError(
            f"simplex frame with K={num_classes} needs D >= {num_classes - 1}, got D={dim}; "
            + (
                f'use geometry="orthoplex" (K <= {2 * dim}) or widen'
                if num_classes <= 2 * dim
                else f"widen (an orthoplex needs D >= {math.ceil(num_classes / 2)})"
            )
        )
    scale = math.sqrt(num_classes / (num_classes - 1))
    return scale * helmert(num_classes) @ haar_columns(dim, num_classes - 1, seed=seed).T


class SimplexFrame(DenseFrame):
    """Simplex ETF with a stored ``(K, D)`` buffer. Coherence −1/(K−1), which is optimal.

    >>> frame = SimplexFrame(4, 3, seed=0)
    >>> frame.dense().shape, round(frame.coherence, 4)
    (torch.Size([4, 3]), -0.3333)
    """

    geometry = "simplex"

    def __init__(self, num_classes: int, dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        vectors = simplex_vectors(num_classes, dim, seed=seed).to(dtype)
        super().__init__(vectors, coherence=-1.0 / (vectors.shape[0] - 1))
