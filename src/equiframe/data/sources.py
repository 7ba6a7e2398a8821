"""Where images come from: a built-in name, the Hub, class folders, lists, or Parquet files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from equiframe.data.builtin import BUILTIN_NAMES, load_builtin
from equiframe.data.dataset import Dataset, ImageSet, with_pixels
from equiframe.data.folders import list_images, load_folder
from equiframe.data.hub import load_hub
from equiframe.data.lists import LIST_ENDINGS, find_lists, load_lists
from equiframe.data.parquet import load_parquet
from equiframe.data.published import load_in_published_layout
from equiframe.errors import InputError, unknown

__all__ = ["BUILTIN_NAMES", "Dataset", "ImageSet", "list_images", "load_dataset", "with_pixels"]


def load_dataset(data: str, *, data_root: str | Path = "data", download: bool = False) -> Dataset:
    """Load a data set by name, folder, list, or Parquet folder.

    Args:
        data: one of

            * a name in `BUILTIN_NAMES` (an existing folder of that name wins);
            * a folder of Parquet files in the Hugging Face image convention (`data.parquet`);
            * a folder that one of the named data sets comes in, e.g. ``CUB_200_2011`` (`data.published`);
            * a folder with lists ``…train.txt``, ``…val.txt``, ``…test.txt`` of lines ``path label``, or the train
              list itself (`data.lists`);
            * a folder of class folders, with or without ``train/`` and ``val/``, ``test/`` (`data.folders`);
            * ``hf:NAME`` or ``hf:NAME:CONFIG``, through the ``datasets`` library (`data.hub`).
        data_root: where the built-in sets lie, or a list's images.
        download: let torchvision download a built-in set that is missing.

    Raises:
        InputError: whatever is wrong with it, in one line.
    """
    path, root = Path(os.path.expanduser(data)), Path(os.path.expanduser(data_root))
    if path.is_dir():
        dataset = _load_directory(path, root)
    elif data in BUILTIN_NAMES:
        dataset = load_builtin(data, root, download=download)
    elif path.is_file():
        if path.suffix.lower() not in LIST_ENDINGS:
            raise InputError(
                f"DATA is a file, not a folder: {data}; give a folder of class folders or of Parquet files, or a list of "
                f"lines `path label` whose name ends in {' or '.join(LIST_ENDINGS)}"
            )
        dataset = load_lists(find_lists(path), (root, path.parent))
    elif data.startswith("hf:"):
        dataset = load_hub(data)
    elif "/" in data or "\\" in data or data.startswith("."):
        raise InputError(f"no such folder: {data}")
    else:
        error = unknown("data set", data, BUILTIN_NAMES)
        raise InputError(f"{error}, and no folder of that name exists")
    return _checked(dataset)


def _load_directory(path: Path, root: Path) -> Dataset:
    files = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))  # the Hub keeps them in data/
    if files:
        return load_parquet(path, files)
    published = load_in_published_layout(path, root)
    if published is not None:
        return published
    lists = find_lists(path)
    return load_lists(lists, (root, path)) if lists else load_folder(path)


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
