"""Data sets in their publishers' layouts, imitated with tiny JPEGs; and their sections in docs/datasets.md."""

import json
from pathlib import Path

import numpy as np
import pytest

from conftest import encoded, picture
from equiframe.data.builtin import BUILTIN_NAMES
from equiframe.data.prepare import prepare_data
from equiframe.data.published import PUBLISHED
from equiframe.data.sources import load_dataset
from equiframe.errors import InputError
from equiframe.imbalance import class_profile


def write_jpeg(path: Path, k: int, i: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(picture(k, i), "JPEG"))


def write(path: Path, lines) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def cub(root: Path) -> dict:
    """CUB_200_2011/{images.txt, image_class_labels.txt, train_test_split.txt, classes.txt, images/, attributes/, parts/}."""
    folder = root / "CUB_200_2011"
    classes = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]
    files = [(k, f"{c}/{c[4:]}_{i:04d}_{796100 + i}.jpg") for k, c in enumerate(classes) for i in range(5)]
    for k, name in files:
        write_jpeg(folder / "images" / name, k)
    write(folder / "classes.txt", [f"{k} {c}" for k, c in enumerate(classes, 1)])
    write(folder / "images.txt", [f"{i} {name}" for i, (_, name) in enumerate(files, 1)])
    write(folder / "image_class_labels.txt", [f"{i} {k + 1}" for i, (k, _) in enumerate(files, 1)])
    write(folder / "train_test_split.txt", [f"{i} {int(i % 5 > 1)}" for i in range(1, len(files) + 1)])
    write(folder / "bounding_boxes.txt", ["1 60.0 27.0 325.0 304.0"])
    write(folder / "parts" / "parts.txt", ["1 back"])
    write(folder / "attributes" / "class_attribute_labels_continuous.txt", ["0.0"])
    return {"classes": classes, "train": [3, 3, 3], "val": None, "test": [2, 2, 2]}


def tiny_imagenet(root: Path) -> dict:
    """tiny-imagenet-200/{wnids.txt, words.txt, train/WNID/{images/, WNID_boxes.txt}, val/{images/, val_annotations.txt}, test/}."""
    folder = root / "tiny-imagenet-200"
    wnids = ["n02124075", "n01443537", "n04067472", "n03355925"]
    write(folder / "wnids.txt", wnids)
    write(folder / "words.txt", [f"{w}\tthing" for w in wnids])
    annotations = []
    for k, w in enumerate(sorted(wnids)):
        for i in range(20):
            write_jpeg(folder / "train" / w / "images" / f"{w}_{i}.JPEG", k, i)
        write(folder / "train" / w / f"{w}_boxes.txt", [f"{w}_0.JPEG\t0\t10\t63\t58"])
        for i in (k, k + 4):
            write_jpeg(folder / "val" / "images" / f"val_{i}.JPEG", k, i)
            annotations.append(f"val_{i}.JPEG\t{w}\t0\t32\t44\t62")
    write(folder / "val" / "val_annotations.txt", annotations)
    write_jpeg(folder / "test" / "images" / "test_0.JPEG", 0)
    return {"classes": sorted(wnids), "train": [20] * 4, "val": None, "test": [2] * 4}


def write_lists(folder: Path, images: Path, stem: str, lists: dict) -> None:
    for split, lines in lists.items():
        write(folder / f"{stem}_{split}.txt", lines)
        for line in lines:
            name, k = line.split()
            write_jpeg(images / name, int(k))


def imagenet_lt(root: Path) -> dict:
    """Lists in ImageNet_LT/, images in ImageNet/{train,val}/WNID/."""
    wnids = ["n01440764", "n01443537", "n01484850"]
    lists = {
        "train": [f"train/{w}/{w}_{i}.JPEG {k}" for k, w in enumerate(wnids) for i in range(4 - k)],
        "val": [f"train/{w}/{w}_{99 + k}.JPEG {k}" for k, w in enumerate(wnids)],
        "test": [f"val/{w}/ILSVRC2012_val_{k:08d}.JPEG {k}" for k, w in enumerate(wnids)],
    }
    write_lists(root / "ImageNet_LT", root / "ImageNet", "ImageNet_LT", lists)
    return {"classes": wnids, "train": [4, 3, 2], "val": [1] * 3, "test": [1] * 3}


