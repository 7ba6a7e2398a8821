"""Augmentation of training images: what the names mean, and what acts on a whole batch.

An augmentation is a list of parts joined by ``+``, as ``crop-flip+randaugment+cutout``. In the order in which they act,
whatever order they are written in:

``crop``, ``crop-flip``   shift by up to an eighth of the side (4 pixels of 32, zeros come in); mirror half the images
``resized-crop-flip``     a random box, resized (Inception's crop), while decoding; mirror half the images
``color-jitter``          brightness, contrast and colour by factors of 0.6–1.4, in random order
``randaugment``           two of 14 operations, magnitude 9 of 30
``autoaugment``           the pairs of operations that were learned for CIFAR-10
``cutout``                a square of half the side becomes the mean colour
``none``                  nothing; ``auto``, too, stands alone: the crop that suits the data
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from equiframe.data.images import fit_square
from equiframe.data.policies import apply_operations, auto_augment, color_jitter, rand_augment
from equiframe.errors import InputError, unknown

ALONE = ("none", "auto")
CROPS = ("crop", "crop-flip", "resized-crop-flip")
POLICIES = {"color-jitter": color_jitter, "randaugment": rand_augment, "autoaugment": auto_augment}
PARTS = (*CROPS, *POLICIES, "cutout")  # in the order in which they act


def parse_augmentation(text: str) -> tuple[str, ...]:
    """``"crop-flip+randaugment+cutout"`` → its parts in the order in which they act; ``"none"`` and ``"auto"`` → ``()``.

    Raises:
        InputError: for an unknown part, or parts that do not go together.
    """
    names = [name.strip() for name in text.split("+")]
    for name in names:
        if name not in (*PARTS, *ALONE):
            raise unknown("augmentation", name, (*PARTS, *ALONE))
    twice = next((name for name in names if names.count(name) > 1), None)
    crops = [name for name in names if name in CROPS]
    if twice:
        raise InputError(f"augmentation {text!r} names {twice} twice; each part acts once")
    lonely = next((name for name in names if name in ALONE), None)
    if lonely and len(names) > 1:
        raise InputError(f"augmentation {text!r}: {lonely} stands alone; name all parts, as crop-flip+randaugment")
    if len(crops) > 1:
        raise InputError(f"augmentation {text!r}: {crops[0]} and {crops[1]} both say how images are cut; take one")
    if {"randaugment", "autoaugment"} <= set(names):
        raise InputError(f"augmentation {text!r}: randaugment and autoaugment draw from the same operations; take one")
    return tuple(name for name in PARTS if name in names)


Drawn = dict[str, tuple[np.ndarray, ...]]  # part → its choices; the last axis of every array is the batch's


def draw(parts: Sequence[str], count: int, size: tuple[int, int], random: np.random.Generator) -> Drawn:
    """The random choices of `augment` and `cut_out` for a batch of images of the given height and width."""
    drawn: Drawn = {}
    for part in parts:
        if part in CROPS:
            drawn[part] = _draw_crop(count, _padding(part, size), part != "crop", random)
        elif part in POLICIES:
            drawn[part] = POLICIES[part](count, random)
        else:
            drawn[part] = _draw_squares(count, size, random)
    return drawn


def of_rows(drawn: Drawn, rows: np.ndarray) -> Drawn:
    """The choices for some images of the batch."""
    return {part: tuple(choices[..., rows] for choices in arrays) for part, arrays in drawn.items()}


def augment(pixels: Tensor, parts: Sequence[str], random: np.random.Generator) -> Tensor:
    """Augment a uint8 batch ``(B, 3, H, W)`` on its device by the parts that act on bytes: all but ``cutout``."""
    on_bytes = [part for part in parts if part != "cutout"]
    return augment_as_drawn(pixels, draw(on_bytes, len(pixels), tuple(pixels.shape[-2:]), random))


def augment_as_drawn(pixels: Tensor, drawn: Drawn) -> Tensor:
    """`augment` by given choices."""
    for part, arrays in drawn.items():
        if part in CROPS:
            pixels = _cropped(pixels, _padding(part, pixels.shape[-2:]), part != "crop", *arrays)
        elif part in POLICIES:
            pixels = apply_operations(pixels, *arrays)
    return pixels


def _padding(part: str, size: Sequence[int]) -> int:
    return 0 if part == "resized-crop-flip" else size[1] // 8  # there the crop happened while decoding


def crop_and_flip(pixels: Tensor, padding: int, flip: bool, random: np.random.Generator) -> Tensor:
    """Shift each image by up to ``padding`` pixels (zeros come in) and mirror half of them; one gather for the batch.

    ``(B, C, H, W)`` → the same shape and dtype.
    """
    return _cropped(pixels, padding, flip, *_draw_crop(len(pixels), padding, flip, random))


def _draw_crop(count: int, padding: int, flip: bool, random: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Shifts from the top and from the left, and whether an image is mirrored, each ``(B,)``."""
    top, left = random.integers(0, 2 * padding + 1, size=(2, count))
    return top, left, (random.random(count) < 0.5) if flip else np.zeros(count, dtype=bool)


