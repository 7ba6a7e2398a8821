"""Lists of lines ``path label``."""

import os
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import encoded, picture
from equiframe.data.lists import find_lists, read_list
from equiframe.data.prepare import prepare_data
from equiframe.data.sources import load_dataset
from equiframe.errors import InputError


def write_images(root, names, side=12):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(picture(i % 4, i, (side, side)), "JPEG"))


def write_list(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def listed(tmp_path):
    """A folder of images with three lists beside them: 3 classes of 3, 2 and 1 training images."""
    train = ["train/n01/a.jpg 0", "train/n01/b c.jpg 0", "train/n02/d.jpg 1", "train/n01/e.jpg 0", "train/n02/f.jpg 1"]
    lists = {
        "train": [*train, "train/n07/g.jpg 2"],
        "val": ["train/n02/v.jpg 1"],
        "test": ["val/x.jpg 0", "val/y.jpg 2"],
    }
    for split, lines in lists.items():
        write_list(tmp_path / "pets" / f"Pets_LT_{split}.txt", lines)
        write_images(tmp_path / "pets", [line.rsplit(" ", 1)[0] for line in lines])
    write_list(tmp_path / "pets" / "Pets_LT_open.txt", ["not one of ours"])
    return tmp_path / "pets"


def test_a_folder_with_lists(listed):
    dataset = load_dataset(str(listed))
    assert dataset.name == "Pets_LT"
    assert dataset.class_names == ["n01", "n02", "n07"]
    assert dataset.train.labels.tolist() == [0, 0, 1, 0, 1, 2]
    assert dataset.train.names[1] == "train/n01/b c.jpg"
    assert dataset.val.labels.tolist() == [1]
    assert dataset.test.names == ["val/x.jpg", "val/y.jpg"]
    assert dataset.train.image(1).size == (12, 12)
    assert dataset.notes == [f"lists: Pets_LT_train.txt, Pets_LT_val.txt, Pets_LT_test.txt; images under {listed}"]
    assert dataset.fingerprint() == load_dataset(str(listed / "Pets_LT_train.txt")).fingerprint()


def test_images_under_the_data_root(listed, tmp_path):
    (tmp_path / "lists").mkdir()
    for file in listed.glob("*.txt"):
        file.rename(tmp_path / "lists" / file.name)
    dataset = load_dataset(str(tmp_path / "lists"), data_root=listed)
    assert dataset.train.image(0).size == (12, 12)
    with pytest.raises(InputError, match=r"no image 'train/n01/a.jpg' under nowhere or .*lists; tell .* --data-root"):
        load_dataset(str(tmp_path / "lists"), data_root="nowhere")


def test_one_of_several_families_of_lists(listed):
    write_list(listed / "Other_train.txt", ["train/n01/a.jpg 0", "train/n02/d.jpg 1"])
    with pytest.raises(InputError, match=r"several train lists \(of Other, Pets_LT\); give one of them as DATA"):
        load_dataset(str(listed))
    other = load_dataset(str(listed / "Other_train.txt"))
    assert (other.name, len(other.train), other.val, other.test) == ("Other", 2, None, None)
    with pytest.raises(InputError, match=r"Pets_LT_val.txt is a val list; give the train list"):
        load_dataset(str(listed / "Pets_LT_val.txt"))
    (listed / "Pets_LT_validation.txt").write_text("x 0")
    with pytest.raises(InputError, match="two val lists: "):
        load_dataset(str(listed / "Pets_LT_train.txt"))


def test_a_list_of_any_name_is_a_train_list(listed):
    (listed / "Pets_LT_train.txt").rename(listed / "mine.lst")
    assert find_lists(listed) == {}
    assert len(load_dataset(str(listed / "mine.lst")).train) == 6


def test_absolute_paths_and_the_folder_as_name(listed):
    for file in listed.glob("*.txt"):
        file.unlink()
    write_list(listed / "train.txt", [f"{listed}/train/n01/a.jpg 0", f"{listed}/train/n02/d.jpg 1"])
    dataset = load_dataset(str(listed), data_root="nowhere")
    assert (dataset.name, dataset.class_names) == ("pets", ["n01", "n02"])
    assert dataset.train.image(1).size == (12, 12)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["data_256/a/attic/1.jpg", "data_256/b/bar/inner/1.jpg"], ["a/attic", "b/bar/inner"]),
        (["x/a/1.jpg", "x/a/b/1.jpg"], ["a", "a/b"]),
        (["x/1.jpg", "x/2.jpg"], ["0", "1"]),  # one folder for all
        (["1.jpg", "x/2.jpg"], ["0", "1"]),
        (["n1/1.jpg", "ab/2.jpg"], ["n1", "ab"]),
    ],
)
def test_class_names_from_folders(tmp_path, paths, names):
    write_images(tmp_path, paths)
    write_list(tmp_path / "train.txt", [f"{path} {k}" for k, path in enumerate(paths)])
    assert load_dataset(str(tmp_path)).class_names == names


