"""Where images come from: class folders, Parquet, built-in names."""

import contextlib
import io
import json
import os
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from conftest import encoded, picture, write_class, write_parquet
from equiframe.data.images import decode_image
from equiframe.data.sources import Dataset, ImageSet, list_images, load_dataset, with_pixels
from equiframe.errors import InputError

# --- class folders ----------------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    data = load_dataset("digits")
    images, labels = load_digits(return_X_y=True)
    for part, count in ((data.train, 1258), (data.test, 539)):
        positions = [int(name.removeprefix("digit-")) for name in part.names]
        assert len(positions) == count
        assert (part.labels == labels[positions]).all()
        expected = np.rint(images[positions] * 255 / 16).reshape(-1, 1, 8, 8).repeat(3, axis=1)
        assert (part.pixels.numpy() == expected).all()


def test_a_folder_of_class_folders(class_folder):
    dataset = load_dataset(str(class_folder({"dog": 3, "cat": 4, "cow": 2})))
    assert dataset.name == "pets"
    assert dataset.class_names == ["cat", "cow", "dog"]
    assert dataset.train.labels.tolist() == [0] * 4 + [1] * 2 + [2] * 3
    assert dataset.train.names[0] == "cat/000.png"
    assert dataset.val is None
    assert dataset.test is None
    np.testing.assert_array_equal(np.asarray(dataset.train.image(4)), np.asarray(picture(1, 0)))


@pytest.mark.parametrize(
    ("folders", "found"),
    [
        (("val", "test"), ("val", "test")),
        (("validation",), ("val",)),
        (("valid", "testing"), ("val", "test")),
        (("test",), ("test",)),
    ],
)
def test_split_folders(class_folder, folders, found):
    counts = {"cat": 3, "dog": 2}
    dataset = load_dataset(str(class_folder(counts, **dict.fromkeys(folders, counts))))
    assert len(dataset.train) == 5
    for split in ("val", "test"):
        part = getattr(dataset, split)
        assert (part is not None) == (split in found)
        if part is not None:
            assert part.labels.tolist() == [0, 0, 0, 1, 1]
            assert part.names[0].endswith("cat/500.png")


def test_a_test_split_may_lack_classes_but_not_bring_new_ones(class_folder):
    assert len(load_dataset(str(class_folder({"cat": 3, "dog": 2}, test={"cat": 2}))).test) == 2
    with pytest.raises(InputError, match="training lacks: fox"):
        load_dataset(str(class_folder({"cat": 3, "dog": 2}, name="more", test={"fox": 2})))


def test_a_class_may_be_called_train(tmp_path):
    for k, name in enumerate(("boat", "bus", "train")):
        write_class(tmp_path / "traffic" / name, k, 2)
    assert load_dataset(str(tmp_path / "traffic")).class_names == ["boat", "bus", "train"]


def test_hidden_files_folders_and_other_files_are_left_out(class_folder):
    root = class_folder({"cat": 2, "dog": 2})
    write_class(root / ".cache" / "cat", 0, 1)
    write_class(root / "cat" / ".ipynb_checkpoints", 0, 1)
    write_class(root / "cat" / "more", 0, 1, start=7)
    (root / "cat" / "._000.png").write_bytes(b"resource fork")
    (root / "cat" / "notes.txt").write_text("not an image")
    (root / "cat" / "folder.png").mkdir()
    assert [p.name for p in list_images(root / "cat")] == ["000.png", "001.png", "007.png"]
    assert load_dataset(str(root)).train.counts(2).tolist() == [3, 2]


def test_endings_in_capitals_and_names_that_are_not_ascii(tmp_path):
    for name in ("kätzchen", "собака"):
        write_class(tmp_path / "zoo" / name, 0, 2)
        picture(0, 9).save(tmp_path / "zoo" / name / "FOTO.JPG", "JPEG")
    dataset = load_dataset(str(tmp_path / "zoo"))
    assert dataset.class_names == ["kätzchen", "собака"]
    assert len(dataset.train) == 6
    assert dataset.fingerprint() == load_dataset(str(tmp_path / "zoo")).fingerprint()


def test_a_file_name_of_any_bytes(class_folder):
    root = class_folder({"cat": 2, "dog": 2})
    count = 2
    with contextlib.suppress(OSError):  # Linux allows it, other systems need not
        with open(os.fsencode(root / "cat") + b"/\xff\xfe.png", "wb") as file:
            file.write(encoded(picture(0, 0)))
        count = 3
    dataset = load_dataset(str(root))
    assert len(dataset.fingerprint()) == 64
    assert dataset.train.counts(2).tolist() == [count, 2]


