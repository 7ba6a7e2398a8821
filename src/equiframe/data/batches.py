"""How batches are made: pixels resident on the device and augmented per batch, or streamed through decoding threads.

Every random choice of a batch is a pure function of (seed, epoch, step): nothing about data needs to be saved to
continue a run exactly, and CPU and GPU see the same augmentations.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from equiframe.data.images import fit_square, to_tensor
from equiframe.data.sources import ImageSet
from equiframe.losses import MixedTargets, Targets

AUGMENTATIONS = ("auto", "none", "crop", "crop-flip", "resized-crop-flip")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESIDENT_LIMIT = 4 << 30  # bytes of uint8 pixels that still live in memory as one tensor


class Batch(NamedTuple):
    """Normalised float images ``(B, 3, H, W)`` and what they should be."""

    images: Tensor
    targets: Targets


def crop_and_flip(pixels: Tensor, padding: int, flip: bool, random: np.random.Generator) -> Tensor:
    """Shift each image by up to ``padding`` pixels (zeros come in) and mirror half of them; one gather for the batch.

    ``(B, C, H, W)`` → the same shape and dtype.
    """
    b, _, h, w = pixels.shape
    shifts = random.integers(0, 2 * padding + 1, size=(2, b, 1))
    rows = shifts[0] + np.arange(h)
    columns = shifts[1] + np.arange(w)
    if flip:
        mirrored = random.random(b) < 0.5
        columns[mirrored] = columns[mirrored, ::-1]
    if padding:
        pixels = torch.nn.functional.pad(pixels, (padding,) * 4)
    index = torch.arange(b, device=pixels.device)[:, None, None]
    rows_, columns_ = (torch.from_numpy(np.ascontiguousarray(x)).to(pixels.device) for x in (rows, columns))
    return pixels.permute(0, 2, 3, 1)[index, rows_[:, :, None], columns_[:, None, :]].permute(0, 3, 1, 2)


def mix_up(images: Tensor, targets: Tensor, alpha: float, random: np.random.Generator) -> tuple[Tensor, MixedTargets]:
    r"""Mixup (Zhang et al., ICLR 2018): :math:`\lambda x_i + (1-\lambda) x_{\pi(i)}`, one λ ~ Beta(α, α) a batch."""
    share = float(random.beta(alpha, alpha))
    order = torch.from_numpy(random.permutation(len(targets))).to(images.device)
    return torch.lerp(images[order], images, share), MixedTargets(targets, targets[order], share)


def augment(pixels: Tensor, kind: str, random: np.random.Generator) -> Tensor:
    """Augment a uint8 batch on its device. The crop moves by up to an eighth of the side (4 pixels of 32)."""
    if kind in ("crop", "crop-flip"):
        return crop_and_flip(pixels, pixels.shape[-1] // 8, kind == "crop-flip", random)
    if kind == "resized-crop-flip":  # the crop happened while decoding
        return crop_and_flip(pixels, 0, True, random)
    return pixels


def normalise(pixels: Tensor, mean: Tensor, std: Tensor, memory_format: torch.memory_format) -> Tensor:
    """uint8 ``(B, 3, H, W)`` → float32, ``(x/255 − mean)/std`` per channel."""
    images = pixels.to(dtype=torch.float32, memory_format=memory_format)
    return images.mul_(1 / (255 * std)[:, None, None]).sub_((mean / std)[:, None, None])


def channel_statistics(pixels: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, in [0, 1], from uint8 pixels (exact, by histogram)."""
    values = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in range(pixels.shape[1]):
        histogram = torch.bincount(pixels[:, channel].flatten().to(torch.int32), minlength=256).double()
        p = histogram / histogram.sum()
        m = float(p @ values)
        mean.append(m)
        std.append(max(float((p @ (values - m) ** 2).sqrt()), 1 / 255))
    return mean, std


