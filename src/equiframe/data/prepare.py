"""From a recipe's data fields to the images of a run: cut to a long tail, held-out validation, a manifest of it all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from equiframe.data.augment import parse_augmentation
from equiframe.data.batches import IMAGENET_MEAN, IMAGENET_STD, RESIDENT_LIMIT, channel_statistics
from equiframe.data.dataset import contradictions, shared_content
from equiframe.data.images import decoding_threads, unreadable
from equiframe.data.sources import Dataset, ImageSet, load_dataset, with_pixels
from equiframe.errors import InputError
from equiframe.files import JSON_LIMIT, read_limited
from equiframe.imbalance import long_tail_indices, stratified_split
from equiframe.recipe import Recipe
from equiframe.words import counted

DUPLICATES_LIMIT = 20_000  # streamed files that are worth looking at twice


@dataclass
class PreparedData:
    """What a run trains on, chooses on and is tested on, and how it came about."""

    name: str
    class_names: list[str]
    train: ImageSet
    val: ImageSet | None
    test: ImageSet
    test_is: str  # "test", or "validation" where no test split exists
    image_size: int
    data_mode: str  # "resident" | "stream"
    augmentation: str
    mean: list[float]
    std: list[float]
    manifest: dict[str, object]
    notes: list[str] = field(default_factory=list)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def train_counts(self) -> list[int]:
        return self.train.counts(self.num_classes).tolist()

    def describe(self) -> str:
        """How many images of what, in a line."""
        tested = f"{len(self.test):,} test" if self.test_is == "test" else "no test"
        counts = self.train_counts
        return (
            f"data: {self.name}, {len(self.train):,} train / {0 if self.val is None else len(self.val):,} validation / "
            f"{tested} images, {self.num_classes} classes of {max(counts):,} to {min(counts):,}"
        )


def indices_hash(*parts: np.ndarray) -> str:
    """SHA-256 of index lists."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.asarray(part, dtype="<i8").tobytes() + b"|")
    return digest.hexdigest()


