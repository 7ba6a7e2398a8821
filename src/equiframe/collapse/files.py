"""Measures of features from anywhere: a NumPy archive in, a flat dict out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from equiframe.collapse.nearest import LinearAgreement, nc4_agreement
from equiframe.collapse.statistics import ClassStatistics
from equiframe.collapse.summary import collapse_measures
from equiframe.errors import InputError

NAMES = ("features", "labels", "class_vectors", "bias", "logits")


def load_features(path: str | Path) -> dict[str, Tensor]:
    """Read ``features (N, D)`` and ``labels (N,)`` of an ``.npz``; where it has them also ``class_vectors (K, D)``,
    ``bias (K,)`` and ``logits (N, K)``. No pickles are loaded.

    Raises:
        InputError: if the file is no such archive, or the arrays do not fit each other.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {name: archive[name] for name in NAMES if name in archive.files}
            others = archive.files
        if not all(isinstance(array, np.ndarray) for array in found.values()):
            raise ValueError("a member of the archive is no array")
    except FileNotFoundError as error:
        raise InputError(f"no such file: {path}") from error
    except Exception as error:  # a damaged archive makes zipfile and NumPy raise all sorts
        raise InputError(f"{path} is not a NumPy archive (.npz) of plain arrays") from error
    for name in ("features", "labels"):
        if name not in found:
            raise InputError(f"{path} lacks the array {name!r} (it has {', '.join(others) or 'none'})")
    features, labels = found["features"], found["labels"]
    if features.ndim != 2 or features.dtype.kind != "f":
        raise InputError(f"features of {path} must be floating (N, D), got {features.dtype} {features.shape}")
    if labels.shape != features.shape[:1] or labels.dtype.kind not in "iu" or not len(labels) or labels.min() < 0:
        raise InputError(
            f"labels of {path} must be {len(features)} whole numbers from 0, got {labels.dtype} {labels.shape}"
        )
    num_classes = _num_classes(found)
    shapes = {
        "class_vectors": (num_classes, features.shape[1]),
        "bias": (num_classes,),
        "logits": (len(features), num_classes),
    }
    for name, shape in shapes.items():
        if name in found and (found[name].shape != shape or found[name].dtype.kind != "f"):
            raise InputError(f"{name} of {path} must be floating {shape}, got {found[name].dtype} {found[name].shape}")
    return {
        name: torch.from_numpy(np.ascontiguousarray(array.astype(np.int64) if name == "labels" else array))
        for name, array in found.items()
    }


def _num_classes(arrays: dict[str, Tensor]) -> int:
    """The largest K that any of the arrays speaks of, and at least 2."""
    named = [
        arrays[name].shape[axis] for name, axis in (("class_vectors", 0), ("bias", 0), ("logits", -1)) if name in arrays
    ]
    return max(int(arrays["labels"].max()) + 1, 2, *named)


def measure_features(arrays: dict[str, Tensor], *, center: str = "class", full: bool = True) -> dict[str, float]:
    """`collapse_measures` of loaded features. NC4 compares the nearest class mean with ``logits``, or with what
    ``class_vectors`` and ``bias`` decide."""
    features, labels = arrays["features"], arrays["labels"]
    vectors, bias, logits = (arrays.get(name) for name in ("class_vectors", "bias", "logits"))
    num_classes = _num_classes(arrays)
    statistics = ClassStatistics(num_classes, features.shape[1])
    statistics.update(features, labels)
    counts = statistics.counts
    few = counts <= counts.sort().values[max(len(counts) // 3, 2) - 1]
    values = {"num_samples": float(len(labels)), "num_classes": float(num_classes)}
    values |= collapse_measures(statistics, vectors, bias, center=center, full=full, few=few)
    if logits is not None:
        values["nc4"] = nc4_agreement(features, logits, statistics.class_means)
    elif vectors is not None:
        agreement = LinearAgreement(statistics.class_means, vectors, bias)
        values["nc4"] = float(agreement(features, labels).double().mean())
    return values
