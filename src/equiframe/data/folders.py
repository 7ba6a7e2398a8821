"""Class folders: one folder a class, with or without ``train/`` and ``val/``, ``test/`` above."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from equiframe.data.dataset import SPLIT_WORDS, Dataset, ImageSet
from equiframe.data.images import EXTENSIONS
from equiframe.errors import InputError


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


def load_folder(path: Path) -> Dataset:
    folders = {p.name.lower(): p for p in _subfolders(path)}
    splits = {
        split: next((folders[name] for name in names if name in folders), None) for split, names in SPLIT_WORDS.items()
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
            if (folder / class_name).is_symlink() and folder.resolve().is_relative_to((folder / class_name).resolve()):
                raise InputError(f"class folder {folder / class_name} is a link to a folder that it lies in")
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
