"""Long tails: class-count profiles, subsets that follow them, class groups.

The common protocol of LDAM, MiSLAS and Yang et al. is reproduced index for index: NumPy ``RandomState(0)``, classes
in order, ``int(n_max · R^(−k/(K−1)))`` images each. Unlike some of that code, no more labels than images are ever
emitted: a count is capped at what exists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from equiframe.errors import InputError, unknown

PROFILES = ("exponential", "step", "pareto")


def class_profile(
    num_classes: int, max_count: float, ratio: float, *, kind: str = "exponential", power: float = 6.0
) -> list[int]:
    r"""Images of each class, largest first.

    * ``exponential``: :math:`\lfloor n_{\max} R^{-k/(K-1)} \rfloor` (Cui et al. 2019; LDAM 2019).
    * ``step``: the first ⌊K/2⌋ classes keep n_max, the rest :math:`\lfloor n_{\max}/R \rfloor`.
    * ``pareto``: :math:`n_{\max}(1 + k/x)^{-\alpha}` with shape α = ``power`` and x such that the last class has
      n_max/R: a heavier tail than the exponential's (as ImageNet-LT's, α = 6).

    Args:
        ratio: R = n_max / n_min ≥ 1.

    Raises:
        InputError: for R < 1, or a profile that leaves a class without images.
    """
    if kind not in PROFILES:
        raise unknown("imbalance profile", kind, PROFILES)
    if not ratio >= 1:
        raise InputError(f"the imbalance ratio n_max/n_min must be >= 1, got {ratio:g}")
    if num_classes < 2:
        raise InputError(f"a class profile needs at least 2 classes, got {num_classes}")
    factor = 1 / ratio
    if kind == "exponential":
        counts = [int(max_count * factor ** (k / (num_classes - 1.0))) for k in range(num_classes)]
    elif kind == "step":
        half = num_classes // 2
        counts = [int(max_count)] * half + [int(max_count * factor)] * (num_classes - half)
    elif ratio == 1:
        counts = [int(max_count)] * num_classes
    else:
        scale = (num_classes - 1) / math.expm1(math.log(ratio) / power)
        # the last class is n_max/R by construction; rounding guards it against 49.999…
        counts = [int(round(max_count * (1 + k / scale) ** -power, 9)) for k in range(num_classes)]
    if min(counts) < 1:
        raise InputError(
            f"ratio {ratio:g} with {max_count:g} images in the largest class leaves class {counts.index(0)} "
            f"without images; use a ratio of at most {int(max_count)}"
        )
    return counts


def subset_indices(labels: np.ndarray, counts: Sequence[int], *, seed: int = 0) -> np.ndarray:
    """Indices of a subset with ``counts[k]`` images of class k (fewer where fewer exist), class by class.

    Index for index the common protocol: ``RandomState(seed)`` shuffles the positions of each class in order and the
    first ``counts[k]`` are kept.
    """
    labels = np.asarray(labels)
    random = np.random.RandomState(seed)
    chosen = []
    for k, count in enumerate(counts):
        positions = np.flatnonzero(labels == k)
        random.shuffle(positions)
        chosen.append(positions[:count])
    indices = np.concatenate(chosen)
    assert len(indices) == sum(
        min(int(c), int(n)) for c, n in zip(counts, np.bincount(labels, minlength=len(counts)), strict=False)
    )
    return indices


def long_tail_indices(
    labels: np.ndarray,
    num_classes: int,
    ratio: float,
    *,
    kind: str = "exponential",
    seed: int = 0,
    counts: Sequence[int] | None = None,
) -> np.ndarray:
    """Cut a data set to a long tail: indices of `class_profile` with n_max = N/K, or of the given ``counts``.

    n_max is the protocol's N/K, or the largest class where that is smaller (only then could no class fill it).

    Raises:
        InputError: if ``counts`` has the wrong length or a count below 1.
    """
    labels = np.asarray(labels)
    if counts is None:
        available = np.bincount(labels, minlength=num_classes)
        counts = class_profile(num_classes, min(len(labels) / num_classes, available.max()), ratio, kind=kind)
    if len(counts) != num_classes:
        raise InputError(f"{len(counts)} class counts were given for {num_classes} classes")
    if min(counts) < 1:
        raise InputError(f"every class needs at least one image, got counts {list(counts)}")
    return subset_indices(labels, counts, seed=seed)


def stratified_split(labels: np.ndarray, fraction: float, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Split positions into (train, held-out), class by class, keeping order.

    Each class gives ``round(fraction·n_k)`` images, at least one if it has two or more, and never its last one.

    Returns:
        train positions, held-out positions, and the classes with one image (it stays in training).
    """
    if not 0 < fraction < 1:
        raise InputError(f"the held-out fraction must be between 0 and 1, got {fraction!r}")
    labels = np.asarray(labels)
    generator = np.random.default_rng(seed)
    held: list[np.ndarray] = []
    singles = []
    for k in np.unique(labels):
        positions = np.flatnonzero(labels == k)
        if len(positions) == 1:
            singles.append(int(k))
            continue
        take = min(max(1, round(fraction * len(positions))), len(positions) - 1)
        held.append(generator.permutation(positions)[:take])
    held_out = np.sort(np.concatenate(held)) if held else np.zeros(0, dtype=np.int64)
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out, singles


def class_groups(train_counts: Sequence[int]) -> dict[str, np.ndarray]:
    """Boolean masks of the classes by their number of **training** images.

    ``many`` > 100, ``medium`` 20–100, ``few`` < 20 (Liu et al., CVPR 2019); and ``head``, ``middle``, ``tail``: the
    thirds of the classes by count, for benchmarks in which no class is that small. Ties keep class order.
    """
    counts = np.asarray(train_counts)
    thirds = np.array_split(np.argsort(-counts, kind="stable"), 3)
    masks = {"many": counts > 100, "medium": (counts >= 20) & (counts <= 100), "few": counts < 20}
    for name, members in zip(("head", "middle", "tail"), thirds, strict=True):
        masks[name] = np.isin(np.arange(len(counts)), members)
    return masks
