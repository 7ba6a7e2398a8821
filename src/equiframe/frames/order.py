"""A frame whose vectors are given to the classes in an order of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from equiframe.errors import InputError
from equiframe.frames.base import Frame


def check_order(order: Sequence[int] | Tensor, size: int) -> Tensor:
    """``order`` as an int64 tensor; `InputError` if it is no permutation of 0 … size−1."""
    given = torch.as_tensor(order if isinstance(order, Tensor) else list(order))
    whole = not given.is_floating_point() and given.dtype != torch.bool
    if given.shape != (size,) or not whole or not torch.equal(given.sort().values.cpu(), torch.arange(size)):
        raise InputError(f"an order must name each of the {size} vectors 0..{size - 1} once")
    return given.long()


class OrderedFrame(Frame):
    """Class k gets vector ``order[k]`` of ``frame``: the same vectors, and the same cost but for a gather.

    The order is a buffer ``(K,)`` in the state dict.
    """

    order: Tensor

    def __init__(self, frame: Frame, order: Sequence[int] | Tensor) -> None:
        super().__init__(frame.num_classes, frame.dim, frame.coherence)
        self.frame, self.geometry = frame, frame.geometry
        self.register_buffer("order", check_order(order, frame.num_classes))

    @property
    def dtype(self) -> torch.dtype:
        return self.frame.dtype

    def set_order(self, order: Sequence[int] | Tensor) -> None:
        self.order.copy_(check_order(order, self.num_classes))

    def vectors(self, targets: Tensor) -> Tensor:
        return self.frame.vectors(self.order[targets])

    def logits(self, features: Tensor) -> Tensor:
        return self.frame.logits(features)[:, self.order]

    def pieces(self, features: Tensor) -> Iterator[Tensor]:
        return self.frame.pieces(features)

    def topk(self, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, vectors = self.frame.topk(features, k)
        return values, torch.argsort(self.order)[vectors]

    def dense(self) -> Tensor:
        return self.frame.dense()[self.order]
