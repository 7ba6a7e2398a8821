"""How batches are made: pure functions of (seed, epoch, step), equal to slow loops."""

import numpy as np
import pytest
import torch

from conftest import encoded, picture
from equiframe.data.batches import (
    Loader,
    augment,
    channel_statistics,
    crop_and_flip,
    mix_up,
    normalise,
    random_resized_crop,
)
from equiframe.data.images import fit_square, to_tensor
from equiframe.data.sources import ImageSet, with_pixels
from equiframe.errors import InputError
from equiframe.losses import MixedTargets

CPU = torch.device("cpu")


def pixels_of(count=10, size=(8, 8), seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, *size), dtype=np.uint8))


def resident(count=50):
    return ImageSet(np.arange(count) % 5, [f"{i}" for i in range(count)], pixels_of(count))


def encoded_set(count=50, size=(11, 9)):
    """Images as encoded bytes, not square."""
    sources = [encoded(picture(i % 5, i, size)) for i in range(count)]
    return ImageSet(np.arange(count) % 5, [f"{i}" for i in range(count)], sources=sources)


def loader(images, **options):
    settings = {"batch_size": 8, "image_size": 8, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25], "device": CPU}
    return Loader(images, **settings | options)


def same(one, two):
    assert len(one) == len(two)
    for (a, x), (b, y) in zip(one, two, strict=True):
        assert torch.equal(a, b)
        if isinstance(x, MixedTargets):
            assert torch.equal(x.first, y.first)
            assert torch.equal(x.second, y.second)
            assert x.share == y.share
        else:
            assert torch.equal(x, y)


# --- augmentation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("size", [(8, 8), (6, 9)])
def test_crop_and_flip_equals_a_loop_over_images(size, padding, flip):
    pixels = pixels_of(20, size)
    fast = crop_and_flip(pixels, padding, flip, np.random.default_rng(3))
    random = np.random.default_rng(3)
    shifts = random.integers(0, 2 * padding + 1, size=(2, 20, 1))[..., 0]
    mirrored = random.random(20) < 0.5 if flip else np.zeros(20, bool)
    h, w = size
    for i in range(20):
        canvas = np.zeros((3, h + 2 * padding, w + 2 * padding), np.uint8)
        canvas[:, padding : padding + h, padding : padding + w] = pixels[i].numpy()
        cut = canvas[:, shifts[0, i] : shifts[0, i] + h, shifts[1, i] : shifts[1, i] + w]
        np.testing.assert_array_equal(fast[i].numpy(), cut[:, :, ::-1] if mirrored[i] else cut)
    assert fast.dtype == torch.uint8
    if flip:
        assert 0 < mirrored.sum() < 20


def test_kinds_of_augmentation():
    pixels = pixels_of(64, (16, 16))
    for kind in ("none", "auto"):
        assert augment(pixels, kind, np.random.default_rng(0)) is pixels
    cropped = augment(pixels, "crop", np.random.default_rng(0))
    assert torch.equal(cropped, crop_and_flip(pixels, 2, False, np.random.default_rng(0)))
    both = augment(pixels, "crop-flip", np.random.default_rng(0))
    assert torch.equal(both, crop_and_flip(pixels, 2, True, np.random.default_rng(0)))
    flipped = augment(pixels, "resized-crop-flip", np.random.default_rng(0))
    turned = [i for i in range(64) if torch.equal(flipped[i], pixels[i].flip(2))]
    kept = [i for i in range(64) if torch.equal(flipped[i], pixels[i])]
    assert sorted(turned + kept) == list(range(64))
    assert 20 < len(turned) < 44


def test_mixup_is_exact():
    images, labels = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(16)
    mixed, targets = mix_up(images, labels, 1.0, np.random.default_rng(5))
    random = np.random.default_rng(5)
    share, order = random.beta(1.0, 1.0), random.permutation(16)
    np.testing.assert_allclose(mixed, share * images + (1 - share) * images[order], atol=1e-6)
    first, second, weight = targets
    assert torch.equal(first, labels)
    assert torch.equal(second, labels[order])
    assert weight == share


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_normalise_against_plain_arithmetic(memory_format):
    pixels = pixels_of(5)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.25])
    images = normalise(pixels, mean, std, memory_format)
    plain = (pixels.double().numpy() / 255 - mean.double().numpy()[:, None, None]) / std.double().numpy()[:, None, None]
    np.testing.assert_allclose(images, plain, atol=1e-6)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=memory_format)
    assert pixels.dtype == torch.uint8


def test_channel_statistics_against_numpy():
    pixels = pixels_of(30)
    mean, std = channel_statistics(pixels)
    values = pixels.numpy() / 255
    np.testing.assert_allclose(mean, values.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, values.std((0, 2, 3)), rtol=1e-12)
    mean, std = channel_statistics(torch.full((2, 3, 4, 4), 51, dtype=torch.uint8))
    assert mean == [pytest.approx(0.2)] * 3
    assert std == [1 / 255] * 3  # never 0


