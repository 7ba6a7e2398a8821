"""How batches are made: pure functions of (seed, epoch, step), equal to slow loops."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import encoded, picture
from equiframe.data.augment import augment, crop_and_flip, cut_out, parse_augmentation, random_resized_crop
from equiframe.data.batches import Loader, channel_statistics, normalise
from equiframe.data.images import decode_image, fit_square, to_tensor, upright_size
from equiframe.data.mixing import cut_mix, mix, mix_up, remix
from equiframe.data.sources import ImageSet, with_pixels
from equiframe.errors import InputError
from equiframe.losses import MixedTargets
from equiframe.samplers import epoch_order

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
            assert torch.equal(torch.as_tensor(x.share), torch.as_tensor(y.share))
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
    assert augment(pixels, (), np.random.default_rng(0)) is pixels
    cropped = augment(pixels, ("crop",), np.random.default_rng(0))
    assert torch.equal(cropped, crop_and_flip(pixels, 2, False, np.random.default_rng(0)))
    both = augment(pixels, ("crop-flip",), np.random.default_rng(0))
    assert torch.equal(both, crop_and_flip(pixels, 2, True, np.random.default_rng(0)))
    flipped = augment(pixels, ("resized-crop-flip",), np.random.default_rng(0))
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
@pytest.mark.parametrize("size", [(8, 8), (5, 9)])
def test_cutmix_against_a_loop(size, memory_format):
    h, w = size
    images = torch.randn(16, 3, h, w, generator=torch.Generator().manual_seed(0)).contiguous(
        memory_format=memory_format
    )
    before, labels, shares = images.clone(), torch.arange(16), []
    for seed in range(40):
        mixed, targets = cut_mix(images, labels, 1.0, np.random.default_rng(seed))
        random = np.random.default_rng(seed)
        side, order = (1 - random.beta(1.0, 1.0)) ** 0.5, random.permutation(16)
        y, x = random.integers(h) - int(h * side) // 2, random.integers(w) - int(w * side) // 2
        expected, from_second = before.numpy().copy(), 0
        for row in range(max(y, 0), min(y + int(h * side), h)):
            for column in range(max(x, 0), min(x + int(w * side), w)):
                expected[:, :, row, column] = before.numpy()[order, :, row, column]
                from_second += 1
        np.testing.assert_array_equal(mixed, expected)
        assert torch.equal(targets.first, labels)
        assert torch.equal(targets.second, labels[order])
        assert targets.share == pytest.approx(1 - from_second / (h * w), abs=1e-12)
        assert mixed.is_contiguous(memory_format=memory_format)
        shares.append(targets.share)
    assert torch.equal(images, before)
    assert min(shares) < 0.4
    assert max(shares) == 1.0 or max(shares) > 0.9


def test_remix_against_a_loop():
    counts = torch.tensor([100, 40, 33, 5, 100])
    first, second = torch.arange(5).repeat_interleave(5), torch.arange(5).repeat(5)
    for share in (0.0, 0.2, 0.49, 0.5, 0.51, 0.9, 1.0):
        targets = remix(MixedTargets(first, second, share), counts)
        for i, (a, b) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
            ratio, expected = counts[a].item() / counts[b].item(), share
            if ratio >= 3 and share < 0.5:
                expected = 0.0
            elif ratio <= 1 / 3 and 1 - share < 0.5:
                expected = 1.0
            assert targets.share[i].item() == pytest.approx(expected, abs=1e-7), (a, b, share)
        assert targets.share.shape == (25,)


def test_mixup_and_cutmix_take_turns():
    images, labels = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(8)
    alone = mix(images, labels, np.random.default_rng(0))
    assert alone[0] is images
    assert alone[1] is labels
    pasted = []
    for seed in range(200):
        random = np.random.default_rng(seed)
        box = random.random() < 0.5
        expected = (cut_mix if box else mix_up)(images, labels, 0.7 if box else 0.4, random)
        mixed, targets = mix(images, labels, np.random.default_rng(seed), mixup=0.4, cutmix=0.7)
        assert torch.equal(mixed, expected[0])
        assert targets.share == expected[1].share
        pasted.append(box)
    assert 70 < sum(pasted) < 130
    only = mix(images, labels, np.random.default_rng(3), cutmix=0.7)  # one alone draws nothing for the choice
    assert torch.equal(only[0], cut_mix(images, labels, 0.7, np.random.default_rng(3))[0])


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


# --- samplers, mixing, policies and large images ----------------------------------------------------------------------

GOLDEN = {  # of the code before samplers, policies and cutmix came: with default fields nothing may move
    ("resident", "crop-flip"): "ffaf5be46231d179c14a8ca1ce75a0b36a3b0401062ca272a9809da1ea43dcb7",
    ("resident", "crop"): "7e301dc36a14f611961a8eeb421fc108329020324cb9b3fd0a9e55dff42c8be2",
    ("streamed", "resized-crop-flip"): "b3873fec3dd97d10730579f1271bae084b9419d355205bb8813611b7b9856f21",
    ("streamed", "crop-flip"): "d58af45b699958b24cb0548f3654e236148dc676c40308fb67f618055708c354",
}


@pytest.mark.parametrize("case", GOLDEN, ids="-".join)
def test_batches_are_bit_identical_to_those_of_the_first_release(case):
    """Order, crops, flips and normalised floats without mixup; with it, partners and λ (its floats have a twin above)."""
    where, augmentation = case
    images = resident() if where == "resident" else encoded_set(size=(11, 9))
    digest = hashlib.sha256()
    for mixup in (0.0, 1.0):
        batches = loader(images, augmentation=augmentation, mixup=mixup, seed=7)
        for epoch in (0, 3):
            for pixels, targets in batches.epoch(epoch, 1):
                if mixup:
                    digest.update(repr((targets.first.tolist(), targets.second.tolist(), targets.share)).encode())
                else:
                    digest.update(pixels.numpy().tobytes() + repr(targets.tolist()).encode())
    assert digest.hexdigest() == GOLDEN[case]


@pytest.mark.parametrize("images", [resident(), encoded_set()], ids=["resident", "streaming"])
@pytest.mark.parametrize(
    "options",
    [
        {"augmentation": "crop-flip+randaugment+cutout", "cutmix": 1.0},
        {"augmentation": "autoaugment", "mixup": 0.4, "cutmix": 0.7, "sampler": "class-balanced"},
        {"augmentation": "color-jitter", "mixup": 1.0, "remix": True, "sampler": "progressive", "epochs": 9},
    ],
    ids=["randaugment", "autoaugment", "jitter"],
)
def test_every_option_can_be_continued_at_any_step(images, options):
    whole = list(loader(images, seed=7, **options).epoch(3))
    for start in (0, 2, 5):
        same(whole[start:], list(loader(images, seed=7, workers=4, **options).epoch(3, start)))
    other = next(iter(loader(images, seed=8, **options).epoch(3)))
    assert not torch.equal(other.images, whole[0].images)


def test_parts_act_in_order_and_cutout_leaves_the_mean_colour():
    images = resident()
    options = {"augmentation": "cutout+randaugment+crop-flip", "seed": 1}
    batch = next(loader(images, **options).epoch(2))
    order, random = np.random.default_rng((1, 2)).permutation(50)[:8], np.random.default_rng((1, 2, 1))
    parts = parse_augmentation(options["augmentation"])
    pixels = augment(images.pixels[torch.from_numpy(order)], parts, random)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.25])
    expected = cut_out(normalise(pixels, mean, std, torch.contiguous_format), random)
    assert torch.equal(batch.images, expected)
    assert ((expected == 0).all(1).sum((1, 2)) >= 4).all()  # the least quarter of a box of 4 × 4


def test_a_sampler_changes_the_classes_of_an_epoch():
    labels = np.repeat([0, 1], [380, 20])
    images = ImageSet(labels, [f"{i}" for i in range(400)], pixels_of(400))

    def small_class(**options):
        return sum(int(targets.sum()) for _, targets in loader(images, **options).epoch(4)) / 400

    assert small_class() == 0.05
    assert 0.4 < small_class(sampler="class-balanced") < 0.6
    assert 0.4 < small_class(sampler="progressive", epochs=5) < 0.6
    assert small_class(sampler="progressive", epochs=400) < 0.1


def test_remix_knows_the_counts_of_the_training_images():
    images = ImageSet(np.repeat([0, 1], [40, 10]), [f"{i}" for i in range(50)], pixels_of(50))
    plain = list(loader(images, mixup=1.0, batch_size=25).epoch(0))
    changed = list(loader(images, mixup=1.0, remix=True, batch_size=25).epoch(0))
    for (x, before), (y, after) in zip(plain, changed, strict=True):
        assert torch.equal(x, y)
        majority_first = (before.first == 0) & (before.second == 1)
        expected = 0.0 if before.share < 0.5 else before.share
        assert majority_first.any()
        torch.testing.assert_close(after.share[majority_first], torch.full((int(majority_first.sum()),), expected))


def test_mixing_ends_where_it_should():
    """0.7 of two epochs of 5 batches: the first seven are those that mix throughout, the rest those that never do."""
    images = ImageSet(np.repeat([0, 1], [40, 10]), [f"{i}" for i in range(50)], pixels_of(50))

    def batches(**options):
        made = loader(images, batch_size=10, epochs=2, **options)
        return [*made.epoch(0), *made.epoch(1)]

    ended, throughout, never = batches(mixup=1.0, mix_until=0.7), batches(mixup=1.0), batches()
    for i, (x, targets) in enumerate(ended):
        assert torch.equal(x, (throughout if i < 7 else never)[i].images), i
        assert isinstance(targets, MixedTargets) == (i < 7), i
    assert not torch.equal(throughout[8].images, never[8].images)
    resumed = loader(images, batch_size=10, epochs=2, mixup=1.0, mix_until=0.7).epoch(1, 1)
    assert all(torch.equal(x, ended[6 + i].images) for i, (x, _) in enumerate(resumed))


def test_centre_crop_is_the_usual_view_of_large_images():
    image = picture(0, 0, (50, 40))
    seen = fit_square(image, 28, 0.875)
    resized = image.resize((40, 32), Image.Resampling.BICUBIC).crop((6, 2, 34, 30))
    assert seen.tobytes() == resized.tobytes()
    images = ImageSet(np.zeros(1, int), ["a"], sources=[encoded(image)])
    batch = next(loader(images, image_size=28, centre_crop=0.875, mean=[0.0] * 3, std=[1.0] * 3).ordered())
    torch.testing.assert_close(batch.images[0] * 255, to_tensor(resized).float())


def photograph(size):
    """Smooth, as a photograph is at the scale of its pixels."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize(size)


