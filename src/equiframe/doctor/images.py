"""What a data set is like: classes and counts, unreadable images, duplicates, sizes and kinds."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from equiframe.data.images import decode_image, decoding_threads, image_header
from equiframe.data.prepare import choose_indices
from equiframe.data.sources import Dataset, ImageSet
from equiframe.errors import InputError
from equiframe.imbalance import class_groups
from equiframe.recipe import Recipe


@dataclass(frozen=True)
class Looked:
    """What one look at each of a set's images found. Of a larger set an evenly spaced part was looked at.

    Attributes:
        positions: of the images that were looked at.
        digests: SHA-256 of the file, or of the pixels; None where it could not be read.
        sizes, modes: (width, height), and kind as ``RGB JPEG``, of the readable ones.
        bad: position → why it cannot be read.
    """

    positions: np.ndarray
    digests: list[bytes | None]
    sizes: list[tuple[int, int]]
    modes: list[str]
    bad: dict[int, str]
    seconds: float


def look_at(images: ImageSet, *, at_most: int, workers: int | None = None) -> Looked:
    """Read, hash and decode each image once."""
    positions = np.arange(len(images))
    if at_most and len(images) > at_most:
        positions = np.unique(np.linspace(0, len(images) - 1, at_most).round().astype(int))

    def look(i: int) -> tuple[bytes | None, tuple[int, int] | None, str | None, str | None]:
        if images.pixels is not None:
            array = images.pixels[i].numpy()
            return hashlib.sha256(array.tobytes()).digest(), (array.shape[2], array.shape[1]), "RGB pixels", None
        source, name, digest = images.sources[i], images.names[i], None
        try:
            try:
                content = source if isinstance(source, bytes) else Path(source).read_bytes()
            except OSError as error:
                raise InputError(f"image cannot be read: {name}: {error.strerror}") from error
            digest = hashlib.sha256(content).digest()
            header = image_header(content, name=name)
            decode_image(content, name=name)
        except InputError as error:
            return digest, None, None, " ".join(str(error).split())
        return digest, *header, None

    started = time.perf_counter()
    with ThreadPoolExecutor(decoding_threads(workers)) as pool:
        found = list(pool.map(look, positions.tolist()))
    return Looked(
        positions, [f[0] for f in found], [f[1] for f in found if f[1]], [f[2] for f in found if f[2]],
        {int(i): f[3] for i, f in zip(positions, found, strict=True) if f[3]}, time.perf_counter() - started,
    )  # fmt: skip


def find_duplicates(*parts: tuple[ImageSet, Looked]) -> dict[str, list[tuple[str, str]]]:
    """Pairs of names of images that are equal to the byte, the first and each later one: of one class (``same_class``) and of two
    (``two_classes``: one of the labels is wrong). Training and validation images together."""
    first: dict[bytes, tuple[str, int]] = {}
    pairs: dict[str, list[tuple[str, str]]] = {"same_class": [], "two_classes": []}
    for images, looked in parts:
        for i, digest in zip(looked.positions.tolist(), looked.digests, strict=True):
            this = images.names[i], int(images.labels[i])
            name, label = first.setdefault(digest, this) if digest else this
            if (name, label) != this:
                pairs["same_class" if label == this[1] else "two_classes"].append((name, this[0]))
    return pairs


def find_shared(one: ImageSet, looked_one: Looked, two: ImageSet, looked_two: Looked) -> list[tuple[str, str]]:
    """Pairs of names of images of two sets that are equal to the byte."""
    known = {d: one.names[i] for i, d in zip(looked_one.positions.tolist(), looked_one.digests, strict=True) if d}
    pairs = zip(looked_two.positions.tolist(), looked_two.digests, strict=True)
    return [(known[d], two.names[i]) for i, d in pairs if d in known]


def describe_sizes(sizes: Sequence[tuple[int, int]]) -> dict[str, object]:
    """Smallest, median and largest of width and height, and how many differ in shape from a square by more than 2:1."""
    array = np.array(sizes).reshape(-1, 2)
    if not len(array):
        return {}
    return {
        name: {"least": int(v.min()), "median": int(np.median(v)), "most": int(v.max())}
        for name, v in (("width", array[:, 0]), ("height", array[:, 1]))
    } | {"alike": bool((array == array[0]).all()), "long": int((array.max(1) > 2 * array.min(1)).sum())}


def describe_data(
    recipe: Recipe, dataset: Dataset, *, images: int
) -> tuple[dict[str, object], ImageSet, tuple[int, int, int]]:
    """Facts about a data set as a recipe would use it, its readable training images, and how many images train, validate and test.

    Args:
        images: how many of each split are decoded, evenly spaced; 0: all.
    """
    problem = None
    try:
        train_at, val_at = choose_indices(recipe, dataset, [])
    except InputError as error:
        problem, train_at, val_at = str(error), np.arange(len(dataset.train)), None
    train = dataset.train.subset(train_at)
    val = dataset.val if val_at is None else dataset.train.subset(val_at) if len(val_at) else None
    parts = {
        name: part
        for name, part in (("training", train), ("validation", val), ("test", dataset.test))
        if part is not None
    }
    looks = {name: look_at(part, at_most=images, workers=recipe.workers) for name, part in parts.items()}
    known = [(parts[name], looks[name]) for name in ("training", "validation") if name in parts]
    duplicates: dict[str, list] = find_duplicates(*known) | {"train_and_test": []}
    if dataset.test is not None:
        duplicates["train_and_test"] = find_shared(train, looks["training"], dataset.test, looks["test"])
    counts = train.counts(dataset.num_classes)
    groups = class_groups(counts)
    decoded = sum(len(look.positions) for look in looks.values())
    facts: dict[str, object] = {
        "name": dataset.name,
        "classes": dataset.num_classes,
        "class_names": list(dataset.class_names),
        "counts": counts.tolist(),
        "validation_counts": None if val is None else val.counts(dataset.num_classes).tolist(),
        "test_counts": None if dataset.test is None else dataset.test.counts(dataset.num_classes).tolist(),
        "numbers": {name: len(part) for name, part in parts.items()},
        "ratio": float(counts.max() / max(counts.min(), 1)),
        "groups": {name: int(groups[name].sum()) for name in ("many", "medium", "few")},
        "looked_at": {name: len(look.positions) for name, look in looks.items()},
        "decoded_per_second": decoded / max(sum(look.seconds for look in looks.values()), 1e-9),
        "unreadable": {name: list(look.bad.values()) for name, look in looks.items() if look.bad},
        "duplicates": duplicates,
        "sizes": describe_sizes(looks["training"].sizes),
        "modes": dict(Counter(looks["training"].modes).most_common()),
        "notes": list(dataset.notes),
        "problem": problem,
    }
    readable = [i for i in looks["training"].positions.tolist() if i not in looks["training"].bad]
    numbers = (len(train), 0 if val is None else len(val), 0 if dataset.test is None else len(dataset.test))
    return facts, train.subset(np.array(readable, dtype=np.int64)), numbers
