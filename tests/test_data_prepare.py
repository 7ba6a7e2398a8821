"""From a recipe's data fields to the images of a run."""

import json

import numpy as np
import pytest
import torch

from conftest import REAL_DATA, write_parquet
from equiframe.data.prepare import indices_hash, prepare_data
from equiframe.data.sources import load_dataset
from equiframe.errors import InputError
from equiframe.imbalance import class_profile


def names_of(images):
    return set(images.names)


# --- the validation split ---------------------------------------------------------------------------------------------


def test_a_stratified_validation_split_where_none_is_given(tiny, class_folder):
    data = prepare_data(tiny(data=str(class_folder({"a": 40, "b": 20, "c": 5, "d": 2})), validation=0.2))
    assert data.val.counts(4).tolist() == [8, 4, 1, 1]
    assert data.train_counts == [32, 16, 4, 1]
    assert not names_of(data.train) & names_of(data.val)
    assert data.test is data.val
    assert data.test_is == "validation"
    assert any("no test split" in note for note in data.notes)


def test_a_class_with_a_single_image_stays_in_training_and_the_run_says_so(tiny, class_folder):
    data = prepare_data(tiny(data=str(class_folder({"ant": 10, "bee": 1, "cow": 1})), validation=0.3))
    assert data.train_counts == [7, 1, 1]
    assert data.val.counts(3).tolist() == [3, 0, 0]
    [note] = [note for note in data.notes if "single image" in note]
    assert note.startswith("2 classes")
    assert "bee, cow" in note


def test_a_given_validation_split_is_used_as_it_is(tiny, class_folder):
    counts = {"a": 6, "b": 6}
    data = prepare_data(tiny(data=str(class_folder(counts, val={"a": 2, "b": 1}, test=counts)), validation=0.5))
    assert data.train_counts == [6, 6]
    assert len(data.val) == 3
    assert data.test_is == "test"
    assert data.manifest["val"] is None


def test_without_validation(tiny, class_folder):
    counts = {"a": 6, "b": 6}
    data = prepare_data(tiny(data=str(class_folder(counts, test=counts)), validation=0.0))
    assert data.val is None
    assert data.train_counts == [6, 6]
    with pytest.raises(InputError, match="no test split, so validation must not be 0"):
        prepare_data(tiny(data=str(class_folder(counts, name="whole")), validation=0.0))


def test_too_small_for_a_validation_split(tiny, class_folder):
    with pytest.raises(InputError, match="too small for a validation split"):
        prepare_data(tiny(data=str(class_folder({"a": 1, "b": 1}))))


def test_the_split_depends_on_the_subset_seed_alone(tiny):
    one, two = prepare_data(tiny(seed=0)), prepare_data(tiny(seed=5))
    assert one.manifest == two.manifest
    assert one.manifest["hash"] != prepare_data(tiny(subset_seed=1)).manifest["hash"]


# --- the cut to a long tail -------------------------------------------------------------------------------------------


def test_the_common_long_tail_of_cifar10(tiny, cifar10):
    recipe = tiny(data=str(cifar10), imbalance=100, validation=0.0, data_mode="stream")
    data = prepare_data(recipe)
    assert len(data.train) == 12_406
    assert data.train_counts == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert len(data.test) == 10_000
    assert data.manifest["train"] == prepare_data(recipe.with_(seed=3)).manifest["train"]


def test_given_class_counts(tiny):
    data = prepare_data(tiny(class_counts=(50, 40, 30, 20, 10, 9, 8, 7, 6, 5), validation=0.0))
    assert data.train_counts == [50, 40, 30, 20, 10, 9, 8, 7, 6, 5]
    with pytest.raises(InputError, match="not both"):
        tiny(class_counts=(5,) * 10, imbalance=10)
    with pytest.raises(InputError, match="3 class counts were given for 10 classes"):
        prepare_data(tiny(class_counts=(5, 5, 5)))


def test_a_natural_long_tail_is_used_as_it_is(tiny, long_tailed):
    data = prepare_data(tiny(data=str(long_tailed), validation=0.0, data_mode="stream"))
    assert data.train_counts == load_dataset(str(long_tailed)).train.counts(data.num_classes).tolist()
    assert data.image_size == 64


def test_the_long_tail_that_came_with_the_data(tiny, long_tailed):
    num_classes, largest, ratio = (200, 500, 100) if long_tailed.parent == REAL_DATA else (20, 100, 20)
    data = prepare_data(tiny(data=str(long_tailed), validation=0.0, data_mode="stream"))
    assert data.num_classes == num_classes
    assert data.train_counts == class_profile(num_classes, largest, ratio)
    assert len(set(data.test.counts(num_classes).tolist())) == 1