def _cropped(
    pixels: Tensor, padding: int, flip: bool, top: np.ndarray, left: np.ndarray, mirrored: np.ndarray
) -> Tensor:
    h, w = pixels.shape[-2:]
    if padding:
        pixels = torch.nn.functional.pad(pixels, (padding,) * 4)
    views = pixels[None]
    if flip:
        views = torch.stack([pixels, pixels.flip(3)])
        left = np.where(mirrored, 2 * padding - left, left)
    windows = views.unfold(3, h, 1).unfold(4, w, 1)  # (views, B, C, 2·padding + 1, 2·padding + 1, H, W), no copy
    chosen = (mirrored.astype(np.int64), np.arange(len(top)), top, left)
    view, image, top_, left_ = (torch.from_numpy(x).to(pixels.device) for x in chosen)
    return windows[view, image, :, top_, left_]


def cut_out(images: Tensor, random: np.random.Generator) -> Tensor:
    """Cutout (DeVries & Taylor 2017): in each image a square of half the side (16 pixels of 32) becomes 0, the mean colour
    of normalised images. Its centre is uniform over the pixels; what lies outside is cut off.

    ``(B, C, H, W)``, changed in place.
    """
    return cut_out_as_drawn(images, *_draw_squares(len(images), images.shape[-2:], random))


def _draw_squares(count: int, size: Sequence[int], random: np.random.Generator) -> tuple[np.ndarray, ...]:
    """The squares' tops and left sides, each ``(B,)``; they may lie outside."""
    return tuple(random.integers(side, size=count) - side // 4 for side in size)


def cut_out_as_drawn(images: Tensor, top: np.ndarray, left: np.ndarray) -> Tensor:
    """`cut_out` of given squares."""
    inside = []
    for start, size in zip((top, left), images.shape[-2:], strict=True):
        start, places = start[:, None], np.arange(size)
        inside.append(torch.from_numpy((places >= start) & (places < start + size // 2)).to(images.device))
    rows, columns = inside
    return images.masked_fill_(rows[:, None, :, None] & columns[:, None, None, :], 0)


Box = tuple[int, int, int, int]  # left, top, right, bottom


def random_box(width: int, height: int, random: np.random.Generator) -> Box | None:
    """A random box of 8–100 % of the area and aspect 3/4–4/3 (Inception's crop); None where ten tries do not fit."""
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1.0)
        aspect = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(0, width - w + 1)), int(random.integers(0, height - h + 1))
            return left, top, left + w, top + h
    return None


def random_resized_crop(image, size: int, random: np.random.Generator):
    """`random_box` of a PIL image, resized to a square; the centre square where no box fits."""
    return resize_box(image, size, random_box(*image.size, random), image.size)


def resize_box(image, size: int, box: Box | None, full: tuple[int, int]):
    """A box of an image, resized to a square; the centre square where the box is None.

    Args:
        image: a PIL image, perhaps decoded smaller than it is.
        box: in pixels of the full image, whose (width, height) is ``full``.
    """
    from PIL import Image

    if box is None:
        return fit_square(image, size)
    x, y = image.width / full[0], image.height / full[1]
    box = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)