def places_lt(root: Path) -> dict:
    """Lists in Places_LT/, images in Places/{data_256,val_256}/."""
    places = ["a/airfield", "a/apartment_building/outdoor", "z/zen_garden"]
    lists = {
        "train": [f"data_256/{p}/{i:08d}.jpg {k}" for k, p in enumerate(places) for i in range(3)],
        "val": [f"data_256/{p}/00000009.jpg {k}" for k, p in enumerate(places)],
        "test": [f"val_256/Places365_val_{k:08d}.jpg {k}" for k in range(3)],
    }
    write_lists(root / "Places_LT", root / "Places", "Places_LT", lists)
    return {"classes": places, "train": [3] * 3, "val": [1] * 3, "test": [1] * 3}


INAT = {"train": ("Aves/0", "Aves/0", "Plantae/1", "Aves/0"), "val": ("Plantae/1", "Aves/0")}


def inaturalist(root: Path) -> dict:
    """inaturalist2018/{train2018.json, val2018.json, train_val2018/GROUP/CATEGORY/}."""
    folder = root / "inaturalist2018"
    for split, kinds in INAT.items():
        images = [{"id": 70 + i, "file_name": f"train_val2018/{k}/{split}{i}.jpg"} for i, k in enumerate(kinds)]
        annotations = [{"image_id": 70 + i, "category_id": int(k[-1]), "id": i} for i, k in enumerate(kinds)]
        categories = [{"id": 1, "name": "Poa annua"}, {"id": 0, "name": "Parus major"}]
        content = {"images": images, "annotations": annotations[::-1], "categories": categories}
        write(folder / f"{split}2018.json", [json.dumps(content)])
        for image, k in zip(images, kinds, strict=True):
            write_jpeg(folder / image["file_name"], int(k[-1]))
    return {"classes": ["Parus major", "Poa annua"], "train": [3, 1], "val": [1, 1], "test": None}


def inaturalist_lists(root: Path) -> dict:
    """The same as lists beside train_val2018/."""
    lists = {s: [f"train_val2018/{k}/{s}{i}.jpg {k[-1]}" for i, k in enumerate(ks)] for s, ks in INAT.items()}
    write_lists(root, root, "iNaturalist18", lists)
    return {"classes": ["Aves/0", "Plantae/1"], "train": [3, 1], "val": [1, 1], "test": None}


LAYOUTS = [
    ("cub200", cub),
    ("tiny-imagenet-lt", tiny_imagenet),
    ("imagenet-lt", imagenet_lt),
    ("places-lt", places_lt),
    ("inaturalist2018", inaturalist),
    ("inaturalist2018", inaturalist_lists),
]


@pytest.mark.parametrize(("name", "make"), LAYOUTS, ids=lambda x: getattr(x, "__name__", None))
def test_the_publishers_layout(tmp_path, name, make):
    expected = make(tmp_path)
    dataset = load_dataset(name, data_root=tmp_path)
    assert dataset.name == name
    assert dataset.class_names == expected["classes"]
    for split in ("train", "val", "test"):
        part = getattr(dataset, split)
        assert (part is None) == (expected[split] is None)
        if part is not None:
            assert part.counts(dataset.num_classes).tolist() == expected[split]
            for i, k in enumerate(part.labels):  # the right images under the right labels: brightness tells the class
                assert int(np.asarray(part.image(i)).mean()) // 60 == k % 4


