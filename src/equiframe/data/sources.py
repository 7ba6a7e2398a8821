"""Where images come from: a built-in name, a folder of class folders, or Parquet files.

Every source becomes a `Dataset` of `ImageSet`s, which hold either pixels (uint8) or encoded images to decode later.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from equiframe.data.images import EXTENSIONS, fit_square, image_sizes, to_tensor
from equiframe.errors import InputError, unknown

BUILTIN_NAMES = ("digits", "cifar10", "cifar100", "svhn", "svhn-extra", "stl10")
_SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


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

        from equiframe.data.images import decode_image

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


def load_dataset(data: str, *, data_root: str | Path = "data", download: bool = False) -> Dataset:
    """Load a data set by name, folder, or Parquet folder.

    Args:
        data: a name in `BUILTIN_NAMES`; a folder of class folders, with or without ``train/`` and ``val/``, ``test/``;
            or a folder of Parquet files in the Hugging Face image convention. An existing folder wins over a name.
        data_root: where torchvision keeps or puts the built-in sets.
        download: let torchvision download a built-in set that is missing.

    Raises:
        InputError: whatever is wrong with it, in one line.
    """
    path = Path(os.path.expanduser(data))
    if path.is_dir():
        files = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))  # the Hub keeps them in data/
        dataset = _load_parquet(path, files) if files else _load_folder(path)
    elif data in BUILTIN_NAMES:
        dataset = _load_digits() if data == "digits" else _load_torchvision(data, Path(data_root), download)
    elif path.is_file():
        raise InputError(f"DATA is a file, not a folder: {data}; give a folder of class folders or of Parquet files")
    elif data.startswith("hf:"):
        raise InputError("hf:NAME is not supported yet; save the data set as Parquet files and give their folder")
    elif "/" in data or "\\" in data or data.startswith("."):
        raise InputError(f"no such folder: {data}")
    else:
        error = unknown("data set", data, BUILTIN_NAMES)
        raise InputError(f"{error}, and no folder of that name exists")
    return _checked(dataset)


def _checked(dataset: Dataset) -> Dataset:
    if len(dataset.train) == 0:
        raise InputError(f"no images in {dataset.name}")
    if dataset.num_classes < 2:
        raise InputError(
            f"{dataset.name} has a single class ({dataset.class_names[0]!r}); classification needs at least two"
        )
    for split in ("train", "val", "test"):
        part = getattr(dataset, split)
        if part is not None and not len(part):
            raise InputError(f"{dataset.name} has a {split} split without images")
        if part is not None and not (part.labels.min() >= 0 and part.labels.max() < dataset.num_classes):
            bad = int(np.flatnonzero((part.labels < 0) | (part.labels >= dataset.num_classes))[0])
            raise InputError(
                f"label {part.labels[bad]} of {split} image {part.names[bad]!r} is outside 0..{dataset.num_classes - 1}"
            )
    return dataset


# --- built-in names ---------------------------------------------------------------------------------------------------


def _load_digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits (8×8, embedded), 30 % of each class kept for test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("data set 'digits' needs scikit-learn: pip install 'equiframe[train]'") from error

    from equiframe.imbalance import stratified_split

    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images.reshape(-1, 1, 8, 8)).mul(255 / 16).round().to(torch.uint8).expand(-1, 3, -1, -1)
    everything = ImageSet(labels.astype(np.int64), [f"digit-{i}" for i in range(len(labels))], pixels.contiguous())
    train, test, _ = stratified_split(everything.labels, 0.3, seed=0)
    return Dataset(
        "digits", [str(i) for i in range(10)], everything.subset(train), None, everything.subset(test), flips=False
    )


def _load_torchvision(name: str, root: Path, download: bool) -> Dataset:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise InputError(f"data set {name!r} needs torchvision: pip install 'equiframe[train]'") from error

    def open_split(make, **kwargs):
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
                return make(str(root), download=download, **kwargs)
        except RuntimeError as error:
            raise InputError(f"{name} is not under --data-root {root}; add --download ({error})") from error
        except OSError as error:
            raise InputError(f"{name} could not be downloaded to {root}: {error}") from error

    def as_set(split, images: np.ndarray, labels) -> ImageSet:
        return ImageSet(
            np.asarray(labels, dtype=np.int64),
            [f"{split}-{i}" for i in range(len(images))],
            torch.from_numpy(np.ascontiguousarray(images)),
        )

    if name in ("cifar10", "cifar100"):
        make = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
        parts = {split: open_split(make, train=split == "train") for split in ("train", "test")}
        sets = {split: as_set(split, p.data.transpose(0, 3, 1, 2), p.targets) for split, p in parts.items()}
        return Dataset(name, list(parts["train"].classes), sets["train"], None, sets["test"])
    if name == "stl10":
        parts = {split: open_split(datasets.STL10, split=split) for split in ("train", "test")}
        sets = {split: as_set(split, p.data, p.labels) for split, p in parts.items()}
        return Dataset(name, list(parts["train"].classes), sets["train"], None, sets["test"])
    # SVHN: the paper trains on train + extra, most others on train alone
    splits = ["train", "extra", "test"] if name == "svhn-extra" else ["train", "test"]
    parts = {split: open_split(datasets.SVHN, split=split) for split in splits}
    train = [parts[split] for split in splits[:-1]]
    return Dataset(
        name,
        [str(i) for i in range(10)],
        as_set("train", np.concatenate([p.data for p in train]), np.concatenate([p.labels for p in train])),
        None,
        as_set("test", parts["test"].data, parts["test"].labels),
        flips=False,
    )


# --- folders ----------------------------------------------------------------------------------------------------------


def _subfolders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def list_images(path: Path) -> list[Path]:
    """All image files under a folder, by extension, in name order; hidden files and folders are left out."""

    def unreadable(error: OSError) -> None:
        raise error

    found = []
    for folder, inside, files in os.walk(path, onerror=unreadable):
        inside[:] = [name for name in inside if not name.startswith(".")]
        found += [Path(folder, f) for f in files if f.lower().endswith(EXTENSIONS) and not f.startswith(".")]
    return sorted(found)


def _is_a_class(train: Path, others: set[Path]) -> bool:
    """Whether a folder called ``train`` is one of several classes: it holds images and no folders, as others do."""
    return bool(others) and not _subfolders(train) and bool(list_images(train))


def _load_folder(path: Path) -> Dataset:
    folders = {p.name.lower(): p for p in _subfolders(path)}
    splits = {
        split: next((folders[name] for name in names if name in folders), None)
        for split, names in _SPLIT_FOLDERS.items()
    }
    if splits["train"] is None or _is_a_class(splits["train"], set(folders.values()) - set(splits.values())):
        splits = {"train": path, "val": None, "test": None}
    class_names = [p.name for p in _subfolders(splits["train"])]
    if not class_names:
        raise InputError(f"{path} has no class folders (expected one folder a class, with images in it)")

    def read(split: str, folder: Path | None) -> ImageSet | None:
        if folder is None:
            return None
        extra = {p.name for p in _subfolders(folder)} - set(class_names)
        if extra:
            raise InputError(f"{folder} has class folders that training lacks: {', '.join(sorted(extra)[:3])}")
        files, labels = [], []
        for k, class_name in enumerate(class_names):
            found = list_images(folder / class_name) if (folder / class_name).is_dir() else []
            if split == "train" and not found:
                raise InputError(f"class folder without images: {folder / class_name}")
            files += found
            labels += [k] * len(found)
        if not files:
            raise InputError(f"no images in {folder}")
        return ImageSet(
            np.array(labels, dtype=np.int64), [f.relative_to(path).as_posix() for f in files], sources=files
        )

    return Dataset(path.resolve().name, class_names, **{split: read(split, folder) for split, folder in splits.items()})


# --- Parquet ----------------------------------------------------------------------------------------------------------


def _load_parquet(path: Path, files: list[Path]) -> Dataset:
    """Parquet files ``train-*.parquet``, ``test-*.parquet``, … with columns ``image`` {bytes, path} and ``label``."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError("Parquet data needs pyarrow: pip install 'equiframe[train]'") from error

    by_split: dict[str, list[Path]] = {}
    for file in files:
        stem = re.split(r"[-_.]", file.stem.lower())[0]
        split = next((s for s, names in _SPLIT_FOLDERS.items() if stem in names), "train" if len(files) == 1 else None)
        if split is None:
            raise InputError(f"cannot tell the split of {file}; name it train-*.parquet, validation-* or test-*")
        by_split.setdefault(split, []).append(file)
    if "train" not in by_split:
        raise InputError(f"no train-*.parquet in {path}")

    class_names: list[str] | None = None
    sets: dict[str, ImageSet] = {}
    for split, parts in by_split.items():
        sources: list[bytes] = []
        names: list[str] = []
        labels: list[np.ndarray] = []
        for file in parts:
            try:
                columns = pq.read_schema(file).names
                for column in ("image", "label"):
                    if column not in columns:
                        raise InputError(f"{file} lacks the column {column!r} (it has {', '.join(columns)})")
                table = pq.read_table(file, columns=["image", "label"], partitioning=None)
            except InputError:
                raise
            except (OSError, ValueError, pa.ArrowException) as error:
                raise InputError(f"not a readable Parquet file: {file}: {error}") from error
            rows = table["image"].to_pylist()
            for i, row in enumerate(rows):
                content = row.get("bytes") if isinstance(row, dict) else row
                if not isinstance(content, bytes):
                    raise InputError(f"row {i} of {file} has no image bytes")
                sources.append(content)
                names.append((row.get("path") if isinstance(row, dict) else None) or f"{file.name}:{i}")
            column = table["label"]
            if not pa.types.is_integer(column.type) or column.null_count:
                bad = next((i for i, value in enumerate(column.to_pylist()) if not isinstance(value, int)), 0)
                raise InputError(f"row {bad} of {file} has no whole-number label (the column holds {column.type})")
            labels.append(column.to_numpy().astype(np.int64))
            class_names = class_names or _parquet_class_names(table.schema.metadata)
        sets[split] = ImageSet(np.concatenate(labels), names, sources=sources)
    if class_names is None:
        train = sets["train"].labels
        if len(train) and train.max() >= len(train):  # some class would have no image
            raise InputError(f"label {train.max()} in {path}, which has only {len(train)} training images")
        class_names = [str(k) for k in range(max(train, default=-1) + 1)] or ["?"]
    return Dataset(path.resolve().name, class_names, sets["train"], sets.get("val"), sets.get("test"))


def _parquet_class_names(metadata: dict | None) -> list[str] | None:
    try:
        return list(json.loads((metadata or {})[b"huggingface"])["info"]["features"]["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return None


def with_pixels(images: ImageSet, size: int, *, workers: int = 2, progress=None) -> ImageSet:
    """The same images decoded to ``pixels (N, 3, size, size)``."""
    from equiframe.data.images import decode_all

    if images.pixels is None:
        pixels = decode_all(images.sources, images.names, size, workers=workers, progress=progress)
    elif images.pixels.shape[-2:] != (size, size):
        pixels = torch.stack([to_tensor(fit_square(images.image(i), size)) for i in range(len(images))])
    else:
        return images
    return replace(images, pixels=pixels, sources=None)