class Loader:
    """Batches of one image set. ``epoch(e, start)`` yields training batches, ``ordered()`` all images once, in order.

    Args:
        images: with pixels (resident) or sources (streaming; decoded by ``workers`` threads, two batches ahead).
        stream: resize pixels on the fly, too, instead of keeping them on the device.
        batch_size: training batches are all of this size (an incomplete last one is left out: its images come up in
            other epochs); smaller only if the whole set is.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        batch_size: int,
        image_size: int,
        mean: list[float],
        std: list[float],
        device: torch.device,
        memory_format: torch.memory_format = torch.contiguous_format,
        augmentation: str = "none",
        mixup: float = 0.0,
        seed: int = 0,
        workers: int = 2,
        stream: bool = False,
    ) -> None:
        self.images, self.image_size, self.device = images, image_size, device
        self.batch_size = min(batch_size, len(images))
        self.memory_format, self.augmentation, self.mixup = memory_format, augmentation, mixup
        self.seed, self.workers = seed, workers
        self.mean = torch.tensor(mean, device=device)
        self.std = torch.tensor(std, device=device)
        self.labels = torch.from_numpy(images.labels).to(device)
        self.pixels = None if stream or images.pixels is None else images.pixels.to(device)

    @property
    def resident(self) -> bool:
        return self.pixels is not None

    @property
    def steps(self) -> int:
        """Training batches of an epoch."""
        return len(self.images) // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Training batches ``start, start+1, …`` of an epoch."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.images))
        chunks = [order[i * self.batch_size : (i + 1) * self.batch_size] for i in range(start, self.steps)]
        seeds = [(self.seed, epoch, step + 1) for step in range(start, self.steps)]  # 0 is the order's
        for (indices, pixels), seed in zip(self._pixels(chunks, seeds), seeds, strict=True):
            random = np.random.default_rng(seed)
            images = normalise(augment(pixels, self.augmentation, random), self.mean, self.std, self.memory_format)
            targets = self.labels[indices]
            yield Batch(*(mix_up(images, targets, self.mixup, random) if self.mixup else (images, targets)))

    def ordered(self, batch_size: int = 0) -> Iterator[Batch]:
        """All images once, in order, not augmented."""
        size = batch_size or self.batch_size
        chunks = [np.arange(i, min(i + size, len(self.images))) for i in range(0, len(self.images), size)]
        for indices, pixels in self._pixels(chunks, None):
            yield Batch(normalise(pixels, self.mean, self.std, self.memory_format), self.labels[indices])

    def _pixels(self, chunks: list[np.ndarray], seeds: list | None) -> Iterator[tuple[Tensor, Tensor]]:
        if self.pixels is not None:
            for chunk in chunks:
                indices = torch.from_numpy(chunk).to(self.device)
                yield indices, self.pixels[indices]
            return
        crop = seeds is not None and self.augmentation == "resized-crop-flip"

        def decode(i: int, seed: tuple | None) -> Tensor:
            image = self.images.image(i)
            if crop:
                image = random_resized_crop(image, self.image_size, np.random.default_rng((*seed, i + 1)))
            return to_tensor(fit_square(image, self.image_size))

        with ThreadPoolExecutor(self.workers) as pool:
            waiting: deque[tuple[np.ndarray, list[Future]]] = deque()
            for step, chunk in enumerate(chunks):
                seed = seeds[step] if seeds else None
                waiting.append((chunk, [pool.submit(decode, int(i), seed) for i in chunk]))
                if len(waiting) > 2:
                    yield self._gathered(*waiting.popleft())
            while waiting:
                yield self._gathered(*waiting.popleft())

    def _gathered(self, chunk: np.ndarray, decoded: list[Future]) -> tuple[Tensor, Tensor]:
        pixels = torch.stack([future.result() for future in decoded])
        return torch.from_numpy(chunk).to(self.device), pixels.to(self.device)


def random_resized_crop(image, size: int, random: np.random.Generator):
    """A random box of 8–100 % of the area and aspect 3/4–4/3, resized to a square (Inception's crop)."""
    from PIL import Image

    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1.0)
        aspect = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(0, width - w + 1)), int(random.integers(0, height - h + 1))
            return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))
    return fit_square(image, size)