@pytest.mark.parametrize(("name", "folder", "make"), [
    ("cub200", "CUB_200_2011", cub),
    ("tiny-imagenet-lt", "tiny-imagenet-200", tiny_imagenet),
    ("inaturalist2018", "inaturalist2018", inaturalist),
])  # fmt: skip
def test_the_folder_itself_as_data_or_as_data_root(tmp_path, name, folder, make):
    make(tmp_path)
    named = load_dataset(name, data_root=tmp_path)
    for other in (load_dataset(str(tmp_path / folder)), load_dataset(name, data_root=tmp_path / folder)):
        assert (other.name, other.fingerprint()) == (name, named.fingerprint())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_missing_set_says_what_to_get_from_where(tmp_path, name):
    with pytest.raises(InputError, match=rf"{name} is not under --data-root .*: get .*docs/datasets\.md") as error:
        load_dataset(name, data_root=tmp_path, download=True)
    assert PUBLISHED[name].get in str(error.value)


def test_tiny_imagenet_is_cut_to_a_long_tail(tmp_path, tiny):
    tiny_imagenet(tmp_path)
    data = prepare_data(tiny(data="tiny-imagenet-lt", data_root=str(tmp_path), imbalance=10, validation=0.0))
    assert data.train_counts == class_profile(4, 20, 10)
    assert any("balanced until --imbalance cuts it" in note for note in data.notes)


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("make", "name", "file", "old", "new", "message"),
    [
        (cub, "cub200", "CUB_200_2011/images.txt", "2 001", "1 001", r"images.txt, line 2: expected a new key"),
        (cub, "cub200", "CUB_200_2011/images.txt", "1 001.Black_footed_Albatross/", "1\n#", "line 1: expected a new key"),
        (cub, "cub200", "CUB_200_2011/image_class_labels.txt", "3 1\n", "", r"labels.txt lacks image 3 \(001\.Black"),
        (cub, "cub200", "CUB_200_2011/image_class_labels.txt", "3 1\n", "3 9\n", "class 9 of image 3 is not in"),
        (cub, "cub200", "CUB_200_2011/train_test_split.txt", "1 0\n", "1 2\n", "image 1 must have 1 .* got '2'"),
        (tiny_imagenet, "tiny-imagenet-lt", "tiny-imagenet-200/wnids.txt", "n02124075", "n9", "no images in .*n9"),
        (tiny_imagenet, "tiny-imagenet-lt", "tiny-imagenet-200/val/val_annotations.txt", "val_4.JPEG\tn", "val_4.JPEG\tm",
         r"val_annotations.txt, line 2: expected an image and a class of wnids\.txt"),
        (inaturalist, "inaturalist2018", "inaturalist2018/val2018.json", '"category_id": 1', '"category_id": 5',
         "val2018.json has not the format of iNaturalist 2018: KeyError"),
        (inaturalist, "inaturalist2018", "inaturalist2018/train2018.json", '{"images"', '{"pictures"', "KeyError"),
        (inaturalist, "inaturalist2018", "inaturalist2018/train2018.json", "{", "", "has not the format"),
    ],
)  # fmt: skip
def test_layouts_that_are_not_whole(tmp_path, make, name, file, old, new, message):
    make(tmp_path)
    change(tmp_path / file, old, new)
    with pytest.raises(InputError, match=message):
        load_dataset(name, data_root=tmp_path)


def test_a_layout_that_lacks_a_file(tmp_path):
    cub(tmp_path)
    (tmp_path / "CUB_200_2011" / "classes.txt").unlink()
    with pytest.raises(InputError, match=r"cannot read .*classes\.txt: No such file"):
        load_dataset("cub200", data_root=tmp_path)


def test_every_name_has_a_section_in_the_docs():
    page = (Path(__file__).parents[1] / "docs" / "datasets.md").read_text()
    sections = [line for line in page.splitlines() if line.startswith("## ")]
    for name in (*BUILTIN_NAMES, "hf:NAME"):
        assert [line for line in sections if f"`{name}`" in line], name
