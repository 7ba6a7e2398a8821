"""``hf:NAME``: a data set of the Hugging Face Hub (or of its cache), through the ``datasets`` library."""

from __future__ import annotations

import contextlib
import sys

import numpy as np

from equiframe.data.dataset import Dataset, ImageSet, split_named
from equiframe.errors import InputError

IMAGE_COLUMNS = ("image", "img")  # which to take where a data set has several
LABEL_COLUMNS = ("label", "labels", "fine_label")


def load_hub(data: str) -> Dataset:
    """``hf:NAME`` or ``hf:NAME:CONFIG``. Encoded images are held in memory, as those of Parquet files are.

    The image column is the one of type ``Image``; the label column the ``ClassLabel`` (its names become the class names)
    or one called ``label``, of whole numbers or text. Of several, the first of `IMAGE_COLUMNS` or `LABEL_COLUMNS` counts. A
    split whose labels are hidden (all −1) is left out.

    Raises:
        InputError: without the library; for a name that cannot be loaded; for columns or splits that do not fit.
    """
    name, _, config = data.removeprefix("hf:").partition(":")
    if not name:
        raise InputError("hf:NAME lacks the NAME of a data set on the Hub, e.g. hf:uoft-cs/cifar10")
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{data} needs the library datasets: pip install 'equiframe[hub]'") from error
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            tables = datasets.load_dataset(name, config or None)
    except Exception as error:  # the library and its network clients raise all sorts
        raise InputError(f"{data} could not be loaded: {type(error).__name__}: {error}") from error

    named = {split_named(key): key for key in reversed(list(tables)) if split_named(key)}
    if "train" not in named:
        raise InputError(f"{data} has no train split (it has {', '.join(tables)})")
    notes = [f"split {key!r} is not used" for key in tables if key not in named.values()]
    features = tables[named["train"]].features
    image, label = _column(data, features, "Image", IMAGE_COLUMNS), _column(data, features, "ClassLabel", LABEL_COLUMNS)
    class_names = list(getattr(features[label], "names", None) or []) or None
    sets: dict[str, ImageSet] = {}
    for split in ("train", "val", "test"):
        if split not in named:
            continue
        table = tables[named[split]]
        labels, class_names = _labels(f"{data}, split {named[split]!r}", list(table[label]), class_names)
        if split != "train" and len(labels) and (labels == -1).all():
            notes.append(f"split {named[split]!r} is not used: its labels are hidden")
            continue
        rows = table.cast_column(image, datasets.Image(decode=False))[image]
        sources = [_source(f"{data}, split {named[split]!r}, row {i}", row) for i, row in enumerate(rows)]
        sets[split] = ImageSet(labels, [f"{named[split]}-{i}" for i in range(len(sources))], sources=sources)
    return Dataset(name.rpartition("/")[2], class_names, **sets, notes=notes)


def _column(data: str, features: dict, kind: str, preferred: tuple[str, ...]) -> str:
    """The column of a type; of several or none, the first preferred name."""
    of_kind = [name for name, feature in features.items() if type(feature).__name__ == kind]
    if len(of_kind) == 1:
        return of_kind[0]
    for name in preferred:
        if name in of_kind or (not of_kind and kind == "ClassLabel" and name in features):
            return name
    found = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
    raise InputError(f"{data}: cannot tell the {kind} column (it has {found}); expected one called {preferred[0]!r}")


def _labels(where: str, values: list, class_names: list[str] | None) -> tuple[np.ndarray, list[str]]:
    """Labels as class indices. Without names given (those of training), classes are the labels found, in order."""
    if all(isinstance(value, str) for value in values) and values:
        class_names = class_names or sorted(set(values))
        index = {name: k for k, name in enumerate(class_names)}
        strange = next((value for value in values if value not in index), None)
        if strange is not None:
            raise InputError(f"{where}: class {strange!r} is not among the training classes")
        return np.array([index[value] for value in values], dtype=np.int64), class_names
    bad = next((i for i, v in enumerate(values) if not isinstance(v, int | np.integer) or isinstance(v, bool)), None)
    if bad is not None:
        raise InputError(f"{where}, row {bad}: the label must be a whole number or text, got {values[bad]!r}")
    labels = np.array(values, dtype=np.int64)
    if class_names is None:
        if len(labels) and labels.max() >= len(labels):  # some class would have no image
            raise InputError(f"{where}: label {labels.max()}, but only {len(labels)} images")
        class_names = [str(k) for k in range(max(labels, default=-1) + 1)] or ["?"]
    return labels, class_names


def _source(where: str, row: object) -> bytes | str:
    source = (row.get("bytes") or row.get("path")) if isinstance(row, dict) else None
    if source is None:
        raise InputError(f"{where} has no image")
    return source
