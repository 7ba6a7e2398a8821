"""``hf:NAME``, with a small stand-in for the ``datasets`` library."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import encoded, picture
from equiframe.data.sources import load_dataset
from equiframe.errors import InputError


class Image:
    """``datasets.Image``"""

    def __init__(self, decode=True):
        self.decode = decode


class ClassLabel:
    def __init__(self, names):
        self.names = names


class Value:
    pass


class Table:
    """``datasets.Dataset``: columns with features; images come encoded only after ``cast_column(…, Image(decode=False))``."""

    def __init__(self, columns, features):
        self.columns, self.features = columns, features

    def __getitem__(self, name):
        if isinstance(self.features[name], Image):
            assert not self.features[name].decode
        return self.columns[name]

    def cast_column(self, name, feature):
        return Table(self.columns, {**self.features, name: feature})


def table(labels, feature=None, *, image="image", label="label", **more):
    rows = [{"bytes": encoded(picture(0, i)), "path": None} for i in range(len(labels))]
    columns = {"id": list(range(len(labels))), image: rows, label: labels, **{k: labels for k in more}}
    return Table(columns, {"id": Value(), image: Image(), label: feature or Value(), **more})


@pytest.fixture
def hub(monkeypatch):
    """``hub(train=table(…), …)`` puts a library in place that knows the data set ``zoo/pets``."""

    def make(**splits):
        def load(name, config=None):
            print("Downloading")
            if name != "zoo/pets":
                raise FileNotFoundError(f"Couldn't find {name}")
            make.config = config
            return splits

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load, Image=Image))

    return make


def test_a_data_set_of_the_hub(hub, capsys):
    names = ClassLabel(["cat", "dog"])
    hub(
        train=table([0, 1, 1], names),
        validation=table([1], names),
        test=table([-1, -1], names),
        extra=table([0], names),
    )
    dataset = load_dataset("hf:zoo/pets")
    assert capsys.readouterr().out == ""  # stdout is for results
    assert (dataset.name, dataset.class_names) == ("pets", ["cat", "dog"])
    assert dataset.train.labels.tolist() == [0, 1, 1]
    assert dataset.train.names == ["train-0", "train-1", "train-2"]
    assert dataset.val.labels.tolist() == [1]
    assert dataset.test is None
    assert dataset.notes == ["split 'extra' is not used", "split 'test' is not used: its labels are hidden"]
    np.testing.assert_array_equal(np.asarray(dataset.train.image(2)), np.asarray(picture(0, 2)))
    load_dataset("hf:zoo/pets:small")
    assert hub.config == "small"


def test_columns_by_type_and_name(hub):
    fine, coarse = ClassLabel(["a", "b", "c"]), ClassLabel(["x"])
    hub(train=table([2, 0, 1], fine, image="img", label="fine_label", coarse_label=coarse))
    assert load_dataset("hf:zoo/pets").class_names == ["a", "b", "c"]
    hub(train=table([0, 1], ClassLabel(["a", "b"]), image="photo", label="animal"))
    assert load_dataset("hf:zoo/pets").train.labels.tolist() == [0, 1]
    hub(train=table([0, 1], ClassLabel(["a", "b"]), label="animal", kind=ClassLabel(["y"])))
    with pytest.raises(InputError, match=r"cannot tell the ClassLabel column .*animal \(ClassLabel\), kind \(ClassL"):
        load_dataset("hf:zoo/pets")
    hub(train=table([0, 1], label="animal"))
    with pytest.raises(InputError, match=r"cannot tell the ClassLabel column .*expected one called 'label'"):
        load_dataset("hf:zoo/pets")


def test_labels_without_class_names(hub):
    hub(train=table([0, 2, 1]), test=table([1]))
    assert load_dataset("hf:zoo/pets").class_names == ["0", "1", "2"]
    hub(train=table(["dog", "cat", "dog"]), test=table(["cat"]))
    dataset = load_dataset("hf:zoo/pets")
    assert (dataset.class_names, dataset.train.labels.tolist()) == (["cat", "dog"], [1, 0, 1])
    assert dataset.test.labels.tolist() == [0]


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"test": table([0, 1])}, "hf:zoo/pets has no train split .it has test"),
        ({"train": table(["dog", "cat"]), "test": table(["fox"])}, "split 'test': class 'fox' is not among"),
        ({"train": table([0, None])}, "split 'train', row 1: the label must be a whole number or text, got None"),
        ({"train": table([0, 10**9])}, "label 1000000000, but only 2 images"),
        ({"train": table([0, 3], ClassLabel(["a", "b"]))}, r"label 3 .* is outside 0\.\.1"),
        ({"train": table([])}, "no images in pets"),
    ],
)
def test_data_sets_that_do_not_fit(hub, splits, message):
    hub(**splits)
    with pytest.raises(InputError, match=message):
        load_dataset("hf:zoo/pets")


def test_rows_without_an_image(hub):
    train = table([0, 1])
    train.columns["image"][1] = {"bytes": None, "path": None}
    hub(train=train)
    with pytest.raises(InputError, match="split 'train', row 1 has no image"):
        load_dataset("hf:zoo/pets")


def test_names_that_cannot_be_loaded(hub, monkeypatch):
    hub(train=table([0, 1]))
    with pytest.raises(
        InputError, match="hf:zoo/other could not be loaded: FileNotFoundError: Couldn't find zoo/other"
    ):
        load_dataset("hf:zoo/other")
    with pytest.raises(InputError, match="lacks the NAME"):
        load_dataset("hf:")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"hf:zoo/pets needs the library datasets: pip install 'equiframe\[hub\]'"):
        load_dataset("hf:zoo/pets")
