"""Predictions for images: class, probability, top-k, as CSV rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from equiframe.data.batches import Loader
from equiframe.data.images import EXTENSIONS, unreadable
from equiframe.data.sources import ImageSet, list_images
from equiframe.deployed import Run, as_ranked
from equiframe.errors import InputError
from equiframe.model import Classifier, ModelCard
from equiframe.numerics import choose_device


def find_images(inputs: Iterable[str | Path]) -> list[Path]:
    """Image files named or in the named folders, in the given order."""
    found: list[Path] = []
    for item in map(Path, inputs):
        if item.is_dir():
            inside = list_images(item)
            if not inside:
                raise InputError(f"no images in {item} (known endings: {' '.join(EXTENSIONS)})")
            found += inside
        elif item.is_file():
            found.append(item)
        else:
            raise InputError(f"no such image or folder: {item}")
    return found


def split_readable(images: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The images that can be decoded, and why each of the others cannot. All of them bad is an `InputError`."""
    bad = unreadable(list(images), [str(path) for path in images])
    if len(bad) == len(images):
        raise InputError(f"none of the {len(images):,} images can be read; {bad[0]}")
    return [path for i, path in enumerate(images) if i not in bad], list(bad.values())


def predict(
    model: Classifier | Run,
    card: ModelCard,
    images: Sequence[Path],
    *,
    top: int = 5,
    device: str = "auto",
    batch_size: int = 128,
) -> Iterator[list[tuple[str, float]]]:
    """For each image its ``top`` (class name, probability) pairs, most probable first.

    Probabilities are softmax(logits/T) with the temperature T that was fitted when the run ended.

    Args:
        model: a classifier, or the ``run`` of an `Exported` file (whose device is settled).
    """
    if isinstance(model, Classifier):
        ranked = as_ranked(model, card, choose_device(device))
    else:
        ranked = lambda pixels, k: model(pixels)[1].topk(k, dim=1)  # noqa: E731
    batches = Loader(
        ImageSet(np.zeros(len(images), dtype=np.int64), [str(p) for p in images], sources=list(images)),
        batch_size=batch_size, image_size=card.image_size, mean=card.mean, std=card.std, device=torch.device("cpu"),
        centre_crop=card.centre_crop,
    ).ordered_pixels()  # fmt: skip
    for pixels, _ in batches:
        values, classes = ranked(pixels, min(top, len(card.class_names)))
        for row, ids in zip(values.tolist(), classes.tolist(), strict=True):
            yield [(card.class_names[k], p) for k, p in zip(ids, row, strict=True)]


def as_csv(images: Sequence[Path], predictions: Iterable[list[tuple[str, float]]]) -> str:
    """CSV with the columns ``image, class, probability, class_2, probability_2, …``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for i, (image, ranked) in enumerate(zip(images, predictions, strict=True)):
        if i == 0:
            more = [f"{name}_{rank}" for rank in range(2, len(ranked) + 1) for name in ("class", "probability")]
            writer.writerow(["image", "class", "probability", *more])
        writer.writerow(
            [image, *(f"{cell:.6f}" if isinstance(cell, float) else cell for pair in ranked for cell in pair)]
        )
    return text.getvalue()
