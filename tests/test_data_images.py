"""Decoding: every kind of image file becomes the RGB picture that a person sees."""

import contextlib
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import encoded
from equiframe.data.images import EXTENSIONS, decode_all, decode_image, fit_square, image_sizes, to_tensor
from equiframe.errors import InputError

RANDOM = np.random.default_rng(0)
COLOURS = RANDOM.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GRAY = RANDOM.integers(0, 256, (5, 7), dtype=np.uint8)
ALPHA = RANDOM.integers(0, 256, (5, 7), dtype=np.uint8)
PALETTE = RANDOM.integers(0, 256, (4, 3), dtype=np.uint8)
INDICES = RANDOM.integers(0, 4, (5, 7), dtype=np.uint8)


def three(gray):
    return np.repeat(gray[..., None], 3, axis=2)


def over_white(colours, alpha):
    share = alpha[..., None] / 255
    return colours * share + 255 * (1 - share)


def palette_image():
    image = Image.frombytes("P", (7, 5), INDICES.tobytes())
    image.putpalette(PALETTE.tobytes())
    return image


def deep_pgm():
    """Portable graymap with 16 bits a pixel, which PIL opens in its 32-bit mode I."""
    return b"P5 7 5 65535\n" + (GRAY.astype(">u2") * 256 + 77).astype(">u2").tobytes()


HALF = np.where(INDICES == 1, 128, 255).astype(np.uint8)  # palette entry 1 half transparent
CMYK = RANDOM.integers(0, 256, (5, 7, 4), dtype=np.uint8)
KINDS = {
    "RGB": (encoded(Image.fromarray(COLOURS)), COLOURS),
    "BMP": (encoded(Image.fromarray(COLOURS), "BMP"), COLOURS),
    "gray": (encoded(Image.fromarray(GRAY)), three(GRAY)),
    "16-bit gray": (encoded(Image.fromarray(GRAY.astype(np.uint16) * 256 + 200)), three(GRAY)),
    "16-bit gray TIFF": (encoded(Image.fromarray(GRAY.astype(np.uint16) * 256 + 200), "TIFF"), three(GRAY)),
    "16-bit PGM": (deep_pgm(), three(GRAY)),
    "1-bit": (encoded(Image.fromarray(GRAY > 99)), three(np.where(GRAY > 99, 255, 0))),
    "palette": (encoded(palette_image()), PALETTE[INDICES]),
    "palette GIF": (encoded(palette_image(), "GIF"), PALETTE[INDICES]),
    "palette, one entry transparent": (
        encoded(palette_image(), transparency=2),
        np.where((INDICES == 2)[..., None], 255, PALETTE[INDICES]),
    ),
    "palette, one entry half transparent": (
        encoded(palette_image(), transparency=bytes([255, 128, 255, 255])),
        over_white(PALETTE[INDICES], HALF),
    ),
    "RGBA": (encoded(Image.fromarray(np.dstack([COLOURS, ALPHA]))), over_white(COLOURS, ALPHA)),
    "RGB with a transparent colour": (
        encoded(Image.fromarray(PALETTE[INDICES]), transparency=tuple(map(int, PALETTE[3]))),
        np.where((INDICES == 3)[..., None], 255, PALETTE[INDICES]),
    ),
    "gray with alpha": (encoded(Image.fromarray(np.dstack([GRAY, ALPHA]))), over_white(three(GRAY), ALPHA)),
    "CMYK": (
        encoded(Image.frombytes("CMYK", (7, 5), CMYK.tobytes()), "TIFF"),
        (255 - CMYK[..., :3].astype(float)) * (255 - CMYK[..., 3:].astype(float)) / 255,
    ),
    "lossless WebP": (encoded(Image.fromarray(COLOURS), "WEBP", lossless=True), COLOURS),
    "animation": (
        encoded(Image.fromarray(COLOURS), "PNG", save_all=True, append_images=[Image.new("RGB", (7, 5), "red")]),
        COLOURS,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_becomes_rgb(kind, tmp_path):
    content, expected = KINDS[kind]
    from_bytes = decode_image(content)
    assert from_bytes.mode == "RGB"
    assert from_bytes.size == (7, 5)
    np.testing.assert_allclose(np.asarray(from_bytes).astype(float), expected, atol=1)  # a rounding of alpha or ink
    path = tmp_path / "image.bin"  # the content decides, not the name
    path.write_bytes(content)
    np.testing.assert_array_equal(np.asarray(decode_image(path)), np.asarray(from_bytes))


def test_lossless_kinds_are_exact():
    for kind in ("RGB", "BMP", "gray", "16-bit gray", "1-bit", "palette", "palette GIF", "lossless WebP"):
        content, expected = KINDS[kind]
        np.testing.assert_array_equal(np.asarray(decode_image(content)), expected, err_msg=kind)


TURNED = {  # EXIF orientation → the picture as it is meant to be seen
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", TURNED)
def test_exif_rotation_pixel_by_pixel(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(COLOURS), exif=exif)
    np.testing.assert_array_equal(np.asarray(decode_image(content)), TURNED[orientation](COLOURS))


def test_exif_rotation_of_a_photograph():
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:, :16] = 255  # left half white: after a turn clockwise, the upper half
    seen = np.asarray(decode_image(encoded(Image.fromarray(stored), "JPEG", exif=exif, quality=95)))
    assert seen.shape == (32, 16, 3)
    assert seen[:14].min() > 240
    assert seen[18:].max() < 15


def test_fit_square_cuts_the_centre():
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 2:6] = 200
    assert np.asarray(fit_square(Image.fromarray(wide), 4)).min() == 200
    image = Image.fromarray(COLOURS[:5, :5])
    assert fit_square(image, 5) is image


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (33, 32), (2, 3), (500, 499)])
def test_fit_square_of_any_size(size):
    assert fit_square(Image.new("RGB", size, (9, 80, 200)), 32).size == (32, 32)
    assert np.asarray(fit_square(Image.new("RGB", size, (9, 80, 200)), 32))[5, 5].tolist() == [9, 80, 200]