def prepare_data(recipe: Recipe, progress: Callable[[str], None] = lambda text: None) -> PreparedData:
    """Load, cut, split and (where they fit) decode the images of a recipe.

    Raises:
        InputError: whatever is wrong with the data or the fields.
    """
    parse_augmentation(recipe.augmentation)  # what can be refused is refused before any work
    dataset = load_dataset(recipe.data, data_root=recipe.data_root, download=recipe.download)
    notes = list(dataset.notes)
    if recipe.split is not None:
        train_indices, val_indices = _indices_from_manifest(recipe.split, dataset)
    else:
        train_indices, val_indices = choose_indices(recipe, dataset, notes)
    skipped: dict[str, list[str]] = {}
    fingerprint = dataset.fingerprint()
    if recipe.on_bad_image == "skip":
        dataset, train_indices, val_indices, skipped = _without_bad(dataset, train_indices, val_indices, recipe.workers)
        for split, reasons in skipped.items():
            notes.append(
                f"skipped {counted(len(reasons), f'{split} image')} that cannot be read: {'; '.join(reasons[:3])}"
            )
    train = dataset.train.subset(train_indices)
    missing = np.flatnonzero(train.counts(dataset.num_classes) == 0)
    if len(missing):
        raise InputError(f"class {dataset.class_names[missing[0]]!r} has no training image")
    val = dataset.val if val_indices is None else dataset.train.subset(val_indices) if len(val_indices) else None
    test, test_is = dataset.test, "test"
    if test is None:
        if val is None:
            raise InputError(
                f"{dataset.name} has no test split, so validation must not be 0: nothing would be left to measure on"
            )
        test, test_is = val, "validation"
        notes.append("no test split: the final metrics are those of the validation images")

    manifest = {
        "data": dataset.name,
        "fingerprint": fingerprint,
        "train": train_indices.tolist(),
        "val": None if val_indices is None else val_indices.tolist(),
        "hash": indices_hash(train_indices, np.zeros(0) if val_indices is None else val_indices),
        "class_names": dataset.class_names,
        "train_counts": train.counts(dataset.num_classes).tolist(),
    }
    if skipped:
        manifest["skipped"] = skipped
    size = recipe.image_size or (replace(dataset, train=train) if skipped else dataset).native_size()
    parts = {"train": train, "val": val, "test": test}
    counts = {id(part): len(part) for part in parts.values() if part is not None}  # test may be val
    needed = sum(counts.values()) * 3 * size * size
    resident, augmentation = settle_loading(recipe, replace(dataset, train=train), sum(counts.values()), size)
    twice = contradictions(train) if resident or len(train) <= DUPLICATES_LIMIT else []
    if twice:
        example = f"{twice[0][1]} is {twice[0][0]}"
        same = counted(len(twice), "training image is an image", "training images are images")
        notes.append(f"warning: {same} of another class to the byte ({example})")
    for name, part in (("validation", val), ("test", None if test is val else test)):
        if part is None or not (resident or len(train) + len(part) <= DUPLICATES_LIMIT):
            continue
        shared = shared_content(train, part)
        if shared:
            example = f"{shared[0][1]} is {shared[0][0]}"
            same = counted(len(shared), f"{name} image is a training image", f"{name} images are training images")
            notes.append(f"warning: {same} to the byte ({example})")
    if resident:
        decoded: dict[int, ImageSet] = {}
        for name, part in parts.items():
            if part is not None and id(part) not in decoded:
                if part.pixels is None:
                    progress(f"decoding {len(part):,} {name} images")
                decoded[id(part)] = with_pixels(part, size, workers=recipe.workers)
        train, val, test = (None if p is None else decoded[id(p)] for p in parts.values())
        mean, std = channel_statistics(train.pixels)
    else:
        mean, std = list(IMAGENET_MEAN), list(IMAGENET_STD)
    notes.append(
        f"images: {size}x{size}, "
        + (
            f"resident ({needed / 2**20:.1f} MiB)"
            if resident
            else f"streamed by {decoding_threads(recipe.workers)} threads"
        )
        + f", augmentation {augmentation}"
    )
    prepared = PreparedData(
        dataset.name, dataset.class_names, train, val, test, test_is, size, "resident" if resident else "stream",
        augmentation, mean, std, manifest, notes,
    )  # fmt: skip
    for line in (*notes, prepared.describe()):
        progress(line)
    return prepared


def settle_loading(recipe: Recipe, dataset: Dataset, num_images: int, size: int) -> tuple[bool, str]:
    """Whether so many images of this size stay decoded in memory, and which augmentation that means.

    Raises:
        InputError: if the recipe asks for what does not go together.
    """
    resident = recipe.data_mode == "resident" or (
        recipe.data_mode == "auto"
        and num_images * 3 * size * size <= RESIDENT_LIMIT
        and (size <= 96 or dataset.train.pixels is not None)
    )
    augmentation = recipe.augmentation
    if augmentation == "auto":
        augmentation = ("crop-flip" if dataset.flips else "crop") if resident else "resized-crop-flip"
        if dataset.name in ("svhn", "svhn-extra", "stl10"):
            augmentation = "none"  # as in the paper
    _check_decoding(recipe, augmentation, resident)
    return resident, augmentation


