r"""The simplex equiangular tight frame, turned by a Haar-random rotation.

.. math:: m_i^\top m_j = \frac{K}{K-1}\,\delta_{ij} - \frac{1}{K-1}, \qquad \sum_k m_k = 0 .

It exists exactly for :math:`D \ge K-1`, and no K unit vectors have a smaller largest cosine (simplex bound).
The usual formula :math:`\sqrt{K/(K-1)}\,U(I - \tfrac1K 11^\top)` wastes a dimension (it needs D ≥ K); we write the
simplex in a basis of the complement of the ones vector and need D ≥ K−1 only.
"""

from __future__ import annotations

import functools
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


@functools.lru_cache(maxsize=8)
def _helmert_on(num_classes: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return helmert(num_classes).to(device, dtype)  # kept: a training step should not carry it to the GPU anew


def nearest_simplex(vectors: Tensor, *, previous: Tensor | None = None, proximity: float = 1e-3) -> Tensor:
    r"""The simplex ETF nearest to K vectors, up to where its centre lies and how large it is.

    .. math:: W(Q) = \sqrt{\tfrac{K}{K-1}}\,F Q^\top, \qquad
              \min_{Q^\top Q = I}\ \min_{b,\,t>0} \lVert Y - 1b^\top - t\,W(Q)\rVert_F^2
              \;\Rightarrow\; Q = \mathrm{polar}(Y^\top F),

    with F Helmert's ``(K, K-1)`` basis and polar(A) = UVᵀ of the singular value decomposition A = UΣVᵀ: on the
    Stiefel manifold the problem is linear, so one polar factor solves it. A previous frame :math:`W(Q')` pulls by
    the term :math:`\tfrac\delta2\lVert Q-Q'\rVert^2`, which decides where the vectors leave the frame open:
    :math:`Q = \mathrm{polar}\big(\tfrac{2}{\sqrt{K-1}}\,Y^\top F/\lVert Y^\top F\rVert_F + \delta Q'\big)`.

    Args:
        vectors: Y, ``(K, D)`` with D ≥ K−1, such as class means; a common shift or factor changes nothing.
        previous: the ``(K, D)`` simplex to stay near.
        proximity: δ, the weight of staying near.

    Returns:
        ``(K, D)`` unit vectors in the dtype of ``vectors``.

    Raises:
        InputError: if D < K−1.

    Source: the problem is that of Markou et al., NeurIPS 2024 (arXiv 2411.01248), who solve it by trust regions.
    """
    num_classes, dim = check_size(*vectors.shape)
    if dim < num_classes - 1:
        raise InputError(f"a simplex of K={num_classes} vectors needs D >= {num_classes - 1}, got D={dim}")
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    basis = _helmert_on(num_classes, vectors.device, dtype)
    scale = math.sqrt(num_classes / (num_classes - 1))
    directions = vectors.to(dtype).T @ basis
    if previous is not None:
        rounding = math.sqrt(torch.finfo(dtype).eps) * vectors.to(dtype).norm() + 1e-12  # equal vectors say nothing
        directions = 2 / math.sqrt(num_classes - 1) * directions / torch.maximum(directions.norm(), rounding)
        directions = directions + proximity / scale * previous.to(dtype).T @ basis
    u, _, vh = torch.linalg.svd(directions, full_matrices=False)
    return (scale * basis @ (u @ vh).T).to(vectors.dtype)


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
