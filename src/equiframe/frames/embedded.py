r"""A Kerdock or Gold frame of the largest power of two n ≤ D, turned into R^D.

.. math:: m_k = U m'_k, \qquad U^\top U = I_n, \qquad m_k^\top h = m_k'^\top (U^\top h)

U has n Haar-distributed orthonormal columns in R^D, so all cosines are those of the smaller frame, exactly. Only U is stored.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from equiframe.errors import InputError
from equiframe.frames.base import Frame, check_size
from equiframe.frames.bases import BasesFrame, GoldFrame, KerdockFrame
from equiframe.frames.binary import PRIMITIVE
from equiframe.frames.simplex import haar_columns

LARGEST = 2 ** (max(PRIMITIVE) + 1)  # the widest Kerdock frame


def inner_dim(dim: int) -> int:
    """The largest power of two n ≤ D that has a Kerdock or Gold frame; 0 if none has (D < 4)."""
    return min(1 << (dim.bit_length() - 1), LARGEST) if dim >= 4 else 0


def capacity(n: int) -> int:
    """The most classes of a Kerdock (n = 4, 16, 64, …) or Gold (n = 8, 32, 128, …) frame; 0 for n = 0."""
    return n * (n + 2) if n.bit_length() % 2 else 2 * n * (n + 1)


def bases_frame(num_classes: int, n: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> BasesFrame:
    """Kerdock or Gold, as n = 2^m says."""
    kind = KerdockFrame if n.bit_length() % 2 else GoldFrame
    return kind(num_classes, n, seed=seed, dtype=dtype)


class EmbeddedFrame(Frame):
    """A Kerdock or Gold frame in n of D dimensions; products and vectors go through it, so nothing of size K is made."""

    geometry = "embedded"
    isometry: Tensor  # (D, n)

    def __init__(self, num_classes: int, dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        num_classes, dim = check_size(num_classes, dim)
        n = inner_dim(dim)
        if num_classes > capacity(n):
            raise InputError(f"embedded frame in D={dim} dimensions has K <= {capacity(n)}, got K={num_classes}; widen")
        inner = bases_frame(num_classes, n, seed=seed, dtype=dtype)
        super().__init__(num_classes, dim, inner.coherence)
        self.inner = inner
        self.register_buffer("isometry", haar_columns(dim, n, seed=seed).to(dtype))

    @property
    def dtype(self) -> torch.dtype:
        return self.isometry.dtype

    def vectors(self, targets: Tensor) -> Tensor:
        return self._turn(self.inner.vectors(targets), self.isometry.T)

    def logits(self, features: Tensor) -> Tensor:
        return self.inner.logits(self._turn(features, self.isometry))

    def pieces(self, features: Tensor) -> Iterator[Tensor]:
        return self.inner.pieces(self._turn(features, self.isometry))

    def topk(self, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return self.inner.topk(self._turn(features, self.isometry), k)

    def dense(self) -> Tensor:
        return self._turn(self.inner.dense(), self.isometry.T)

    @staticmethod
    def _turn(rows: Tensor, matrix: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):  # in bfloat16 the frame would lose its cosines
            return rows @ matrix
