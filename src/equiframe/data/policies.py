r"""RandAugment, AutoAugment and colour jitter on a whole uint8 batch, each image with operations of its own.

A policy draws, for every image, a few operations and their levels (NumPy, ``(L, B)``: L operations one after another);
`apply_operations` carries them out with at most one call for each kind of operation, never one for each image:
movements are one fixed-point affine map, everything that acts on single values is one look-up table.

Arithmetic is that of Pillow, on integers or on single float operations, so that every device gives the same bytes.
A level is the signed share, in [−1, 1], of an operation's greatest strength:

=========================  =====================================================================================
shear-x, shear-y           slope 0.3 · level
translate-x, translate-y   150/331 · level of the side, whole pixels (150 of ImageNet's 331 in the papers)
rotate                     30° · level, counter-clockwise
brightness, color,         factor 1 + 0.9 · level, from black, gray, the mean gray, the smoothed image
contrast, sharpness
posterize                  keeps 8 − round(4 |level|) bits
solarize                   inverts what is at least 255 (1 − |level|)
autocontrast, equalize,    have no strength
invert, identity
=========================  =====================================================================================
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MOVEMENTS = ("shear-x", "shear-y", "translate-x", "translate-y", "rotate")
VALUES = ("brightness", "contrast", "posterize", "solarize", "autocontrast", "equalize", "invert")
OPERATIONS = ("identity", *MOVEMENTS, "color", "sharpness", *VALUES)  # RandAugment draws from all but the last
_INDEX = {name: i for i, name in enumerate(OPERATIONS)}
_ENHANCE = 0.9  # greatest distance of an enhancement's factor from 1

# The policy that was learned for CIFAR-10: 25 pairs of (operation, probability, magnitude of 0..9).
# Source: Cubuk et al., CVPR 2019, appendix, table "AutoAugment policy found on reduced CIFAR-10".
_CIFAR_POLICY = (
    (("invert", 0.1, 7), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate-x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear-y", 0.5, 8), ("translate-y", 0.7, 9)),
    (("autocontrast", 0.5, 8), ("equalize", 0.9, 2)),
    (("shear-y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 5), ("equalize", 0.5, 1)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate-x", 0.5, 8)),
    (("equalize", 0.3, 7), ("autocontrast", 0.4, 8)),
    (("translate-y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 3)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 8), ("equalize", 0.6, 4)),
    (("color", 0.9, 9), ("equalize", 0.6, 6)),
    (("autocontrast", 0.8, 4), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 3)),
    (("translate-y", 0.9, 9), ("translate-y", 0.7, 9)),
    (("autocontrast", 0.9, 2), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 8), ("invert", 0.1, 3)),
    (("translate-y", 0.7, 9), ("autocontrast", 0.9, 1)),
)

Drawn = tuple[np.ndarray, np.ndarray]  # operations (L, B), as positions in OPERATIONS; levels (L, B)


# --- policies ---------------------------------------------------------------------------------------------------------


def rand_augment(count: int, random: np.random.Generator, *, num_ops: int = 2, magnitude: int = 9) -> Drawn:
    """RandAugment (Cubuk et al., CVPR Workshops 2020): each image gets ``num_ops`` of 14 operations, equally likely, at
    magnitude 9 of 30, with a random sign where they have one."""
    operations = random.integers(len(OPERATIONS) - 1, size=(num_ops, count))
    return operations, _signs(operations.shape, random) * magnitude / 30


def auto_augment(count: int, random: np.random.Generator) -> Drawn:
    """AutoAugment with the policy of CIFAR-10 (Cubuk et al., CVPR 2019): each image gets one of 25 pairs of operations,
    each carried out with its own probability, at its magnitude of 0..9, with a random sign where it has one."""
    pairs = random.integers(len(_CIFAR_POLICY), size=count)
    names, probabilities, magnitudes = (np.array(x)[pairs].T for x in _columns(_CIFAR_POLICY))
    operations = np.where(random.random((2, count)) < probabilities, names, _INDEX["identity"])
    return operations, _signs(operations.shape, random) * magnitudes / 9


def color_jitter(count: int, random: np.random.Generator, *, strength: float = 0.4) -> Drawn:
    """Brightness, contrast and colour of each image change by factors in [1 − s, 1 + s], in random order (Krizhevsky et
    al. 2012, as torchvision's ColorJitter(s, s, s) has it)."""
    names = np.array([_INDEX[name] for name in ("brightness", "contrast", "color")])
    operations = random.permuted(np.tile(names, (count, 1)), axis=1).T
    return operations, random.uniform(-strength, strength, operations.shape) / _ENHANCE


def _signs(shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    return np.where(random.random(shape) < 0.5, -1.0, 1.0)


def _columns(policy: tuple) -> tuple[list, list, list]:
    """Operations, probabilities and magnitudes of a policy's pairs, each 25 × 2."""
    return (
        [[_INDEX[name] for name, _, _ in pair] for pair in policy],
        [[probability for _, probability, _ in pair] for pair in policy],
        [[magnitude for _, _, magnitude in pair] for pair in policy],
    )


# --- operations -------------------------------------------------------------------------------------------------------


def apply_operations(pixels: Tensor, operations: np.ndarray, levels: np.ndarray) -> Tensor:
    """Carry out the L operations that were drawn for each image, one after another.

    Args:
        pixels: uint8 ``(B, 3, H, W)``, on any device; left as they are.
        operations: positions in `OPERATIONS`, ``(L, B)``; ``levels`` in [−1, 1], ``(L, B)``.
    """
    pixels = pixels.clone(memory_format=torch.contiguous_format)
    for names, level in zip(operations, levels, strict=True):
        for members, act in _KINDS:
            chosen = np.flatnonzero(np.isin(names, members))
            if len(chosen):
                index = torch.from_numpy(chosen).to(pixels.device)
                pixels.index_copy_(0, index, act(pixels.index_select(0, index), names[chosen], level[chosen]))
    return pixels


def _move(pixels: Tensor, names: np.ndarray, levels: np.ndarray) -> Tensor:
    """Shear, translate or rotate: each output pixel takes the nearest input pixel; zeros come in.

    Fixed point with 16 fractional bits, as Pillow's: x_in = (a·x + b·y + c) >> 16.
    """
    b, c, h, w = pixels.shape
    maps = torch.from_numpy(_affine_maps(names, levels, h, w)).to(pixels.device)
    y = torch.arange(h, dtype=torch.int32, device=pixels.device)[None, :, None]
    x = torch.arange(w, dtype=torch.int32, device=pixels.device)[None, None, :]
    xx, xy, x0, yx, yy, y0 = maps.T[:, :, None, None]
    columns, rows = (xx * x + xy * y + x0) >> 16, (yx * x + yy * y + y0) >> 16
    inside = (columns >= 0) & (columns < w) & (rows >= 0) & (rows < h)
    source = torch.where(inside, rows * w + columns, 0).long().flatten(1)[:, None]
    moved = pixels.flatten(2).gather(2, source.expand(b, c, h * w)).view(b, c, h, w)
    return moved.mul_(inside[:, None])


def _affine_maps(names: np.ndarray, levels: np.ndarray, h: int, w: int) -> np.ndarray:
    """Maps from output to input, ``(n, 6)`` int32: a, b, c of x_in and of y_in, pixel centres at ½ accounted for."""
    maps = np.tile([1.0, 0, 0, 0, 1, 0], (len(names), 1))
    is_ = {name: names == _INDEX[name] for name in MOVEMENTS}
    maps[is_["shear-x"], 1] = 0.3 * levels[is_["shear-x"]]
    maps[is_["shear-y"], 3] = 0.3 * levels[is_["shear-y"]]
    maps[is_["translate-x"], 2] = -np.trunc(150 / 331 * w * levels[is_["translate-x"]])
    maps[is_["translate-y"], 5] = -np.trunc(150 / 331 * h * levels[is_["translate-y"]])
    angle = np.deg2rad(-30 * levels[is_["rotate"]])
    cos, sin = np.cos(angle), np.sin(angle)
    turn = [cos, sin, w / 2 - cos * w / 2 - sin * h / 2, -sin, cos, h / 2 + sin * w / 2 - cos * h / 2]
    maps[is_["rotate"]] = np.stack(turn, 1)
    maps[:, 2] += (maps[:, 0] + maps[:, 1]) / 2
    maps[:, 5] += (maps[:, 3] + maps[:, 4]) / 2
    return np.floor(maps * 65536 + 0.5).astype(np.int32)


def _change_values(pixels: Tensor, names: np.ndarray, levels: np.ndarray) -> Tensor:
    """All that maps each value by itself: a table of 256 values for each image and channel, then one look-up."""
    values = torch.arange(256, device=pixels.device)[None, None]
    tables = torch.empty((*pixels.shape[:2], 256), dtype=torch.uint8, device=pixels.device)
    for name in VALUES:
        chosen = np.flatnonzero(names == _INDEX[name])
        if len(chosen):
            index = torch.from_numpy(chosen).to(pixels.device)
            tables[index] = _TABLES[name](values, pixels.index_select(0, index), levels[chosen])
    return tables.gather(2, pixels.flatten(2).long()).view(pixels.shape)


def _blend(base: Tensor, values: Tensor, levels: np.ndarray) -> Tensor:
    """Enhancement as Pillow blends: base + f (value − base), f = 1 + 0.9 level; clipped and cut to whole numbers."""
    factors = torch.from_numpy((1 + _ENHANCE * levels).astype(np.float32)).to(values.device)
    factors = factors.view(-1, *(1,) * (values.dim() - 1))
    return (base + factors * (values - base)).clamp_(0, 255).to(torch.uint8)


def _gray(pixels: Tensor) -> Tensor:
    """Luma of ITU-R 601, ``(B, 1, H, W)`` int32, rounded as Pillow does."""
    red, green, blue = pixels.to(torch.int32).unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16)[:, None]


def _brightness(values: Tensor, pixels: Tensor, levels: np.ndarray) -> Tensor:
    return _blend(torch.zeros_like(values), values, levels)


def _contrast(values: Tensor, pixels: Tensor, levels: np.ndarray) -> Tensor:
    total, area = _gray(pixels).sum((2, 3), keepdim=True)[:, :, 0], pixels.shape[2] * pixels.shape[3]
    mean = (2 * total + area) // (2 * area)  # rounded half up
    return _blend(mean, values, levels)


def _posterize(values: Tensor, pixels: Tensor, levels: np.ndarray) -> Tensor:
    low_bits = (1 << np.round(4 * np.abs(levels)).astype(np.int64)) - 1
    return (values & ~torch.from_numpy(low_bits).to(values.device)[:, None, None]).to(torch.uint8)


def _solarize(values: Tensor, pixels: Tensor, levels: np.ndarray) -> Tensor:
    thresholds = torch.from_numpy((255 * (1 - np.abs(levels))).astype(np.float32)).to(values.device)
    return torch.where(values < thresholds[:, None, None], values, 255 - values).to(torch.uint8)


def _autocontrast(values: Tensor, pixels: Tensor, levels: np.ndarray) -> Tensor:
    """The channel's values stretch to 0..255; a channel of one value stays."""
    flat = pixels.flatten(2).to(torch.int32)
    low, high = flat.amin(2, keepdim=True), flat.amax(2, keepdim=True)
    stretched = (255 * (values - low)).div((high - low).clamp_min(1), rounding_mode="floor").clamp_(0, 255)
    return torch.where(high > low, stretched, values).to(torch.uint8)


def _equalize(values: Tensor, pixels: Tensor, levels: np.ndarray) -> Tensor:
    """The channel's histogram becomes flat, as ``PIL.ImageOps.equalize`` makes it."""
    flat = pixels.flatten(2).long()
    counts = torch.zeros((*flat.shape[:2], 256), dtype=torch.int64, device=flat.device)
    counts.scatter_add_(2, flat, torch.ones((), dtype=torch.int64, device=flat.device).expand(flat.shape))
    of_highest = counts.gather(2, flat.amax(2, keepdim=True))
    step = (flat.shape[2] - of_highest) // 255
    below = counts.cumsum(2) - counts
    equal = ((step // 2 + below) // step.clamp_min(1)).clamp_max(255)
    return torch.where(step > 0, equal, values).to(torch.uint8)


def _invert(values: Tensor, pixels: Tensor, levels: np.ndarray) -> Tensor:
    return (255 - values).to(torch.uint8)


def _color(pixels: Tensor, names: np.ndarray, levels: np.ndarray) -> Tensor:
    return _blend(_gray(pixels), pixels, levels)


def _sharpness(pixels: Tensor, names: np.ndarray, levels: np.ndarray) -> Tensor:
    """Away from (or towards) the image smoothed by (1 1 1; 1 5 1; 1 1 1)/13; border pixels stay."""
    wide = pixels.to(torch.int32)
    smooth = wide.clone()
    rows = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * wide[:, :, 1:-1, 1:-1]
    smooth[:, :, 1:-1, 1:-1] = (2 * total + 13) // 26
    return _blend(smooth, wide, levels)


_TABLES = {
    "brightness": _brightness, "contrast": _contrast, "posterize": _posterize, "solarize": _solarize,
    "autocontrast": _autocontrast, "equalize": _equalize, "invert": _invert,
}  # fmt: skip
_KINDS = tuple(
    (np.array([_INDEX[name] for name in members]), act)
    for members, act in (
        (MOVEMENTS, _move),
        (("color",), _color),
        (("sharpness",), _sharpness),
        (VALUES, _change_values),
    )
)
