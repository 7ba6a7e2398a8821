"""Lists: text files with a line ``path label`` for each image, as long-tailed benchmarks are published
(``ImageNet_LT_train.txt``, ``ImageNet_LT_val.txt``, ``ImageNet_LT_test.txt``); or ``.csv`` files with a row ``path,label`` for
each, whose first row may name the columns.

Reading a list touches no image: whether the images are there is asked for the first line only. A missing one is named
when it is decoded.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from equiframe.data.dataset import SPLIT_WORDS, Dataset, ImageSet, split_named
from equiframe.errors import InputError
from equiframe.words import counted

LIST_ENDINGS = (".txt", ".lst", ".csv")
CLASS_NAMES_FILE = "classes.txt"


def find_lists(path: Path) -> dict[str, Path]:
    """The lists by split of a folder, or of a train list and its siblings ``…val.txt`` and ``…test.txt``.

    A list's split is the last word of its name. A folder without a train list has none ({}); a file whose name tells no
    split is a train list without siblings.
    """
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix.lower() in (".txt", ".lst"))  # a .csv may be anything
        stems = {_stem_and_split(f)[0] for f in files if _stem_and_split(f)[1] == "train"}
        if len(stems) > 1:
            raise InputError(
                f"{path} has several train lists (of {', '.join(sorted(stems))}); give one of them as DATA"
            )
    else:
        if _stem_and_split(path)[1] is None:
            return {"train": path}
        if _stem_and_split(path)[1] != "train":
            raise InputError(f"{path} is a {_stem_and_split(path)[1]} list; give the train list as DATA")
        files = sorted(f for f in path.parent.iterdir() if f.suffix == path.suffix)
        stems = {_stem_and_split(path)[0]}
    found: dict[str, Path] = {}
    for file in files:
        stem, split = _stem_and_split(file)
        if stem in stems and split is not None:
            if split in found:
                raise InputError(f"two {split} lists: {found[split]} and {file}; keep one")
            found[split] = file
    return {split: found[split] for split in SPLIT_WORDS if split in found}


def _stem_and_split(path: Path) -> tuple[str, str | None]:
    """``ImageNet_LT_train.txt`` → ("ImageNet_LT", "train")."""
    *_, word = re.split(r"[-_. ]", path.stem)
    return path.stem[: -len(word) or None].rstrip("-_. "), split_named(word)


def load_lists(lists: dict[str, Path], roots: Sequence[Path]) -> Dataset:
    """A data set of lists.

    Args:
        lists: the list of each split; ``train`` must be there.
        roots: folders that image paths may be relative to; the first that holds the first training image is taken for
            all. Absolute paths are taken as they are.

    Class names are the lines of ``classes.txt`` beside the lists; else the folders that the training images lie in, if
    there is one a class; else the labels themselves.

    Raises:
        InputError: a line that is none (with file and number), a label that training lacks, images that are not there.
    """
    listed = {split: read_list(path) for split, path in lists.items()}
    train, (names, labels) = lists["train"], listed["train"]
    root = _root_of(names[0], train, roots)
    class_names = _class_names(train.parent / CLASS_NAMES_FILE, names, labels, train)
    for split, path in lists.items():
        _check_labels(listed[split][1], len(class_names), path, whole=split == "train")
    return Dataset(
        _stem_and_split(train)[0] or train.resolve().parent.name,
        class_names,
        **{split: files_under(root, *content) for split, content in listed.items()},
        notes=[
            f"lists: {', '.join(p.name for p in lists.values())}; images under {root}",
            *_repetitions(listed, lists),
        ],
    )


def files_under(root: Path, names: list[str], labels: Sequence[int]) -> ImageSet:
    """Image files by their names relative to a folder."""
    sources = [os.path.join(root, name) for name in names]
    return ImageSet(np.asarray(labels, dtype=np.int64), names, sources=sources)


def read_list(path: Path) -> tuple[list[str], list[int]]:
    """Image paths and labels of a list; paths may hold spaces, empty lines do not count."""
    names, labels = [], []
    expected = "path,label" if path.suffix.lower() == ".csv" else "path label"
    for number, cells in _rows(path):
        name, label = (cell.strip() for cell in cells) if len(cells) == 2 else ("", "")
        if not name or not (label.isascii() and label.isdigit()):
            if not names and number == 1 and expected == "path,label" and len(cells) == 2 and label.isidentifier():
                continue  # the columns' names
            line = ("," if expected == "path,label" else " ").join(cells)[:80]
            raise InputError(f"{path}, line {number}: expected `{expected}` with a label 0, 1, 2, …, got {line!r}")
        if len(label) > 18:
            raise InputError(f"{path}, line {number}: label {label[:60]} is outside 0..10^18")
        names.append(name)
        labels.append(int(label))
    if not names:
        raise InputError(f"no images in {path}")
    return names, labels


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not empty, as path and label, with the numbers of their lines."""
    if path.suffix.lower() != ".csv":
        yield from ((number, line.rsplit(maxsplit=1)) for number, line in _lines(path))
        return
    for number, line in _lines(path):  # a line is a row: a path with a line break in it has no place in a list
        try:
            yield number, next(csv.reader([line], strict=True))
        except csv.Error as error:
            raise InputError(f"{path}, line {number}: {error}, in {line[:80]!r}") from error


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not empty, with their numbers."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise InputError(f"cannot read list {path}: {error.strerror}") from error
    stripped = ((number, line.strip()) for number, line in enumerate(text.split("\n"), 1))
    return [(number, line) for number, line in stripped if line]


