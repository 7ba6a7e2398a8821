"""All measures as one flat dict, as metrics.json and history.jsonl hold them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from equiframe.collapse.hull import one_vs_rest_distances
from equiframe.collapse.measures import (
    _vectors,
    cdnv,
    feature_norm_spread,
    mean_decisions,
    minority_angle,
    nc1,
    nc1_standard_error,
    nc3_cosines,
    nc3_distance,
    nc3_distances,
    nc3_duality_error,
    nc3_uniform_duality,
    nc4,
    paper_cosines,
)
from equiframe.collapse.statistics import ClassStatistics
from equiframe.collapse.vectors import (
    _unit,
    centred_means,
    log_riesz_energy,
    nc2_equiangle,
    nc2_equinorm,
    nc2_etf_error,
    uniformity,
)

MOST_HULLS = 512  # classes up to which the summary solves a quadratic programme for each


def collapse_measures(
    statistics: ClassStatistics,
    class_vectors: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    center: str = "class",
    few: Tensor | Sequence[bool] | None = None,
    full: bool = False,
) -> dict[str, float]:
    """Measures of collapse as a flat dict.

    Always: ``nc1`` (`nc1`, pinv; absent if ``within="none"``, with ``nc1_se`` beside it if sketched), ``nc2_angle``
    (`nc2_equiangle`), ``nc2_norm`` (`nc2_equinorm`), ``nc3`` (`nc3_distance`; needs class vectors) and ``nc4`` if the
    statistics counted it. ``full=True`` adds all the rest.

    Args:
        class_vectors: ``(K, D)``; without them there is no NC3.
        bias: ``(K,)`` of the classifier, or None.
        center: the global mean, ``class`` or ``sample``.
        few: mask of the few-shot classes, for the minority-collapse angles.
        full: also the measures that cost more.
    """
    s, w = statistics, class_vectors
    c: dict[str, Any] = {"center": center}
    values: dict[str, float] = {}
    if s.within != "none":
        values["nc1"] = nc1(s, **c)
    if s.within == "sketch":
        values["nc1_se"] = nc1_standard_error(s, **c)
    values["nc2_angle"] = nc2_equiangle(s, **c)
    values["nc2_norm"] = nc2_equinorm(s, **c)
    if w is not None:
        values["nc3"] = nc3_distance(s, w, **c)
    if not math.isnan(agreement := nc4(s)):
        values["nc4"] = agreement
    if not full:
        return values

    if s.within != "none":
        values["nc1_svd"] = nc1(s, method="svd", **c)
    values["nc1_quotient"] = nc1(s, method="quotient", **c)
    values["cdnv"] = cdnv(s)
    values["nc2_etf_error"] = nc2_etf_error(s, **c)
    for kernel in ("dist", "log"):
        values[f"uniformity_{kernel}_mean"], values[f"uniformity_{kernel}_var"] = uniformity(s, kernel=kernel, **c)
    values["uniformity_riesz_log_energy"] = log_riesz_energy(s, **c)
    values["feature_norm_spread"] = feature_norm_spread(s)
    values["feature_norm_spread_samples"] = feature_norm_spread(s, over="samples")
    values["num_present"] = float(s.present.sum())
    values |= _hulls("means", centred_means(s, **c))
    if few is not None:
        mask = torch.as_tensor(few, dtype=torch.bool)
        values["few_angle_means"] = minority_angle(s, mask, **c)
    if w is not None:
        cosines, distances = nc3_cosines(s, w, **c), nc3_distances(s, w, **c)
        values["nc2_angle_vectors"] = nc2_equiangle(_vectors(s, w))
        values["nc2_norm_vectors"] = nc2_equinorm(_vectors(s, w))
        values["nc2_etf_error_vectors"] = nc2_etf_error(_vectors(s, w))
        values["nc3_duality_error"] = nc3_duality_error(s, w, **c)
        values["nc3_cos_mean"], values["nc3_cos_min"] = float(cosines.mean()), float(cosines.min())
        values["nc3_distance_mean"] = float(distances.mean())
        values["nc3_uniform_duality"] = nc3_uniform_duality(s, w, **c)
        values["mean_decisions"] = mean_decisions(s, w, bias)
        values |= paper_cosines(s, w, **c)
        values |= _hulls("vectors", _vectors(s, w))
        if few is not None:
            values["few_angle_vectors"] = minority_angle(w, mask)
    return values


def _hulls(name: str, vectors: Tensor) -> dict[str, float]:
    """Least and mean one-vs-rest distance of the normalised vectors; only where no simplex fits."""
    num, dim = vectors.shape
    if not dim + 1 < num <= MOST_HULLS:
        return {}
    distances = one_vs_rest_distances(_unit(vectors))
    return {f"gnc2_{name}_min": float(distances.min()), f"gnc2_{name}_mean": float(distances.mean())}