def _without_bad(
    dataset: Dataset, train_indices: np.ndarray, val_indices: np.ndarray | None, workers: int | None
) -> tuple[Dataset, np.ndarray, np.ndarray | None, dict[str, list[str]]]:
    """The data set and its chosen positions without images that cannot be read, and the reasons by split."""
    skipped: dict[str, list[str]] = {}

    def readable(split: str, images: ImageSet, indices: np.ndarray) -> np.ndarray:
        chosen = images.subset(indices)
        bad = {} if chosen.sources is None else unreadable(chosen.sources, chosen.names, workers=workers)
        if bad:
            skipped[split] = list(bad.values())
        if len(bad) == len(indices) > 0:
            raise InputError(f"no {split} image of {dataset.name} can be read: {skipped[split][0]}")
        return np.delete(indices, list(bad))

    train_indices = readable("train", dataset.train, train_indices)
    if val_indices is not None:
        val_indices = readable("validation", dataset.train, val_indices)
    for split in ("val", "test"):
        images = getattr(dataset, split)
        if images is not None:
            kept = readable("validation" if split == "val" else split, images, np.arange(len(images)))
            dataset = replace(dataset, **{split: images.subset(kept)}) if len(kept) < len(images) else dataset
    return dataset, train_indices, val_indices, skipped


def _check_decoding(recipe: Recipe, augmentation: str, resident: bool) -> None:
    """Refuse what only happens while decoding where nothing is decoded while training."""
    boxes = "resized-crop-flip" in augmentation
    if resident and boxes:
        raise InputError("augmentation resized-crop-flip happens while decoding; it needs data_mode stream")
    if resident and recipe.centre_crop != 1:
        raise InputError(
            "centre_crop belongs to streamed images (resident ones are cut once); it needs data_mode stream"
        )
    if recipe.draft and not boxes:
        raise InputError("draft decodes what random boxes need; it needs augmentation resized-crop-flip")


def choose_indices(recipe: Recipe, dataset: Dataset, notes: list[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """Training and validation positions among the data set's training images; None where it has its own validation."""
    labels = dataset.train.labels
    if recipe.imbalance is not None or recipe.class_counts is not None:
        chosen = long_tail_indices(
            labels,
            dataset.num_classes,
            1.0 if recipe.imbalance is None else recipe.imbalance,
            kind=recipe.tail,
            seed=recipe.subset_seed,
            counts=recipe.class_counts,
        )
    else:
        chosen = np.arange(len(labels))
    if dataset.val is not None:
        return chosen, None
    if recipe.validation == 0:
        return chosen, np.zeros(0, dtype=np.int64)
    kept, held, singles = stratified_split(labels[chosen], recipe.validation, seed=recipe.subset_seed)
    if len(singles):
        names = ", ".join(dataset.class_names[k] for k in singles[:5]) + (", …" if len(singles) > 5 else "")
        stay = counted(len(singles), "class with a single image stays", "classes with a single image stay")
        notes.append(f"{stay} in training, without validation: {names}")
    if not len(held):
        raise InputError(
            f"{dataset.name} is too small for a validation split; give val/ images, more images a class, or test/ images and --validation 0"
        )
    return chosen[kept], chosen[held]


def _indices_from_manifest(path: str, dataset: Dataset) -> tuple[np.ndarray, np.ndarray | None]:
    """The exact images of an earlier run, verified against its hash and the data set's fingerprint."""
    try:
        manifest = json.loads(read_limited(Path(path), JSON_LIMIT))
        train = np.array(manifest["train"], dtype=np.int64)
        val = None if manifest["val"] is None else np.array(manifest["val"], dtype=np.int64)
        expected = manifest["hash"]
        if any(part is not None and part.ndim != 1 for part in (train, val)):
            raise ValueError("positions must be a list")
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot read split {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"{path} is not a split manifest: {error!r}") from error
    if indices_hash(train, np.zeros(0) if val is None else val) != expected:
        raise InputError(f"{path} was changed: its indices do not match its hash")
    if manifest.get("fingerprint") != dataset.fingerprint():
        raise InputError(
            f"{path} belongs to other data (or images of {dataset.name} were added, removed or renamed since)"
        )
    positions = np.concatenate([train, [] if val is None else val])
    if not len(train) or positions.min() < 0 or positions.max() >= len(dataset.train):
        raise InputError(f"{path} is damaged: a position is outside 0..{len(dataset.train) - 1}")
    return train, val
