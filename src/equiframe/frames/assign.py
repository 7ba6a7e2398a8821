r"""Which class gets which vector, where the vectors of a frame differ in their angles.

With class similarities S (cosines of the centred class means) and the frame's cosines C, an order p costs

.. math:: \sum_{i \ne j} S_{ij}\, C_{p(i)p(j)}

A small cost gives similar classes vectors far apart. It is a quadratic assignment problem (NP-hard; Koopmans & Beckmann 1957),
here solved by steepest descent over swaps of two classes, from several orders.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from equiframe.errors import InputError
from equiframe.frames.base import Frame

MOST = 1024  # classes; a swap costs K² and a descent takes a few K swaps: under a minute
SIMILAR = ("apart", "together")


def class_similarity(class_means: Tensor) -> Tensor:
    """Cosines between class means about their centre, ``(K, D) -> (K, K)`` float64, with a diagonal of 0."""
    means = class_means.detach().double().cpu()
    means = F.normalize(means - means.mean(0), dim=1)
    return (means @ means.T).fill_diagonal_(0.0)


def order_cost(similarity: Tensor, cosines: Tensor, order: Tensor) -> float:
    """``Σ_{i≠j} S_ij C_{p(i)p(j)}`` of two symmetric matrices with zero diagonals."""
    return float((similarity * cosines[order][:, order]).sum())


def _descend(similarity: Tensor, cosines: Tensor, order: Tensor) -> Tensor:
    """Swap the two classes that lower the cost most, until none does. A swap of r and s changes the cost by
    ``2 (M_rs + M_sr − M_rr − M_ss + 2 S_rs B_rs)`` with B the cosines in this order and M = S B."""
    order = order.clone()
    placed = cosines[order][:, order]
    least = -1e-10 * (1 + float((similarity.abs() @ placed.abs()).diagonal().sum()))
    products = similarity @ placed
    while True:
        own = products.diagonal()
        gains = products + products.T - own[:, None] - own[None, :] + 2 * similarity * placed
        best = int(gains.argmin())
        if gains.flatten()[best] >= least:
            return order
        pair = torch.tensor(divmod(best, len(order)))
        swapped = pair.flip(0)
        before = placed[pair].clone()
        order[pair] = order[swapped]
        placed[pair] = placed[swapped]
        placed[:, pair] = placed[:, swapped]
        products += similarity[:, pair] @ (placed[pair] - before)  # K² work, not K³: but two columns changed everywhere
        products[:, pair] = similarity @ placed[:, pair]


def assign(frame: Frame, class_means: Tensor, *, similar: str = "apart", seed: int = 0, starts: int = 8) -> Tensor:
    """The order in which the vectors of a frame suit the classes: class k should get vector ``order[k]``.

    Args:
        frame: K vectors; in a simplex all orders are equal, and the given one is returned.
        class_means: ``(K, D')`` of any features, such as those of a warm-up; or the vectors of a class tree.
        similar: ``apart`` gives similar classes vectors far from each other, ``together`` near ones.
        seed: of the orders from which the search starts, beside the given one.
        starts: how many starts in all, 1 or more; the best end is taken.

    Returns:
        a permutation ``(K,)``, int64: a local optimum, at least as good as 0, 1, …, K−1. It is exact work in float64 on the CPU.

    Raises:
        InputError: if the sizes differ, K > 1,024, or an option is not known.
    """
    if similar not in SIMILAR:
        raise InputError(f"similar must be 'apart' or 'together', got {similar!r}")
    if class_means.ndim != 2 or len(class_means) != frame.num_classes:
        raise InputError(f"assign needs {frame.num_classes} class means (K, D), got shape {tuple(class_means.shape)}")
    if frame.num_classes > MOST:
        raise InputError(f"assign searches over at most {MOST} classes, got {frame.num_classes}")
    if starts < 1:
        raise InputError(f"starts must be at least 1, got {starts!r}")
    if not bool(class_means.isfinite().all()):
        raise InputError("assign needs finite class means")
    similarity = class_similarity(class_means) * (1 if similar == "apart" else -1)
    vectors = frame.dense().detach().double().cpu()
    cosines = (vectors @ vectors.T).fill_diagonal_(0.0)
    generator = torch.Generator().manual_seed(seed)
    given = torch.arange(frame.num_classes)
    best, least = given, order_cost(similarity, cosines, given)
    margin = 1e-6 * float(
        (similarity * cosines).abs().sum()
    )  # a frame in float32 rounds; noise must not move a simplex
    for start in range(starts):
        first = given if start == 0 else torch.randperm(frame.num_classes, generator=generator)
        order = _descend(similarity, cosines, first)
        cost = order_cost(similarity, cosines, order)
        if cost < least - margin:
            best, least = order, cost
    return best
