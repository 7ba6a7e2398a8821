"""The contract that every frame keeps, and the frame that simply stores its vectors."""

from __future__ import annotations

import numbers
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from equiframe.errors import InputError


def check_size(num_classes: object, dim: object) -> tuple[int, int]:
    """Return ``(num_classes, dim)`` as ints, or say what is wrong with them.

    Raises:
        InputError: if either is not a whole number, ``num_classes < 2`` or ``dim < 1``.
    """
    for name, value in (("num_classes", num_classes), ("dim", dim)):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise InputError(f"{name} must be a whole number, got {value!r}")
    if num_classes < 2:  # type: ignore[operator]
        raise InputError(f"a frame needs at least 2 classes, got num_classes={num_classes}")
    if dim < 1:  # type: ignore[operator]
        raise InputError(f"a frame needs dim >= 1, got dim={dim}")
    return int(num_classes), int(dim)  # type: ignore[call-overload]


class Frame(nn.Module):
    """K fixed unit vectors in R^D. Nothing in a frame is trained.

    Attributes:
        num_classes: K.
        dim: D.
        coherence: the largest cosine between two different vectors, exact.
        geometry: the name under which `make_frame` knows it.
    """

    geometry: str = "frame"

    def __init__(self, num_classes: int, dim: int, coherence: float) -> None:
        super().__init__()
        self.num_classes, self.dim = check_size(num_classes, dim)
        self.coherence = float(coherence)

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype in which the frame meets the features."""
        raise NotImplementedError

    def vectors(self, targets: Tensor) -> Tensor:
        """Class vectors of integer ``targets (B,)``: a ``(B, D)`` tensor of unit rows."""
        raise NotImplementedError

    def logits(self, features: Tensor) -> Tensor:
        """Inner products ``features (B, D) -> (B, K)``; differentiable with respect to the features."""
        raise NotImplementedError

    def pieces(self, features: Tensor) -> Iterator[Tensor]:
        """The inner products of `logits` in pieces ``(B, n)``, in any order of classes, each of bounded size for a B of bounded size."""
        yield self.logits(features)

    def topk(self, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest inner products and their classes, each ``(B, k)``, largest first."""
        return torch.topk(self.logits(features), k, dim=1)

    def dense(self) -> Tensor:
        """All vectors as one ``(K, D)`` tensor, for looking and testing."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, dim={self.dim}, coherence={self.coherence:.6g}"


class DenseFrame(Frame):
    """A frame that stores its vectors in the persistent buffer ``class_vectors (K, D)``.

    Being a buffer, it follows ``.to()``, ``.half()`` and ``state_dict``: a reloaded frame is the saved one to the
    bit, whatever seed the new object was made with.
    """

    class_vectors: Tensor

    def __init__(self, class_vectors: Tensor, coherence: float) -> None:
        super().__init__(class_vectors.shape[0], class_vectors.shape[1], coherence)
        self.register_buffer("class_vectors", class_vectors)

    @property
    def dtype(self) -> torch.dtype:
        return self.class_vectors.dtype

    def vectors(self, targets: Tensor) -> Tensor:
        return self.class_vectors[targets]

    def logits(self, features: Tensor) -> Tensor:
        return features @ self.class_vectors.T

    def dense(self) -> Tensor:
        return self.class_vectors
