"""Data sets in the layout that their publishers give: CUB-200-2011, Tiny-ImageNet, iNaturalist 2018, and the lists of
ImageNet-LT and Places-LT. ``docs/datasets.md`` tells where each comes from and how it must lie.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from equiframe.data.dataset import Dataset
from equiframe.data.folders import list_images
from equiframe.data.lists import files_under, find_lists, load_lists
from equiframe.errors import InputError

Reader = Callable[[Path, Sequence[Path]], Dataset]


class Published(NamedTuple):
    """How a data set is recognised and read."""

    readers: dict[str, Reader]  # the file that marks a layout → what reads it, given the file and the image folders
    folders: tuple[str, ...]  # under --data-root, where marks and images may lie besides --data-root itself
    get: str  # what to get from where


def load_published(name: str, root: Path) -> Dataset:
    """A data set of `PUBLISHED` that lies under ``root`` or under one of its usual folders there.

    Raises:
        InputError: if it is not there (the line says what to get), or not whole.
    """
    published = PUBLISHED[name]
    folders = [root, *(root / folder for folder in published.folders)]
    for folder in folders:
        found = _load_marked(name, folder, folders)
        if found is not None:
            return found
    raise InputError(
        f"{name} is not under --data-root {root} (looked for {' or '.join(published.readers)} there and in "
        f"{', '.join(published.folders)}): get {published.get}; docs/datasets.md shows how it must lie"
    )


def load_in_published_layout(folder: Path, root: Path) -> Dataset | None:
    """The data set if ``folder`` has the layout of one of `PUBLISHED` but for those of lists, which need no name."""
    for name, published in PUBLISHED.items():
        if any((folder / mark).is_file() for mark, reader in published.readers.items() if reader is not _read_lists):
            return _load_marked(name, folder, [folder, root])
    return None


def _load_marked(name: str, folder: Path, image_folders: Sequence[Path]) -> Dataset | None:
    for mark, reader in PUBLISHED[name].readers.items():
        if (folder / mark).is_file():
            dataset = reader(folder / mark, [folder, *image_folders])
            dataset.name = name
            return dataset
    return None


def _read_lists(train: Path, image_folders: Sequence[Path]) -> Dataset:
    return load_lists(find_lists(train), image_folders)


def _read_cub(mark: Path, image_folders: Sequence[Path]) -> Dataset:
    """``images.txt``, ``image_class_labels.txt`` and ``train_test_split.txt`` (lines ``image value``), ``classes.txt``."""
    folder = mark.parent
    class_names = _table(folder / "classes.txt")
    index = {key: k for k, key in enumerate(class_names)}
    files, classes = _table(folder / "images.txt"), _table(folder / "image_class_labels.txt")
    training = _table(mark)
    parts: dict[str, tuple[list[str], list[int]]] = {"1": ([], []), "0": ([], [])}
    for key, name in files.items():
        for table, path in ((classes, "image_class_labels.txt"), (training, mark.name)):
            if key not in table:
                raise InputError(f"{folder / path} lacks image {key} ({name})")
        if classes[key] not in index:
            raise InputError(f"class {classes[key]} of image {key} is not in {folder / 'classes.txt'}")
        if training[key] not in parts:
            raise InputError(f"{mark}: image {key} must have 1 (training) or 0 (test), got {training[key]!r}")
        names, labels = parts[training[key]]
        names.append(f"images/{name}")
        labels.append(index[classes[key]])
    train, test = (files_under(folder, *parts[which]) for which in ("1", "0"))
    return Dataset("", list(class_names.values()), train, None, test)


def _table(path: Path) -> dict[str, str]:
    """A file of lines ``key value``, in its order."""
    table: dict[str, str] = {}
    for number, line in enumerate(_read(path).splitlines(), 1):
        parts = line.split(maxsplit=1)
        if parts and (len(parts) == 1 or parts[0] in table):
            raise InputError(f"{path}, line {number}: expected a new key and a value, got {line[:80]!r}")
        if parts:
            table[parts[0]] = parts[1].strip()
    return table


def _read_tiny_imagenet(mark: Path, image_folders: Sequence[Path]) -> Dataset:
    """``train/WNID/images/``, ``val/images/`` with ``val/val_annotations.txt``; the labelled val images are the test."""
    folder = mark.parent
    class_names = sorted(_read(mark).split())
    index = {wnid: k for k, wnid in enumerate(class_names)}
    train: tuple[list[str], list[int]] = ([], [])
    for k, wnid in enumerate(class_names):
        images = folder / "train" / wnid / "images"
        found = list_images(images) if images.is_dir() else []
        if not found:
            raise InputError(f"no images in {images}")
        train[0].extend(file.relative_to(folder).as_posix() for file in found)
        train[1].extend([k] * len(found))
    annotations = folder / "val" / "val_annotations.txt"
    test: tuple[list[str], list[int]] = ([], [])
    for number, line in enumerate(_read(annotations).splitlines(), 1):
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in index:
            raise InputError(
                f"{annotations}, line {number}: expected an image and a class of {mark.name}, got {line!r}"
            )
        test[0].append(f"val/images/{name}")
        test[1].append(index[wnid])
    notes = ["Tiny-ImageNet is balanced until --imbalance cuts it to a long tail; its labelled val images are the test"]
    return Dataset("", class_names, files_under(folder, *train), None, files_under(folder, *test), notes=notes)


def _read_inaturalist(mark: Path, image_folders: Sequence[Path]) -> Dataset:
    """``train2018.json`` and ``val2018.json``: images, annotations and categories, as in COCO."""
    folder = mark.parent
    categories: list[dict] = []
    parts = {}
    for split, path in (("train", mark), ("val", folder / "val2018.json")):
        try:
            content = json.loads(_read(path))
            categories = categories or sorted(content["categories"], key=lambda c: c["id"])
            index = {c["id"]: k for k, c in enumerate(categories)}
            category = {a["image_id"]: a["category_id"] for a in content["annotations"]}
            names = [image["file_name"] for image in content["images"]]
            labels = [index[category[image["id"]]] for image in content["images"]]
            class_names = [str(c["name"]) for c in categories]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} has not the format of iNaturalist 2018: {error!r}") from error
        parts[split] = files_under(folder, names, labels)
    return Dataset("", class_names, parts["train"], parts["val"])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file") from error


PUBLISHED = {
    "cub200": Published(
        {"train_test_split.txt": _read_cub}, ("CUB_200_2011",), "CUB-200-2011 (CUB_200_2011.tgz) from Caltech"
    ),
    "imagenet-lt": Published(
        {"ImageNet_LT_train.txt": _read_lists},
        ("ImageNet_LT", "ImageNet", "imagenet"),
        "the lists ImageNet_LT_train.txt, _val.txt, _test.txt of Liu et al. (OLTR, CVPR 2019), and the images of ILSVRC "
        "2012 from image-net.org",
    ),
    "places-lt": Published(
        {"Places_LT_train.txt": _read_lists},
        ("Places_LT", "Places_LT_v2", "Places", "places365_standard"),
        "the lists Places_LT_train.txt, _val.txt, _test.txt of Liu et al. (OLTR, CVPR 2019), and the images of "
        "Places365-Standard from MIT",
    ),
    "inaturalist2018": Published(
        {"train2018.json": _read_inaturalist, "iNaturalist18_train.txt": _read_lists},
        ("inaturalist2018", "iNaturalist18", "inat2018"),
        "train_val2018.tar.gz, train2018.json and val2018.json of the iNaturalist 2018 competition (visipedia/inat_comp)",
    ),
    "tiny-imagenet-lt": Published(
        {"wnids.txt": _read_tiny_imagenet}, ("tiny-imagenet-200",), "tiny-imagenet-200.zip from Stanford's CS231n"
    ),
}