def test_native_size():
    def of(sizes):
        sources = [encoded(Image.new("RGB", s)) for s in sizes]
        images = ImageSet(np.zeros(len(sizes), np.int64), [str(i) for i in range(len(sizes))], sources=sources)
        return Dataset("x", ["a", "b"], images).native_size()

    assert of([(28, 28)] * 3) == 28  # alike and small: as they are
    assert of([(40, 28), (28, 60)]) == 28
    assert of([(30, 30), (40, 44)]) == 32
    assert of([(64, 64), (70, 90)]) == 64
    assert of([(100, 130), (160, 120)]) == 128
    assert of([(640, 480)] * 4) == 224


# --- Parquet ----------------------------------------------------------------------------------------------------------


def images_of(labels):
    return [encoded(picture(k, i)) for i, k in enumerate(labels)]


def test_a_parquet_folder(tmp_path):
    labels = [0, 2, 1, 1, 0]
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write_parquet(tmp_path / f"{name}.parquet", images_of(labels), labels, ["ant", "bee", "cow"], extra=[1.5] * 5)
    dataset = load_dataset(str(tmp_path))
    assert dataset.class_names == ["ant", "bee", "cow"]
    assert dataset.train.labels.tolist() == labels * 2
    assert len(dataset.test) == 5
    np.testing.assert_array_equal(np.asarray(dataset.train.image(6)), np.asarray(picture(2, 1)))


def test_parquet_without_class_names_in_the_data_folder_of_a_hub_clone(tmp_path):
    write_parquet(tmp_path / "data" / "train.parquet", images_of([0, 1, 1]), [0, 1, 1])
    write_parquet(tmp_path / "data" / "validation_0.parquet", images_of([1]), [1])
    dataset = load_dataset(str(tmp_path))
    assert dataset.class_names == ["0", "1"]
    assert len(dataset.val) == 1


def test_parquet_with_plain_bytes_and_one_file_of_any_name(tmp_path):
    pq.write_table(
        pa.table({"image": images_of([0, 1]), "label": pa.array([0, 1], pa.int32())}), tmp_path / "a.parquet"
    )
    dataset = load_dataset(str(tmp_path))
    assert dataset.train.names == ["a.parquet:0", "a.parquet:1"]
    np.testing.assert_array_equal(np.asarray(dataset.train.image(1)), np.asarray(picture(1, 1)))


def parquet_of(tmp_path, **columns):
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    return str(tmp_path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"img": [b"x"], "label": [0]}, "lacks the column 'image' .it has img, label"),
        ({"image": [b"x"]}, "lacks the column 'label'"),
        ({"image": pa.array([b"x", None]), "label": [0, 1]}, "row 1 .* has no image bytes"),
        ({"image": [{"bytes": None, "path": "a.png"}], "label": [0]}, "row 0 .* has no image bytes"),
        ({"image": ["text", "text"], "label": [0, 1]}, "row 0 .* has no image bytes"),
        ({"image": [b"x", b"y"], "label": [0, None]}, "row 1 .* no whole-number label"),
        ({"image": [b"x", b"y"], "label": [0.0, 1.5]}, "no whole-number label .the column holds double"),
        ({"image": [b"x", b"y"], "label": ["cat", "dog"]}, "no whole-number label .the column holds string"),
        ({"image": [b"x", b"y"], "label": [0, -1]}, "label -1 .* is outside 0..0|single class"),
        ({"image": [b"x"] * 3, "label": [0, 1, -1]}, "label -1 of train image 'train.parquet:2' is outside 0..1"),
        ({"image": [b"x", b"y"], "label": [0, 10**15]}, "label 1000000000000000 in .* only 2 training images"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, "no images"),
        ({"image": [b"x", b"y"], "label": [0, 0]}, "single class"),
    ],
)
def test_parquet_that_does_not_fit(tmp_path, columns, message):
    with pytest.raises(InputError, match=message):
        load_dataset(parquet_of(tmp_path, **columns))


def test_parquet_labels_outside_the_named_classes(tmp_path):
    write_parquet(tmp_path / "train.parquet", images_of([0, 1, 2]), [0, 1, 2], ["ant", "bee"])
    with pytest.raises(InputError, match=r"label 2 of train image '2\.png' is outside 0\.\.1"):
        load_dataset(str(tmp_path))


