"""Data sets with a name: scikit-learn's digits, torchvision's small sets, and those that `published` reads."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch

from equiframe.data.dataset import Dataset, ImageSet
from equiframe.data.published import PUBLISHED, load_published
from equiframe.errors import InputError
from equiframe.imbalance import stratified_split

TORCHVISION_NAMES = ("cifar10", "cifar100", "svhn", "svhn-extra", "stl10")
BUILTIN_NAMES = ("digits", *TORCHVISION_NAMES, *PUBLISHED)


def load_builtin(name: str, root: Path, *, download: bool = False) -> Dataset:
    """A data set of `BUILTIN_NAMES`; all but the digits lie under ``root``."""
    if name == "digits":
        return _load_digits()
    if name in TORCHVISION_NAMES:
        return _load_torchvision(name, root, download)
    return load_published(name, root)


def _load_digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits (8×8, embedded), 30 % of each class kept for test."""
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise InputError("data set 'digits' needs scikit-learn: pip install 'equiframe[train]'")
    # read from scikit-learn's own file: importing sklearn.datasets takes longer than all the training of a demonstration
    table = np.loadtxt(
        Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",", dtype=np.int64
    )
    images, labels = torch.from_numpy(table[:, :-1]), table[:, -1]
    pixels = images.view(-1, 1, 8, 8).mul(255 / 16).round().to(torch.uint8).expand(-1, 3, -1, -1)
    everything = ImageSet(labels.copy(), [f"digit-{i}" for i in range(len(labels))], pixels.contiguous())
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
