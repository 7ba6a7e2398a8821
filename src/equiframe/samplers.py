r"""Samplers: which image comes when in an epoch, as a pure function of (seed, epoch).

``instance``          each image once, shuffled: class k comes with :math:`p_k = n_k/N`.
``class-balanced``    :math:`p_k = 1/K`.
``square-root``       :math:`p_k \propto \sqrt{n_k}` (Mahajan et al., ECCV 2018).
``effective-number``  :math:`p_k \propto n_k(1-\beta)/(1-\beta^{n_k})`: images weighted by the inverse of their class's
                      effective number (Cui et al., CVPR 2019), β = 0.9999.
``progressive``       :math:`p_k(t) = (1-t)\,n_k/N + t/K` with t from 0 in the first epoch to 1 in the last (Kang et al.,
                      ICLR 2020).

All but ``instance`` draw a class for each of the epoch's N places, independently, and then an image of the class:
without replacement until the class is exhausted, then anew. An epoch has N places for every sampler.
"""

from __future__ import annotations

import numpy as np

from equiframe.errors import InputError, unknown

SAMPLERS = ("instance", "class-balanced", "square-root", "effective-number", "progressive")
EFFECTIVE_NUMBER_BETA = 0.9999


def class_probabilities(
    counts: np.ndarray, sampler: str, *, epoch: int = 0, epochs: int = 1, beta: float = EFFECTIVE_NUMBER_BETA
) -> np.ndarray:
    """Probability of each class at each place of an epoch, ``(K,)``; 0 for classes without images.

    Args:
        counts: images of each class, ``(K,)``.
        sampler: a name in `SAMPLERS`.
        epoch: counted from 0; with ``epochs`` it gives t = epoch/(epochs − 1) of ``progressive`` (0 for one epoch).
        beta: of ``effective-number``, in [0, 1).
    """
    counts = np.asarray(counts, dtype=np.float64)
    instance, balanced = counts / counts.sum(), (counts > 0) / (counts > 0).sum()
    if sampler == "instance":
        return instance
    if sampler == "class-balanced":
        return balanced
    if sampler == "square-root":
        weights = np.sqrt(counts)
    elif sampler == "effective-number":
        effective = (1 - beta ** np.maximum(counts, 1)) / (1 - beta)
        weights = counts / effective
    elif sampler == "progressive":
        t = epoch / max(1, epochs - 1)
        weights = (1 - t) * instance + t * balanced
    else:
        raise unknown("sampler", sampler, SAMPLERS)
    return weights / weights.sum()


def epoch_order(
    labels: np.ndarray,
    sampler: str = "instance",
    *,
    seed: int,
    epoch: int,
    epochs: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> np.ndarray:
    """Positions of an epoch's images in the order in which they come, ``(N,)`` for one process.

    Of ``world_size`` processes, ``rank`` gets every ``world_size``-th place of the one-process sequence, ⌊N/world_size⌋
    of them: the shares are disjoint, equally long, and step s of all processes together shows the very images of step
    s of one process with the whole batch. (The last N mod world_size places are left out, as an incomplete batch is.)
    """
    if not 0 <= rank < world_size:
        raise InputError(f"rank must be in 0..{world_size - 1}, got {rank}")
    labels = np.asarray(labels)
    random = np.random.default_rng((seed, epoch))
    if sampler == "instance":
        order = random.permutation(len(labels))
    else:
        counts = np.bincount(labels)
        p = class_probabilities(counts, sampler, epoch=epoch, epochs=epochs)
        order = _images_of(random.choice(len(counts), size=len(labels), p=p), labels, counts, random)
    return order[: len(labels) - len(labels) % world_size][rank::world_size]


def _images_of(classes: np.ndarray, labels: np.ndarray, counts: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """An image for each place whose class was drawn: each class goes through shuffled rounds of all its images."""
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    places = np.split(np.argsort(classes, kind="stable"), np.cumsum(np.bincount(classes, minlength=len(counts)))[:-1])
    order = np.empty(len(classes), dtype=np.int64)
    for of_class, at in zip(members, places, strict=True):
        if len(at):
            rounds = [random.permutation(of_class) for _ in range(-(-len(at) // len(of_class)))]
            order[at] = np.concatenate(rounds)[: len(at)]
    return order