def test_parquet_files_that_are_none_or_have_no_split(tmp_path):
    (tmp_path / "train.parquet").write_text("not Parquet")
    with pytest.raises(InputError, match=r"not a readable Parquet file: .*train\.parquet"):
        load_dataset(str(tmp_path))
    write_parquet(tmp_path / "train.parquet", images_of([0, 1]), [0, 1])
    write_parquet(tmp_path / "odd.parquet", images_of([0, 1]), [0, 1])
    with pytest.raises(InputError, match=r"cannot tell the split of .*odd\.parquet"):
        load_dataset(str(tmp_path))
    (tmp_path / "train.parquet").rename(tmp_path / "test.parquet")
    (tmp_path / "odd.parquet").rename(tmp_path / "test-1.parquet")
    with pytest.raises(InputError, match="no train-"):
        load_dataset(str(tmp_path))


def test_an_empty_test_split_is_an_error(tmp_path):
    write_parquet(tmp_path / "train.parquet", images_of([0, 1]), [0, 1], ["ant", "bee"])
    write_parquet(tmp_path / "test.parquet", [], pa.array([], pa.int64()), ["ant", "bee"])
    with pytest.raises(InputError, match="test split without images"):
        load_dataset(str(tmp_path))


def test_cifar10_as_parquet(cifar10):
    dataset = load_dataset(str(cifar10))
    assert dataset.class_names[:3] == ["airplane", "automobile", "bird"]
    assert dataset.train.counts(10).tolist() == [5000] * 10
    assert dataset.test.counts(10).tolist() == [1000] * 10
    assert dataset.native_size() == 32
    sample = with_pixels(dataset.test.subset(np.arange(0, 10_000, 500)), 32)
    for i, pixels in enumerate(sample.pixels):
        expected = np.asarray(decode_image(dataset.test.sources[500 * i]).convert("RGB"))
        np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), expected)