def _root_of(name: str, path: Path, roots: Sequence[Path]) -> Path:
    for root in roots:
        if (root / name).is_file():
            return root
    looked = " or ".join(str(root) for root in dict.fromkeys(roots))
    raise InputError(f"{path}: no image {name!r} under {looked}; tell where the images lie with --data-root")


def _class_names(file: Path, names: list[str], labels: list[int], train: Path) -> list[str]:
    if file.is_file():
        return [line for _, line in _lines(file)]
    num_classes = max(labels) + 1
    if num_classes > len(labels):  # some class would have no image; a wild label must not cost memory
        _check_labels(labels, len(labels), train, whole=False)
    folders: list[set[str]] = [set() for _ in range(num_classes)]
    for name, label in zip(names, labels, strict=True):
        folders[label].add(name.rpartition("/")[0].strip("/"))
    single = [next(iter(found)) for found in folders if len(found) == 1]
    if len(set(single)) < num_classes or "" in single:
        return [str(k) for k in range(num_classes)]
    above = len(os.path.commonpath([folder.rpartition("/")[0] for folder in single]))
    return [folder[above:].lstrip("/") for folder in single]


def _check_labels(labels: list[int], num_classes: int, path: Path, *, whole: bool) -> None:
    """All labels below ``num_classes``; with ``whole`` each of them at least once."""
    if max(labels) >= num_classes:
        i = next(i for i, label in enumerate(labels) if label >= num_classes)
        with_header = len(_lines(path)) - len(labels)
        number = _lines(path)[i + with_header][0]
        raise InputError(f"{path}, line {number}: label {labels[i]} is outside 0..{num_classes - 1}")
    missing = np.flatnonzero(np.bincount(labels, minlength=num_classes) == 0)
    if whole and len(missing):
        raise InputError(
            f"{path}: no line has label {missing[0]}; {num_classes} classes need the labels 0..{num_classes - 1}"
        )


def _repetitions(listed: dict[str, tuple[list[str], list[int]]], lists: dict[str, Path]) -> list[str]:
    """What a reader should know of images that are listed twice, within a split or across splits."""
    notes, earlier = [], {}
    for split, (names, _) in listed.items():
        once = set(names)
        if len(once) < len(names):
            notes.append(f"{lists[split].name} lists {counted(len(names) - len(once), 'image')} again")
        for other, others in earlier.items():
            shared = once & others
            if shared:
                example = f"{counted(len(shared), 'image')}, such as {min(shared)}"
                notes.append(f"{lists[other].name} and {lists[split].name} share {example}")
        earlier[split] = once
    return notes