# --- the loader -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [resident(), encoded_set()], ids=["resident", "streaming"])
@pytest.mark.parametrize("mixup", [0.0, 1.0])
def test_batches_are_a_function_of_seed_epoch_and_step(images, mixup):
    kind = "crop-flip" if images.pixels is not None else "resized-crop-flip"
    options = {"augmentation": kind, "mixup": mixup, "seed": 7}
    one, two = loader(images, **options), loader(images, **options, workers=4)
    whole = list(one.epoch(3))
    assert len(whole) == one.steps == 6  # 50 images, the last 2 left out
    list(one.epoch(0))  # what was asked before changes nothing
    same(whole, list(two.epoch(3)))
    for start in (0, 2, 5, 6):
        same(whole[start:], list(two.epoch(3, start)))
    for other in (loader(images, **options | {"seed": 8}).epoch(3), two.epoch(4)):
        assert not torch.equal(next(iter(other)).images, whole[0].images)


def test_an_epoch_shows_every_image_at_most_once():
    images = ImageSet(np.arange(50), [f"{i}" for i in range(50)], pixels_of(50))
    seen = torch.cat([targets for _, targets in loader(images).epoch(0)]).tolist()
    assert len(seen) == len(set(seen)) == 48
    left_out = [set(range(50)) - set(torch.cat([t for _, t in loader(images).epoch(e)]).tolist()) for e in range(5)]
    assert len(set.union(*left_out)) > 2


def test_fewer_images_than_a_batch():
    images = resident(5)
    assert loader(images).steps == 1
    assert len(next(loader(images).epoch(0)).targets) == 5


@pytest.mark.parametrize("size", [8, 11])
def test_resident_and_streaming_give_the_same_images_in_order(size):
    streaming = encoded_set()
    resident_set = with_pixels(streaming, size)
    one = list(loader(resident_set, image_size=size).ordered(16))
    two = list(loader(streaming, image_size=size).ordered(16))
    same(one, two)
    assert [len(t) for _, t in one] == [16, 16, 16, 2]
    assert torch.cat([t for _, t in one]).tolist() == streaming.labels.tolist()


def test_pixels_may_stream_too():
    images = ImageSet(np.arange(6), [f"{i}" for i in range(6)], pixels_of(6, (8, 8)))
    assert not loader(images, stream=True).resident
    for size in (8, 12):
        batch = next(loader(images, stream=True, image_size=size).ordered())
        assert batch.images.shape == (6, 3, size, size)
    batches = loader(images, stream=True, augmentation="resized-crop-flip", image_size=12).epoch(0)
    assert next(batches).images.shape == (6, 3, 12, 12)


def test_streamed_training_images_without_resized_crops_are_the_resident_ones():
    streaming = encoded_set()
    options = {"augmentation": "crop-flip", "seed": 2}
    same(list(loader(with_pixels(streaming, 8), **options).epoch(1)), list(loader(streaming, **options).epoch(1)))


def test_random_resized_crop_is_a_part_of_the_image():
    image = picture(0, 0, (40, 30))
    crops = [random_resized_crop(image, 16, np.random.default_rng(i)) for i in range(50)]
    assert {crop.size for crop in crops} == {(16, 16)}
    assert len({crop.tobytes() for crop in crops}) > 40
    low, high = np.asarray(image).min(), np.asarray(image).max()
    assert all(low <= np.asarray(crop).min() and np.asarray(crop).max() <= high for crop in crops)
    strip = picture(0, 0, (400, 2))  # no box of a legal aspect fits: the centre
    assert to_tensor(random_resized_crop(strip, 8, np.random.default_rng(0))).equal(to_tensor(fit_square(strip, 8)))


@pytest.mark.parametrize("method", ["epoch", "ordered"])
def test_a_damaged_image_stops_streaming_and_is_named(method):
    images = encoded_set()
    images.sources[20] = images.sources[20][:60]
    images.names[20] = "pets/cat/020.png"
    argument = {"epoch": 0, "ordered": 8}[method]
    with pytest.raises(InputError, match=r"pets/cat/020\.png"):
        list(getattr(loader(images, batch_size=50), method)(argument))


def test_a_generator_that_is_left_early_stops_its_threads():
    import threading

    before = threading.active_count()
    batches = loader(encoded_set()).epoch(0)
    next(batches)
    batches.close()
    assert threading.active_count() == before


def test_memory_format_reaches_the_batch():
    batch = next(loader(resident(), memory_format=torch.channels_last, augmentation="crop-flip").epoch(0))
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