def test_to_tensor_keeps_every_pixel():
    tensor = to_tensor(Image.fromarray(COLOURS))
    assert tensor.dtype == torch.uint8
    np.testing.assert_array_equal(tensor.numpy(), COLOURS.transpose(2, 0, 1))


def test_many_threads_keep_the_order_and_the_warning_filters():
    images = [np.full((8, 8, 3), i, np.uint8) for i in range(40)]
    before = list(warnings.filters)
    pixels = decode_all([encoded(Image.fromarray(x)) for x in images], [f"{i}" for i in range(40)], 8, workers=4)
    assert pixels[:, 0, 0, 0].tolist() == list(range(40))
    assert warnings.filters == before


def truncated():
    noise = Image.fromarray(RANDOM.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    return [encoded(noise, kind)[:800] for kind in ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")]


@pytest.mark.parametrize("content", [b"", b"just text", b"\x89PNG\r\n\x1a\n", *truncated()])
def test_a_damaged_image_is_named(content, tmp_path):
    with pytest.raises(InputError, match=r"pets/cat\.png"):
        decode_image(content, name="pets/cat.png")
    (tmp_path / "cat.png").write_bytes(content)
    with pytest.raises(InputError, match=r"cat\.png"):
        decode_image(tmp_path / "cat.png")


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(InputError, match=r"not found.*nowhere\.png"):
        decode_image(tmp_path / "nowhere.png")


def test_random_damage_never_escapes_as_another_error():
    random = np.random.default_rng(1)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        content = np.frombuffer(encoded(Image.fromarray(COLOURS), kind), np.uint8)
        for _ in range(60):
            damaged = content.copy()
            where = random.integers(0, len(damaged), 3)
            damaged[where] = random.integers(0, 256, 3)
            with contextlib.suppress(InputError):
                decode_image(damaged.tobytes())


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(InputError, match="too many pixels"):
        decode_image(KINDS["RGB"][0], name="bomb.png")
    with pytest.raises(InputError, match="too many pixels"):
        image_sizes([KINDS["RGB"][0]], ["bomb.png"])


def test_image_sizes_reads_a_sample_of_headers():
    sources = [encoded(Image.new("RGB", (10 + i, 20))) for i in range(200)]
    sizes = image_sizes(sources, [str(i) for i in range(200)])
    assert sizes[0] == (10, 20)
    assert 64 <= len(sizes) <= 128


def test_extensions_are_what_pil_reads():
    Image.init()
    known = {ext for ext, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    assert set(EXTENSIONS) <= known


def test_one_decoding_thread_for_each_core(monkeypatch):
    from equiframe.data import images

    monkeypatch.setattr(images.os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert images.decoding_threads(None) == 3
    assert images.decoding_threads(7) == 7
