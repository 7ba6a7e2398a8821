"""What every source becomes: a `Dataset` of `ImageSet`s, which hold either pixels (uint8) or encoded images to decode."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from equiframe.data.images import decode_all, decode_image, fit_square, image_sizes, to_tensor

SPLIT_WORDS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


def split_named(word: str) -> str | None:
    """``train``, ``val`` or ``test``, or None for a word that names no split."""
    return next((split for split, words in SPLIT_WORDS.items() if word.lower() in words), None)


@dataclass
class ImageSet:
    """N labelled images: ``pixels (N, 3, H, W)`` uint8, or ``sources`` (paths or encoded bytes) to decode."""

    labels: np.ndarray
    names: list[str]
    pixels: Tensor | None = None
    sources: list | None = None

    def __post_init__(self) -> None:
        held = len(self.pixels) if self.pixels is not None else len(self.sources or [])
        assert held == len(self.labels) == len(self.names), "as many images as labels as names"

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: np.ndarray) -> ImageSet:
        indices = np.asarray(indices)
        return ImageSet(
            self.labels[indices],
            [self.names[i] for i in indices],
            None if self.pixels is None else self.pixels[torch.from_numpy(indices)],
            None if self.sources is None else [self.sources[i] for i in indices],
        )

    def image(self, i: int):
        """Image i as a PIL RGB image of its own size."""
        from PIL import Image

        if self.pixels is not None:
            return Image.fromarray(self.pixels[i].permute(1, 2, 0).numpy())
        return decode_image(self.sources[i], name=self.names[i])

    def counts(self, num_classes: int) -> np.ndarray:
        return np.bincount(self.labels, minlength=num_classes)


@dataclass
class Dataset:
    """A named data set with the splits that it came with; a missing split is None."""

    name: str
    class_names: list[str]
    train: ImageSet
    val: ImageSet | None = None
    test: ImageSet | None = None
    notes: list[str] = field(default_factory=list)
    flips: bool = True  # whether a mirrored image keeps its class

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def fingerprint(self) -> str:
        """SHA-256 over class names, image names and labels of all splits."""
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        for part in (self.train, self.val, self.test):
            if part is not None:
                digest.update(part.labels.astype("<i8").tobytes())
                digest.update("\n".join(part.names).encode(errors="surrogateescape"))
            digest.update(b"|")
        return digest.hexdigest()

    def native_size(self) -> int:
        """A square side that suits the images: their own if they are small and alike, else 64, 128 or 224."""
        if self.train.pixels is not None:
            return self.train.pixels.shape[-1]
        sides = [min(size) for size in image_sizes(self.train.sources, self.train.names)]
        median = float(np.median(sides))
        if max(sides) == min(sides) and median <= 64:
            return int(median)
        return next((size for limit, size in ((48, 32), (96, 64), (180, 128)) if median <= limit), 224)


def shared_content(one: ImageSet, two: ImageSet) -> list[tuple[str, str]]:
    """Pairs of names of images that are the same file to the byte, in two sets that are still encoded.

    Only files of a size that occurs in both are read (SHA-256).
    """

    sizes_one, sizes_two = _by_size(one), _by_size(two)
    pairs = []
    for size in sizes_one.keys() & sizes_two.keys():
        with contextlib.suppress(OSError):
            known = {_digest(one.sources[i]): one.names[i] for i in sizes_one[size]}
            found = ((known.get(_digest(two.sources[i])), two.names[i]) for i in sizes_two[size])
            pairs += [(name, other) for name, other in found if name is not None]
    return sorted(pairs)


def contradictions(images: ImageSet) -> list[tuple[str, str]]:
    """Pairs of names of images that are the same file to the byte under two labels, in a set that is still encoded."""
    first: dict[bytes, int] = {}
    pairs = []
    for positions in _by_size(images).values():
        if len(set(images.labels[positions])) == 1:  # one alone, or one class
            continue
        with contextlib.suppress(OSError):
            for i in positions:
                other = first.setdefault(_digest(images.sources[i]), i)
                if images.labels[other] != images.labels[i]:
                    pairs.append((images.names[other], images.names[i]))
    return sorted(pairs)


def _by_size(images: ImageSet) -> dict[int, list[int]]:
    """Positions of encoded images by their number of bytes; one that is missing is named when it is decoded."""
    sizes: dict[int, list[int]] = {}
    for i, source in enumerate(images.sources or ()):
        if isinstance(source, bytes) or os.path.isfile(source):
            sizes.setdefault(len(source) if isinstance(source, bytes) else os.path.getsize(source), []).append(i)
    return sizes


def _digest(source: str | Path | bytes) -> bytes:
    return hashlib.sha256(source if isinstance(source, bytes) else Path(source).read_bytes()).digest()


def with_pixels(images: ImageSet, size: int, *, workers: int | None = None, progress=None) -> ImageSet:
    """The same images decoded to ``pixels (N, 3, size, size)``."""
    if images.pixels is None:
        pixels = decode_all(images.sources, images.names, size, workers=workers, progress=progress)
    elif images.pixels.shape[-2:] != (size, size):
        pixels = torch.stack([to_tensor(fit_square(images.image(i), size)) for i in range(len(images))])
    else:
        return images
    return replace(images, pixels=pixels, sources=None)
