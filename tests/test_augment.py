"""Augmentation by parts: every operation against Pillow image by image, the draws against their tables."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from equiframe.data.augment import augment, cut_out, parse_augmentation, random_box, resize_box
from equiframe.data.images import to_tensor
from equiframe.data.policies import (
    MOVEMENTS,
    OPERATIONS,
    apply_operations,
    auto_augment,
    color_jitter,
    rand_augment,
)
from equiframe.errors import InputError

B = 40


def batch(size, seed=0):
    """Noise, smooth images, and images of few values (which equalize and autocontrast treat apart)."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (B, 3, *size), dtype=np.uint8)
    pixels[10:20] = (pixels[10:20] // 4 + np.linspace(0, 150, size[1])[None, None, None]).astype(np.uint8)
    pixels[20:24] = 77
    pixels[24:28] = (pixels[24:28] > 128) * 50 + 100
    return torch.from_numpy(pixels)


def pillow(image, name, level):
    """The operation as Pillow itself does it."""
    w, h = image.size
    maps = {
        "shear-x": (1, 0.3 * level, 0, 0, 1, 0),
        "shear-y": (1, 0, 0, 0.3 * level, 1, 0),
        "translate-x": (1, 0, -int(150 / 331 * w * level), 0, 1, 0),
        "translate-y": (1, 0, 0, 0, 1, -int(150 / 331 * h * level)),
    }
    if name in maps:
        return image.transform((w, h), Image.Transform.AFFINE, maps[name], Image.Resampling.NEAREST)
    enhance = {"brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast, "color": ImageEnhance.Color,
               "sharpness": ImageEnhance.Sharpness}  # fmt: skip
    if name in enhance:
        return enhance[name](image).enhance(1 + 0.9 * level)
    return {
        "identity": lambda: image,
        "rotate": lambda: image.rotate(30 * level, Image.Resampling.NEAREST),
        "posterize": lambda: ImageOps.posterize(image, 8 - round(4 * abs(level))),
        "solarize": lambda: ImageOps.solarize(image, 255 * (1 - abs(level))),
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "invert": lambda: ImageOps.invert(image),
    }[name]()


@pytest.mark.parametrize("size", [(32, 32), (17, 24)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_pillows(name, size):
    pixels = batch(size)
    levels = np.concatenate([[-1, -0.5, -0.3, -1 / 9, 0, 1 / 9, 0.3, 0.5, 7 / 9, 1], np.linspace(-1, 1, B - 10)])
    before = pixels.clone()
    changed = apply_operations(pixels, np.full((1, B), OPERATIONS.index(name)), levels[None])
    assert torch.equal(pixels, before)
    assert changed.dtype == torch.uint8
    apart = 0 if name in (*MOVEMENTS, "equalize", "posterize", "solarize", "invert", "identity") else 1
    for i in range(B):
        theirs = np.asarray(pillow(Image.fromarray(pixels[i].permute(1, 2, 0).numpy()), name, levels[i])).astype(int)
        difference = np.abs(changed[i].permute(1, 2, 0).numpy() - theirs)
        assert difference.max() <= apart, (i, levels[i])
        assert (difference > 0).mean() < 0.02, (
            i,
            levels[i],
        )  # Pillow's floats may fall the other side of a whole number
    assert name == "identity" or not torch.equal(changed, pixels)


def test_a_batch_of_many_operations_is_each_image_alone():
    pixels = batch((32, 32))
    operations, levels = rand_augment(B, np.random.default_rng(1), num_ops=3)
    together = apply_operations(pixels, operations, levels)
    for i in range(B):
        alone = apply_operations(pixels[i : i + 1], operations[:, i : i + 1], levels[:, i : i + 1])
        assert torch.equal(together[i], alone[0])
    channels_last = apply_operations(pixels.contiguous(memory_format=torch.channels_last), operations, levels)
    assert torch.equal(together, channels_last)


def test_randaugment_draws_fourteen_operations_evenly():
    operations, levels = rand_augment(14_000, np.random.default_rng(0))
    counts = np.bincount(operations.ravel(), minlength=len(OPERATIONS))
    assert counts[OPERATIONS.index("invert")] == 0
    assert np.abs(counts[:-1] - 2000).max() < 5 * 2000**0.5
    assert set(np.abs(levels).ravel()) == {0.3}
    assert abs((levels > 0).mean() - 0.5) < 0.02


def test_autoaugment_against_torchvisions_table():
    from torchvision.transforms import AutoAugment, AutoAugmentPolicy

    rename = {"ShearX": "shear-x", "ShearY": "shear-y", "TranslateX": "translate-x", "TranslateY": "translate-y"}
    table = AutoAugment(AutoAugmentPolicy.CIFAR10).policies
    expected = np.zeros((2, len(OPERATIONS)))
    levels_of: dict[str, set] = {}
    for pair in table:
        for place, (name, probability, magnitude) in enumerate(pair):
            name = rename.get(name, name.lower())
            expected[place, OPERATIONS.index(name)] += probability / 25
            if magnitude is not None and probability:
                levels_of.setdefault(name, set()).add(magnitude)
    expected[:, 0] = 1 - expected.sum(1)
    count = 20_000
    operations, levels = auto_augment(count, np.random.default_rng(0))
    for place in range(2):
        observed = np.bincount(operations[place], minlength=len(OPERATIONS)) / count
        bound = 5 * np.sqrt(expected[place] * (1 - expected[place]) / count)
        assert (np.abs(observed - expected[place]) <= bound + 1e-12).all()
    for name, magnitudes in levels_of.items():
        drawn = np.abs(levels[operations == OPERATIONS.index(name)]) * 9
        assert set(np.round(drawn).astype(int)) == magnitudes
        np.testing.assert_allclose(drawn, np.round(drawn), atol=1e-9)


def test_color_jitter_takes_each_change_once_in_random_order():
    operations, levels = color_jitter(6000, np.random.default_rng(0))
    names = {OPERATIONS.index(name) for name in ("brightness", "contrast", "color")}
    assert {tuple(sorted(o)) for o in operations.T} == {tuple(sorted(names))}
    orders, counts = np.unique(operations, axis=1, return_counts=True)
    assert orders.shape[1] == 6
    assert np.abs(counts - 1000).max() < 5 * 1000**0.5
    factors = 1 + 0.9 * levels
    assert 0.6 <= factors.min() < 0.61
    assert 1.39 < factors.max() <= 1.4


@pytest.mark.parametrize("size", [(32, 32), (9, 14)])
def test_cutout_against_a_loop(size):
    images = torch.randn(200, 3, *size, generator=torch.Generator().manual_seed(0))
    cut = cut_out(images.clone(), np.random.default_rng(4))
    random = np.random.default_rng(4)
    tops, lefts = (random.integers(side, size=(200, 1))[:, 0] - side // 4 for side in size)
    for i in range(200):
        plain = images[i].numpy().copy()
        rows = range(max(tops[i], 0), min(tops[i] + size[0] // 2, size[0]))
        columns = range(max(lefts[i], 0), min(lefts[i] + size[1] // 2, size[1]))
        for y in rows:
            plain[:, y, list(columns)] = 0
        np.testing.assert_array_equal(cut[i].numpy(), plain)
    areas = (cut[:, 0] == 0).sum((1, 2))
    assert int(areas.max()) == (size[0] // 2) * (size[1] // 2)
    assert int(areas.min()) < areas.max() / 2  # boxes at the border are cut off


def test_parts_are_parsed_in_the_order_in_which_they_act():
    assert parse_augmentation("none") == parse_augmentation("auto") == ()
    assert parse_augmentation("cutout + randaugment+crop-flip") == ("crop-flip", "randaugment", "cutout")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crop-flop", "unknown augmentation 'crop-flop'; did you mean 'crop-flip'"),
        ("", "unknown augmentation ''"),
        ("crop+cutout+crop", "names crop twice"),
        ("none+cutout", "none stands alone"),
        ("crop+crop-flip", "both say how images are cut"),
        ("auto+crop", "auto stands alone; name all parts"),
        ("randaugment+autoaugment", "draw from the same operations; take one"),
    ],
)
def test_parts_that_do_not_go_together(text, message):
    with pytest.raises(InputError, match=message):
        parse_augmentation(text)


@pytest.mark.parametrize("text", ["crop-flip+randaugment", "autoaugment", "color-jitter+randaugment+cutout", "cutout"])
def test_augment_is_a_function_of_its_generator(text):
    pixels, parts = batch((16, 16)), parse_augmentation(text)
    one = augment(pixels, parts, np.random.default_rng((1, 2)))
    assert torch.equal(one, augment(pixels, parts, np.random.default_rng((1, 2))))
    assert torch.equal(pixels, batch((16, 16)))
    assert one.dtype == torch.uint8
    if text == "cutout":  # acts on normalised images
        assert one is pixels
    else:
        assert not torch.equal(one, augment(pixels, parts, np.random.default_rng((1, 3))))


def test_random_boxes_have_the_areas_and_aspects_of_inception():
    boxes = [random_box(400, 300, np.random.default_rng(i)) for i in range(400)]
    sides = np.array([(r - x, b - y) for x, y, r, b in boxes])
    assert 0.079 < (sides.prod(1) / 120_000).min() < 0.15
    assert (sides.prod(1) / 120_000).max() > 0.85
    aspects = sides[:, 0] / sides[:, 1]
    assert 0.74 < aspects.min() < 0.8
    assert 1.25 < aspects.max() < 1.35
    assert all(0 <= x < r <= 400 and 0 <= y < b <= 300 for x, y, r, b in boxes)


def test_a_box_of_an_image_decoded_smaller():
    wide = np.zeros((80, 160, 3), np.uint8)
    wide[:, 80:] = 200
    image, half = Image.fromarray(wide), Image.fromarray(wide[::2, ::2])
    for box in ((0, 0, 80, 80), (80, 0, 160, 80), (40, 20, 120, 60)):
        whole, small = (to_tensor(resize_box(x, 20, box, (160, 80))) for x in (image, half))
        assert torch.equal(whole, small)
