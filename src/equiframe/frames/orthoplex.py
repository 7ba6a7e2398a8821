r"""The orthoplex (cross-polytope): ±u_i for an orthonormal basis u of R^D.

K ≤ 2D unit vectors with no positive cosine. For K > D+1 no frame has a smaller largest cosine than 0 (Rankin 1955).
Class k < D gets u_k, class D + j gets −u_j, so that classes 0 … D−1 are orthogonal to each other.
"""

from __future__ import annotations

import torch

from equiframe.errors import InputError
from equiframe.frames.base import DenseFrame, check_size
from equiframe.frames.simplex import haar_columns


class OrthoplexFrame(DenseFrame):
    """Haar-rotated orthoplex with a stored ``(K, D)`` buffer.

    Coherence is 0 as soon as two vectors are orthogonal (K ≥ 3), and −1 for the antipodal pair K = 2, D = 1.
    """

    geometry = "orthoplex"

    def __init__(self, num_classes: int, dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        num_classes, dim = check_size(num_classes, dim)
        if num_classes > 2 * dim:
            raise InputError(
                f"orthoplex frame with K={num_classes} needs D >= {-(-num_classes // 2)}, got D={dim}; widen"
            )
        basis = haar_columns(dim, min(dim, num_classes), seed=seed).T
        vectors = torch.cat([basis, -basis])[:num_classes]
        super().__init__(vectors.to(dtype), coherence=-1.0 if dim == 1 else 0.0)