@pytest.mark.parametrize("ratio", [10, 50, 100])
def test_a_hundred_balanced_classes_cut_to_a_ratio(tiny, balanced_100, ratio):
    data = prepare_data(tiny(data=str(balanced_100), imbalance=ratio, validation=0.0, data_mode="stream"))
    assert data.train_counts == class_profile(100, 500, ratio)
    assert (max(data.train_counts), min(data.train_counts)) == (500, 500 // ratio)
    assert data.test.counts(100).tolist() == [50] * 100
    assert len(names_of(data.train)) == sum(data.train_counts)


def test_a_named_class_without_training_image(tiny, tmp_path, class_folder):
    content = [(class_folder({"a": 1}) / "a" / "000.png").read_bytes()] * 4
    write_parquet(tmp_path / "q" / "train.parquet", content, [0, 0, 2, 2], ["ant", "bee", "cow"])
    with pytest.raises(InputError, match="class 'bee' has no training image"):
        prepare_data(tiny(data=str(tmp_path / "q")))


# --- memory or stream -------------------------------------------------------------------------------------------------


def test_the_data_mode_is_chosen_by_size_visible_and_can_be_overruled(tiny, class_folder):
    small = str(class_folder({"a": 4, "b": 4}))
    large = str(class_folder({"a": 2, "b": 2}, name="large", size=(200, 210)))
    for data, asked, size, mode, augmentation in (
        (small, "auto", 12, "resident", "crop-flip"),
        (small, "stream", 12, "stream", "resized-crop-flip"),
        (large, "auto", 224, "stream", "resized-crop-flip"),
        (large, "resident", 224, "resident", "crop-flip"),
        ("digits", "auto", 8, "resident", "crop"),
    ):
        prepared = prepare_data(tiny(data=data, data_mode=asked, validation=0.5))
        assert (prepared.image_size, prepared.data_mode) == (size, mode)
        assert prepared.augmentation == augmentation
        assert (prepared.train.pixels is not None) == (mode == "resident")
        assert f"{size}x{size}, {mode}" in prepared.notes[-1]
        assert prepared.notes[-1].endswith(f"augmentation {augmentation}")


def test_a_limit_on_memory(tiny, class_folder, monkeypatch):
    monkeypatch.setattr("equiframe.data.prepare.RESIDENT_LIMIT", 8 * 3 * 12 * 12)
    assert prepare_data(tiny(data=str(class_folder({"a": 4, "b": 4})), validation=0.5)).data_mode == "resident"
    assert prepare_data(tiny(data=str(class_folder({"a": 5, "b": 4}, name="b")), validation=0.5)).data_mode == "stream"


def test_resized_crops_need_streaming(tiny):
    with pytest.raises(InputError, match="needs data_mode stream"):
        prepare_data(tiny(augmentation="resized-crop-flip"))


def test_image_size_and_channel_statistics(tiny):
    data = prepare_data(tiny(image_size=16))
    assert data.train.pixels.shape[1:] == (3, 16, 16)
    values = data.train.pixels.double().numpy() / 255
    np.testing.assert_allclose(data.mean, values.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(data.std, values.std((0, 2, 3)), rtol=1e-9)


def test_every_image_is_decoded_once(tiny, class_folder):
    said = []
    data = prepare_data(tiny(data=str(class_folder({"a": 4, "b": 4})), validation=0.5), said.append)
    assert said[:2] == ["decoding 4 train images", "decoding 4 val images"]  # test is val
    assert said[2:] == [*data.notes, "data: pets, 4 train / 4 validation / no test images, 2 classes of 2 to 2"]
    assert data.test.pixels is data.val.pixels
    said.clear()
    prepare_data(tiny(), said.append)
    assert not any(line.startswith("decoding") for line in said)


# --- split.json -------------------------------------------------------------------------------------------------------


@pytest.fixture
def manifest(tiny, tmp_path):
    data = prepare_data(tiny(imbalance=20, subset_seed=4))
    path = tmp_path / "split.json"
    path.write_text(json.dumps(data.manifest))
    return data, path


def test_the_exact_images_of_an_earlier_run(tiny, manifest):
    data, path = manifest
    again = prepare_data(tiny(split=str(path)))
    assert again.train.names == data.train.names
    assert again.val.names == data.val.names
    assert torch.equal(again.train.pixels, data.train.pixels)
    assert again.manifest == data.manifest


def test_the_manifest_says_what_was_taken(manifest):
    data, _ = manifest
    content = data.manifest
    assert content["hash"] == indices_hash(np.array(content["train"]), np.array(content["val"]))
    assert content["train_counts"] == data.train_counts
    assert content["class_names"] == data.class_names
    assert content["fingerprint"] == load_dataset("digits").fingerprint()
    assert not set(content["train"]) & set(content["val"])


def test_a_changed_split_and_other_data_are_refused(tiny, manifest, class_folder):
    _data, path = manifest
    content = json.loads(path.read_text())
    with pytest.raises(InputError, match="belongs to other data"):
        prepare_data(tiny(data=str(class_folder({"a": 9, "b": 9})), split=str(path)))
    for change, message in (
        ({"train": content["train"][1:]}, "indices do not match its hash"),
        ({"val": None}, "indices do not match its hash"),
        ({"fingerprint": "0"}, "belongs to other data"),
        ({"train": "abc"}, "is not a split manifest"),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(InputError, match=message):
            prepare_data(tiny(split=str(path)))
    for text in ("[]", "{}", "{", "\x00"):
        path.write_text(text)
        with pytest.raises(InputError, match="is not a split manifest"):
            prepare_data(tiny(split=str(path)))
    with pytest.raises(InputError, match="cannot read split"):
        prepare_data(tiny(split=str(path.parent / "none.json")))


def test_real_data_is_used_where_it_lies(cifar10, long_tailed):
    assert (cifar10.parent == REAL_DATA) == (REAL_DATA / "cifar10").is_dir()
    assert (long_tailed.parent == REAL_DATA) == (REAL_DATA / "tiny-imagenet-lt100").is_dir()
