"""The bootstrap over test images: what the accuracy would be on other images of the same classes."""

from __future__ import annotations

import numpy as np

REPLICATES = 2000
_CHUNK = 4_000_000  # drawn images at a time


def bootstrap_macro(
    correct: np.ndarray, labels: np.ndarray, *, replicates: int = REPLICATES, seed: int = 0
) -> np.ndarray:
    r"""Macro accuracies of several runs on resampled test images, the same images for all runs (paired).

    Each replicate draws, within each class, as many of its images as it has, with replacement; the class sizes, and
    so macro accuracy's weights :math:`1/(K n_k)`, stay as they are. The replicates' variance is the plug-in variance of
    stratified sampling, :math:`\frac1{K^2}\sum_k a_k(1-a_k)/n_k` for class accuracies :math:`a_k`; a class with a single
    image adds nothing to it.

    Args:
        correct: which images each run classified right, bool ``(R, N)``.
        labels: classes of the images ``(N,)``; classes without images do not count.
        seed: of the draws; equal seeds draw equal images.

    Returns:
        ``(replicates, R)``.
    """
    order = np.argsort(labels, kind="stable")
    _, start, inverse, size = np.unique(labels[order], return_index=True, return_inverse=True, return_counts=True)
    num = len(labels)
    scores = correct[:, order].T / (len(size) * size[inverse])[:, None]  # (N, R), columns sum to macro accuracies
    random = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // num)
    found = []
    for first in range(0, replicates, chunk):
        rows = min(chunk, replicates - first)
        drawn = start[inverse] + (random.random((rows, num)) * size[inverse]).astype(np.int64)
        times = np.bincount((drawn + num * np.arange(rows)[:, None]).ravel(), minlength=rows * num)
        found.append(times.reshape(rows, num) @ scores)
    return np.concatenate(found)


def percentile_interval(values: np.ndarray, *, level: float = 0.95) -> tuple[float, float]:
    """The middle share ``level`` of bootstrap replicates ``(B,)``."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
