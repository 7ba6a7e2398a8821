r"""Class vectors whose cosines follow a tree of two levels: classes, and groups of them.

With n_g classes in group g, siblings get the cosine ρ and all other pairs the cosine c. The mean of a group then has the
squared length :math:`\alpha_g = (1 + \rho(n_g - 1))/n_g`, and such vectors exist iff :math:`\sum_g -c/(\alpha_g - c) \le 1`
(c < 0). Equality is the smallest c: the K vectors then lie in K−1 dimensions. With G groups of n classes it is
:math:`c = -\alpha/(G-1)`: a simplex of groups, and in each an own simplex in a space of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from equiframe.errors import InputError
from equiframe.frames.base import DenseFrame
from equiframe.frames.simplex import haar_columns


def check_parents(parents: Sequence[int] | Tensor) -> Tensor:
    """The group of each class, ``(K,)`` int64; `InputError` if these are not whole numbers of at least two groups."""
    given = torch.as_tensor(parents if isinstance(parents, Tensor) else list(parents)).cpu()
    if given.ndim != 1 or given.is_floating_point() or given.dtype == torch.bool:
        raise InputError("parents must be a list of whole numbers, the group of each class")
    if len(given.unique()) < 2:
        raise InputError("a class tree needs at least 2 groups")
    return given.long()


def tree_gram(parents: Sequence[int] | Tensor, sibling_cosine: float) -> Tensor:
    """The ``(K, K)`` cosines: 1, ρ for siblings, else the smallest c that is possible; float64."""
    groups = check_parents(parents)
    num_classes = len(groups)
    counts = torch.unique(groups, return_counts=True)[1].double()
    lowest = -1 / (num_classes - 1)
    if not lowest <= sibling_cosine < 1:
        raise InputError(f"sibling_cosine must be in [-1/(K-1), 1) = [{lowest:.4g}, 1), got {sibling_cosine!r}")
    lengths = (1 + sibling_cosine * (counts - 1)) / counts
    low, high = 0.0, 1.0  # of −c; Σ x/(α+x) grows with x, and is above 1 where x = 1 (two groups, α ≤ 1)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float((middle / (lengths + middle)).sum()) < 1 else (low, middle)
    siblings = (groups[:, None] == groups).double()
    return (sibling_cosine * siblings - high * (1 - siblings)).fill_diagonal_(1.0)


def tree_vectors(parents: Sequence[int] | Tensor, dim: int, *, sibling_cosine: float = 0.5, seed: int = 0) -> Tensor:
    """K unit vectors ``(K, D)``, float64, with the cosines of `tree_gram`, Haar-turned.

    Args:
        parents: the group of each class, K whole numbers.
        dim: D ≥ K−1.
        sibling_cosine: ρ in [−1/(K−1), 1). At the lower end the tree is the simplex.
        seed: of the rotation.

    Raises:
        InputError: if there are fewer than two groups, D < K−1, or ρ is out of range.
    """
    gram = tree_gram(parents, sibling_cosine)
    num_classes = len(gram)
    if dim < num_classes - 1:
        raise InputError(f"a class tree with K={num_classes} needs D >= {num_classes - 1}, got D={dim}; widen")
    values, columns = torch.linalg.eigh(gram)
    roots = columns[:, 1:] * values[1:].clamp_min(0).sqrt()  # the smallest eigenvalue is 0
    return roots @ haar_columns(dim, num_classes - 1, seed=seed).T


class TreeFrame(DenseFrame):
    """`tree_vectors` as a frame; ``FrameHead(dim, K, geometry=TreeFrame(parents, dim), logit_scale=…)`` takes it."""

    geometry = "tree"

    def __init__(
        self,
        parents: Sequence[int] | Tensor,
        dim: int,
        *,
        sibling_cosine: float = 0.5,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        vectors = tree_vectors(parents, dim, sibling_cosine=sibling_cosine, seed=seed)
        coherence = float(tree_gram(parents, sibling_cosine).fill_diagonal_(-2.0).max())
        super().__init__(vectors.to(dtype), coherence=coherence)


def mistake_severity(predictions: Tensor, labels: Tensor, parents: Sequence[int] | Tensor) -> float:
    """Mean height of the lowest common ancestor over the wrong predictions: 1 within a group, 2 across; NaN without any.

    Source: Bertinetto et al., CVPR 2020 ("Making better mistakes").
    """
    groups = check_parents(parents).to(labels.device)
    wrong = predictions != labels
    return float((1 + (groups[predictions[wrong]] != groups[labels[wrong]]).double()).mean())
