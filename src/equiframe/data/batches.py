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

from equiframe.data.augment import augment, cut_out, parse_augmentation, random_box, random_resized_crop, resize_box
from equiframe.data.images import decode_image, decoding_threads, fit_square, to_tensor, upright_size
from equiframe.data.mixing import mix
from equiframe.data.sources import ImageSet
from equiframe.losses import Targets
from equiframe.samplers import epoch_order

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESIDENT_LIMIT = 4 << 30  # bytes of uint8 pixels that still live in memory as one tensor


class Batch(NamedTuple):
    """Normalised float images ``(B, 3, H, W)`` and what they should be."""

    images: Tensor
    targets: Targets


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
        augmentation: parts as in `equiframe.data.augment`; ``auto`` is settled before.
        mixup, cutmix, remix: how training batches are mixed (`equiframe.data.mixing`).
        sampler: which images make an epoch (`equiframe.samplers`); ``epochs`` of the run, for ``progressive``.
        centre_crop: share of the shorter side that streamed images keep where no random box is drawn.
        draft: decode JPEGs at 1/2, 1/4 or 1/8 where a random box keeps twice the side of the image that is made of it.
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
        cutmix: float = 0.0,
        remix: bool = False,
        sampler: str = "instance",
        epochs: int = 1,
        seed: int = 0,
        workers: int | None = None,
        stream: bool = False,
        centre_crop: float = 1.0,
        draft: bool = False,
    ) -> None:
        self.images, self.image_size, self.device = images, image_size, device
        self.batch_size = min(batch_size, len(images))
        self.memory_format, self.augmentation = memory_format, parse_augmentation(augmentation)
        self.mixing = {"mixup": mixup, "cutmix": cutmix}
        if remix:
            self.mixing["remix_counts"] = torch.from_numpy(np.bincount(images.labels)).to(device)
        self.sampler, self.epochs = sampler, epochs
        self.seed, self.workers = seed, workers
        self.centre_crop, self.draft = centre_crop, draft
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

    def order(self, epoch: int) -> np.ndarray:
        """Positions of an epoch's images, in order."""
        return epoch_order(self.images.labels, self.sampler, seed=self.seed, epoch=epoch, epochs=self.epochs)

    def positions(self, epoch: int, step: int) -> np.ndarray:
        """Which images make a training batch (before they are mixed)."""
        return self.order(epoch)[step * self.batch_size : (step + 1) * self.batch_size]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Training batches ``start, start+1, …`` of an epoch."""
        order = self.order(epoch)
        chunks = [order[i * self.batch_size : (i + 1) * self.batch_size] for i in range(start, self.steps)]
        seeds = [(self.seed, epoch, step + 1) for step in range(start, self.steps)]  # 0 is the order's
        for (indices, pixels), seed in zip(self._pixels(chunks, seeds), seeds, strict=True):
            random = np.random.default_rng(seed)
            images = normalise(augment(pixels, self.augmentation, random), self.mean, self.std, self.memory_format)
            if "cutout" in self.augmentation:
                images = cut_out(images, random)
            yield Batch(*mix(images, self.labels[indices], random, **self.mixing))

    def ordered(self, batch_size: int = 0) -> Iterator[Batch]:
        """All images once, in order, not augmented."""
        for pixels, labels in self.ordered_pixels(batch_size):
            yield Batch(normalise(pixels, self.mean, self.std, self.memory_format), labels)

    def ordered_pixels(self, batch_size: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The same, as uint8 ``(B, 3, H, W)`` and labels."""
        size = batch_size or self.batch_size
        chunks = [np.arange(i, min(i + size, len(self.images))) for i in range(0, len(self.images), size)]
        for indices, pixels in self._pixels(chunks, None):
            yield pixels, self.labels[indices]

    def _pixels(self, chunks: list[np.ndarray], seeds: list | None) -> Iterator[tuple[Tensor, Tensor]]:
        if self.pixels is not None:
            for chunk in chunks:
                indices = torch.from_numpy(chunk).to(self.device)
                yield indices, self.pixels.index_select(0, indices)
            return
        crop = seeds is not None and "resized-crop-flip" in self.augmentation

        def decode(i: int, seed: tuple | None) -> Tensor:
            if crop:
                return to_tensor(self._random_crop(i, np.random.default_rng((*seed, i + 1))))
            return to_tensor(fit_square(self.images.image(i), self.image_size, self.centre_crop))

        with ThreadPoolExecutor(decoding_threads(self.workers)) as pool:
            waiting: deque[tuple[np.ndarray, list[Future]]] = deque()
            for step, chunk in enumerate(chunks):
                seed = seeds[step] if seeds else None
                waiting.append((chunk, [pool.submit(decode, int(i), seed) for i in chunk]))
                if len(waiting) > 2:
                    yield self._gathered(*waiting.popleft())
            while waiting:
                yield self._gathered(*waiting.popleft())

    def _random_crop(self, i: int, random: np.random.Generator):
        """Image i's part in a random box, as a square PIL image."""
        if not self.draft or self.images.sources is None:
            return random_resized_crop(self.images.image(i), self.image_size, random)
        source, name = self.images.sources[i], self.images.names[i]
        size = upright_size(source, name=name)
        box = random_box(*size, random)
        side = min(box[2] - box[0], box[3] - box[1]) if box else 0
        reduce = next(n for n in (8, 4, 2, 1) if side >= 2 * n * self.image_size or n == 1)
        return resize_box(decode_image(source, name=name, reduce=reduce), self.image_size, box, size)

    def _gathered(self, chunk: np.ndarray, decoded: list[Future]) -> tuple[Tensor, Tensor]:
        rows = [future.result().permute(1, 2, 0) for future in decoded]  # as they lie in memory: a plain copy
        pixels = torch.stack(rows).to(self.device).permute(0, 3, 1, 2)
        return torch.from_numpy(chunk).to(self.device), pixels