def test_a_natural_long_tail_with_gray_images(long_tailed):
    dataset = load_dataset(str(long_tailed))
    counts = dataset.train.counts(dataset.num_classes)
    assert sorted(counts, reverse=True) == counts.tolist()
    assert counts.max() / counts.min() >= 20
    assert dataset.native_size() == 64
    part = dataset.train.subset(np.arange(0, len(dataset.train), len(dataset.train) // 60))
    pixels = with_pixels(part, 64).pixels
    assert pixels.shape == (len(part), 3, 64, 64)
    gray = [i for i in range(len(part)) if decode_mode(part.sources[i]) == "L"]
    for i in gray:
        assert torch.equal(pixels[i, 0], pixels[i, 1])


def decode_mode(content):
    with Image.open(io.BytesIO(content)) as image:
        return image.mode


# --- built-in names ---------------------------------------------------------------------------------------------------


def test_digits():
    dataset = load_dataset("digits")
    assert len(dataset.train) + len(dataset.test) == 1797
    assert dataset.train.pixels.shape[1:] == (3, 8, 8)
    assert dataset.train.pixels.max() == 255
    assert not dataset.flips
    assert not set(dataset.train.names) & set(dataset.test.names)
    assert dataset.test.counts(10).min() >= 52


@pytest.fixture
def torchvision(monkeypatch):
    """torchvision's data sets replaced by small ones of the same shape and attributes."""
    import torchvision.datasets as datasets

    made = []

    class Fake:
        sizes: ClassVar = {True: 100, False: 20, "train": 100, "test": 20, "extra": 50}

        def __init__(self, root, train=None, split=None, download=False):
            print("Files already downloaded and verified")
            made.append((root, train if split is None else split, download))
            self.count = self.sizes[train if split is None else split]
            self.random = np.random.default_rng(self.count)

    class Cifar(Fake):
        num_classes = 10

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.classes = [f"class {k}" for k in range(self.num_classes)]
            self.data = self.random.integers(0, 256, (self.count, 32, 32, 3), dtype=np.uint8)
            self.targets = [i % self.num_classes for i in range(self.count)]

    class Cifar100(Cifar):
        num_classes = 100

    class Svhn(Fake):
        """Class 0 has only 2 of 100 training images: less than the protocol's N/K."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.data = self.random.integers(0, 256, (self.count, 3, 32, 32), dtype=np.uint8)
            self.labels = np.array([i % 9 + 1 if i > 1 else 0 for i in range(self.count)])

    class Stl(Fake):
        classes: ClassVar = [f"class {k}" for k in range(10)]

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.data = self.random.integers(0, 256, (self.count, 3, 96, 96), dtype=np.uint8)
            self.labels = np.arange(self.count) % 10

    for name, fake in (("CIFAR10", Cifar), ("CIFAR100", Cifar100), ("SVHN", Svhn), ("STL10", Stl)):
        monkeypatch.setattr(datasets, name, fake)
    return made


@pytest.mark.parametrize(
    ("name", "side", "num_classes", "num_train", "flips"),
    [
        ("cifar10", 32, 10, 100, True),
        ("cifar100", 32, 100, 100, True),
        ("svhn", 32, 10, 100, False),
        ("svhn-extra", 32, 10, 150, False),
        ("stl10", 96, 10, 100, True),
    ],
)
def test_torchvision_names(torchvision, tmp_path, capsys, name, side, num_classes, num_train, flips):
    dataset = load_dataset(name, data_root=tmp_path, download=True)
    assert dataset.name == name
    assert dataset.num_classes == num_classes
    assert dataset.flips == flips
    assert dataset.train.pixels.shape == (num_train, 3, side, side)
    assert len(dataset.test) == 20
    assert {(root, download) for root, _, download in torchvision} == {(str(tmp_path), True)}
    assert capsys.readouterr().out == ""  # stdout is for results


def test_cifar_pixels_are_channels_first(torchvision):
    import torchvision.datasets as datasets

    data = datasets.CIFAR10("x", train=True).data
    np.testing.assert_array_equal(load_dataset("cifar10").train.pixels.permute(0, 2, 3, 1).numpy(), data)


@pytest.mark.parametrize("ratio", [1.0, 2.0, 5.0])
def test_a_cut_svhn_has_as_many_labels_as_images(torchvision, tiny, ratio):
    from equiframe.data.prepare import prepare_data

    data = prepare_data(tiny(data="svhn", imbalance=ratio, validation=0.0))
    assert len(data.train.labels) == len(data.train.pixels) == sum(data.train_counts)
    assert data.train_counts[0] == 2  # all there are, not the N/K = 10 that the profile asks for


def test_a_missing_built_in_set_says_how_to_get_it(monkeypatch, tmp_path):
    import torchvision.datasets as datasets

    def missing(*args, **kwargs):
        raise RuntimeError("Dataset not found or corrupted.")

    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets, "CIFAR10", missing)
    with pytest.raises(InputError, match="--download"):
        load_dataset("cifar10", data_root=tmp_path)
    monkeypatch.setattr(datasets, "CIFAR10", unreachable)
    with pytest.raises(InputError, match=r"could not be downloaded.*no route"):
        load_dataset("cifar10", data_root=tmp_path, download=True)


def test_without_the_extra_the_message_says_what_to_install(monkeypatch, tmp_path):
    import sys

    for module, data in (("torchvision", "cifar10"), ("sklearn", "digits")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(InputError, match=r"pip install 'equiframe\[train\]'"):
            load_dataset(data)
    write_parquet(tmp_path / "train.parquet", images_of([0, 1]), [0, 1])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"pip install 'equiframe\[train\]'"):
        load_dataset(str(tmp_path))


# --- what is not there ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("no/such/folder", "no such folder: no/such/folder"),
        ("./nowhere", "no such folder"),
        ("~nobody-has-this-name/x", "no such folder"),
        ("cifar11", r"unknown data set 'cifar11'; did you mean 'cifar10[0]?'\?.*no folder of that name"),
    ],
)
def test_data_that_is_not_there(data, message):
    with pytest.raises(InputError, match=message):
        load_dataset(data)


def test_folders_that_are_none(tmp_path, class_folder):
    (tmp_path / "file.zip").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat").mkdir()
    picture(0, 0).save(tmp_path / "flat" / "a.png")
    gap = class_folder({"cat": 2, "dog": 2}, name="gap")
    (gap / "fox").mkdir()
    for data, message in (
        ("file.zip", "is a file, not a folder"),
        ("empty", "no class folders"),
        ("flat", "no class folders"),
        ("gap", "class folder without images: .*fox"),
        (class_folder({"cat": 2}, name="one").name, "single class"),
    ):
        with pytest.raises(InputError, match=message):
            load_dataset(str(tmp_path / data))


def test_a_split_folder_without_images(class_folder):
    root = class_folder({"cat": 2, "dog": 2}, test={"cat": 1})
    (root / "test" / "cat" / "500.png").unlink()
    with pytest.raises(InputError, match=r"no images in .*test"):
        load_dataset(str(root))


def test_the_fingerprint_tells_data_sets_apart(class_folder):
    one = load_dataset(str(class_folder({"cat": 2, "dog": 2}, name="one"))).fingerprint()
    assert one == load_dataset(str(class_folder({"cat": 2, "dog": 2}, name="two"))).fingerprint()
    for counts in ({"cat": 3, "dog": 2}, {"cat": 2, "fox": 2}):
        assert one != load_dataset(str(class_folder(counts, name=json.dumps(counts)[2:5]))).fingerprint()


def test_an_image_set_is_consistent():
    with pytest.raises(AssertionError, match="as many images as labels"):
        ImageSet(np.zeros(3, np.int64), ["a", "b", "c"], sources=[b"", b""])