def test_class_names_from_a_file(listed):
    write_list(listed / "classes.txt", ["tabby cat", "dog", "fox"])
    assert load_dataset(str(listed)).class_names == ["tabby cat", "dog", "fox"]
    write_list(listed / "classes.txt", ["tabby cat", "dog"])
    with pytest.raises(InputError, match=r"Pets_LT_train.txt, line 6: label 2 is outside 0\.\.1"):
        load_dataset(str(listed))
    write_list(listed / "classes.txt", ["cat", "dog", "fox", "owl"])
    with pytest.raises(InputError, match=r"no line has label 3; 4 classes need the labels 0\.\.3"):
        load_dataset(str(listed))


@pytest.mark.parametrize(
    ("split", "lines", "message"),
    [
        ("train", ["train/n01/a.jpg 0", "", "train/n02/d.jpg"], r"Pets_LT_train.txt, line 3: expected `path label`"),
        ("train", ["train/n01/a.jpg 0", "train/n02/d.jpg one"], "line 2: .* got 'train/n02/d.jpg one'"),
        ("train", ["train/n01/a.jpg 0", "train/n02/d.jpg -1"], "line 2: expected"),
        ("train", ["train/n01/a.jpg 0", "train/n02/d.jpg 1.0"], "line 2: expected"),
        ("train", ["train/n01/a.jpg 1", "train/n02/d.jpg 2", "train/n07/g.jpg 1"], "no line has label 0; 3 classes"),
        ("train", ["train/n01/a.jpg 0", "train/n02/d.jpg 2", "train/n01/b c.jpg 0"], "no line has label 1; 3 classes"),
        ("train", ["train/n01/a.jpg 0", "", "train/n02/d.jpg 99999999999999999999"], "line 3: label 9+ is outside"),
        ("train", ["", ""], "no images in .*Pets_LT_train.txt"),
        ("train", ["train/n01/zzz.jpg 0", "train/n02/d.jpg 1"], "no image 'train/n01/zzz.jpg' under"),
        ("train", ["train/n01/a.jpg 0", "train/n02/d.jpg 0"], r"_val.txt, line 1: label 1 is outside 0\.\.0"),
        ("test", ["", "val/x.jpg 3"], r"Pets_LT_test.txt, line 2: label 3 is outside 0\.\.2"),
        ("val", [], "no images in .*Pets_LT_val.txt"),
    ],
)
def test_lists_that_do_not_fit(listed, split, lines, message):
    write_list(listed / f"Pets_LT_{split}.txt", lines)
    with pytest.raises(InputError, match=message):
        load_dataset(str(listed), data_root="nowhere")


def test_a_missing_image_is_named_when_it_is_decoded(listed, tiny):
    (listed / "train/n02/f.jpg").unlink()
    load_dataset(str(listed))  # reading the list asks for the first image only
    with pytest.raises(InputError, match=r"image not found: .*train/n02/f\.jpg"):
        prepare_data(tiny(data=str(listed), image_size=8))


def test_images_listed_twice_are_noticed(listed):
    with open(listed / "Pets_LT_val.txt", "a") as file:
        file.write("train/n01/e.jpg 0\ntrain/n01/a.jpg 0\ntrain/n02/v.jpg 1\n")
    _, *notes = load_dataset(str(listed)).notes
    assert notes == [
        "Pets_LT_val.txt lists 1 image again",
        "Pets_LT_train.txt and Pets_LT_val.txt share 2 images, such as train/n01/a.jpg",
    ]


def test_windows_line_ends_byte_order_mark_and_odd_bytes(tmp_path):
    (tmp_path / "train.txt").write_bytes(b"\xef\xbb\xbfa b.jpg\t0\r\n  \xff.jpg   1  \r\n")
    names, labels = read_list(tmp_path / "train.txt")
    assert labels == [0, 1]
    assert names[0] == "a b.jpg"
    assert os.fsencode(names[1]) == b"\xff.jpg"


words = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=8)


@given(rows=st.lists(st.tuples(st.lists(words, min_size=1, max_size=3).map(" ".join), st.integers(0, 99)), min_size=1))
@settings(max_examples=30)
def test_any_list_reads_as_it_was_written(tmp_path_factory, rows):
    path = write_list(tmp_path_factory.mktemp("any") / "train.txt", [f"{name} {label}" for name, label in rows])
    names, labels = read_list(path)
    assert list(zip(names, labels, strict=True)) == rows


def test_a_list_as_long_as_inaturalists_is_read_in_seconds(tmp_path):
    """437,513 lines and 8,142 classes; about a second of one core, so 10 mean that something is wrong."""
    labels = np.sort(np.r_[np.arange(8142), np.random.default_rng(0).integers(0, 8142, 437_513 - 8142)])
    lines = [f"train_val2018/Aves/{k}/{i:032x}.jpg {k}" for i, k in enumerate(labels)]
    write_list(tmp_path / "iNaturalist18_train.txt", lines)
    write_images(tmp_path, [lines[0].split()[0]])
    start = time.process_time()
    dataset = load_dataset(str(tmp_path))
    seconds = time.process_time() - start
    print(f"437,513 lines in {seconds:.2f} s of processor time")
    assert seconds < 10
    assert (len(dataset.train), dataset.num_classes) == (437_513, 8142)
    np.testing.assert_array_equal(dataset.train.labels, labels)
    assert dataset.class_names[-1] == "8141"