def test_draft_decodes_large_jpegs_smaller_and_sees_nearly_the_same():
    sources = [encoded(photograph((400, 300)), "JPEG", quality=95), encoded(photograph((400, 300)))]
    images = ImageSet(np.zeros(2, int), ["jpeg", "png"], sources=sources)
    options = {"image_size": 16, "augmentation": "resized-crop-flip", "mean": [0.0] * 3, "std": [1 / 255] * 3}
    for epoch in range(5):
        (full, _), (draft, _) = (next(loader(images, draft=d, **options).epoch(epoch)) for d in (False, True))
        order = epoch_order(images.labels, seed=0, epoch=epoch)
        jpeg, png = np.flatnonzero(order == 0)[0], np.flatnonzero(order == 1)[0]
        assert torch.equal(full[png], draft[png])
        assert 0 < (full[jpeg] - draft[jpeg]).abs().mean() < 2.5
    assert decode_image(sources[0], reduce=4).size == (100, 75)
    assert decode_image(sources[1], reduce=4).size == (400, 300)


def test_upright_size_follows_the_camera():
    for orientation, size in ((1, (30, 20)), (6, (20, 30)), (3, (30, 20))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = encoded(picture(0, 0, (30, 20)), "JPEG", exif=exif)
        assert upright_size(content) == decode_image(content).size == size
