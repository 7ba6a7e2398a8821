"""How batches are made: pixels resident on the device and augmented per batch, or streamed through decoding threads.

Every random choice of a batch is a pure function of (seed, epoch, step): nothing about data needs to be saved to
continue a run exactly, and CPU and GPU see the same augmentations. All choices are drawn for the images of a whole step, and a
process makes only its own part of them, so a step shows the same images however many processes share it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from equiframe.data.augment import (
    Drawn,
    augment_as_drawn,
    cut_out_as_drawn,
    draw,
    of_rows,
    parse_augmentation,
    random_box,
    random_resized_crop,
    resize_box,
)
from equiframe.data.images import decode_image, decoding_threads, fit_square, to_tensor, upright_size
from equiframe.data.mixing import Mixing, draw_mixing, remix
from equiframe.data.sources import ImageSet
from equiframe.errors import InputError
from equiframe.losses import Targets, rows_of
from equiframe.parallel import ALONE, World
from equiframe.samplers import epoch_order
from equiframe.words import counted

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESIDENT_LIMIT = 4 << 30  # bytes of uint8 pixels that still live in memory as one tensor


class Batch(NamedTuple):
    """Normalised float images ``(B, 3, H, W)`` and what they should be."""

    images: Tensor
    targets: Targets


class Part(NamedTuple):
    """What one process takes at once of a training step's images.

    Attributes:
        images, targets: as of a `Batch`.
        together: the targets of all images of the step, in every process.
        share: this part's share of them, in (0, 1].
    """

    images: Tensor
    targets: Targets
    together: Targets
    share: float


class _Wanted(NamedTuple):
    """Images to fetch, by their positions in the set, and what follows of them.

    Attributes:
        seed: of the random boxes of streamed images; None: the centre.
        drawn: augmentation of these images.
        mixing: how the images of the step are mixed.
        step: positions of all images of the step.
        rows: which of the step's images this part is.
    """

    indices: np.ndarray
    seed: tuple[int, ...] | None = None
    drawn: Drawn | None = None
    mixing: Mixing | None = None
    step: np.ndarray | None = None
    rows: np.ndarray | None = None


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
    """Batches of one image set. ``epoch(e, start)`` yields training batches, ``parts(e, start)`` the same by step for
    processes that share it, ``ordered()`` all images once, in order.

    Args:
        images: with pixels (resident) or sources (streaming; decoded by ``workers`` threads, two batches ahead).
        stream: resize pixels on the fly, too, instead of keeping them on the device.
        batch_size: images of a training step, of all processes together. Steps are all of this size (an incomplete last one is
            left out: its images come up in other epochs); smaller only if the whole set is.
        augmentation: parts as in `equiframe.data.augment`; ``auto`` is settled before.
        mixup, cutmix, remix: how training batches are mixed (`equiframe.data.mixing`), in the first ``mix_until`` of the run's ``epochs``;
            the attribute ``mix_share``, 1 at first, is the probability that a batch is.
        sampler: which images make an epoch (`equiframe.samplers`); ``progressive`` needs ``epochs``, too.
        centre_crop: share of the shorter side that streamed images keep where no random box is drawn.
        draft: decode JPEGs at 1/2, 1/4 or 1/8 where a random box keeps twice the side of the image that is made of it.
        world: the processes that share each step, and the images of ``ordered()``.
        accumulate: in how many parts a process takes its images of a step.
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
        mix_until: float = 1.0,
        sampler: str = "instance",
        epochs: int = 1,
        seed: int = 0,
        workers: int | None = None,
        stream: bool = False,
        centre_crop: float = 1.0,
        draft: bool = False,
        world: World = ALONE,
        accumulate: int = 1,
    ) -> None:
        self.images, self.image_size, self.device = images, image_size, device
        self.batch_size = min(batch_size, len(images))
        self.memory_format, self.augmentation = memory_format, parse_augmentation(augmentation)
        self.mixing, self.mix_until, self.mix_share = {"mixup": mixup, "cutmix": cutmix}, mix_until, 1.0
        self.remix_counts = torch.from_numpy(np.bincount(images.labels)).to(device) if remix else None
        self.world, self.accumulate = world, accumulate
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

    def check_parts(self) -> None:
        """An `InputError` if a step has fewer than two images for each part: BatchNorm needs two."""
        pieces = self.world.size * self.accumulate
        if pieces > 1 and self.batch_size < 2 * pieces:
            raise InputError(
                f"a step of {self.batch_size} images cannot be shared by {counted(self.world.size, 'process', 'processes')} in "
                f"{counted(self.accumulate, 'part')} each: it needs {2 * pieces} or more"
            )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Training batches ``start, start+1, …`` of an epoch; of several parts of a step, one after the other."""
        for parts in self.parts(epoch, start):
            yield from (Batch(part.images, part.targets) for part in parts)

    def parts(self, epoch: int, start: int = 0) -> Iterator[list[Part]]:
        """This process's parts of the training steps ``start, start+1, …`` of an epoch.

        Part p of P takes every P-th image of the step from image p on; process r of W has the parts r, W + r, 2W + r, …
        """
        parts: list[Part] = []
        for wanted, pixels in self._pixels(self._wanted(epoch, start)):
            parts.append(self._part(wanted, pixels))
            if len(parts) == self.accumulate:
                yield parts
                parts = []

    def _wanted(self, epoch: int, start: int) -> Iterator[_Wanted]:
        """Every random choice of the steps, and what this process needs of them."""
        count, pieces = self.batch_size, self.world.size * self.accumulate
        size = (self.image_size,) * 2 if self.pixels is None else tuple(self.pixels.shape[-2:])
        order = self.order(epoch)
        for step in range(start, self.steps):
            seed = (self.seed, epoch, step + 1)  # 0 is the order's
            random = np.random.default_rng(seed)
            chunk = order[step * count : (step + 1) * count]
            drawn = draw(self.augmentation, count, size, random)
            mixing = draw_mixing(count, size, random, **self.mixing) if self._mixes(epoch, step, random) else None
            for piece in range(self.world.rank, pieces, self.world.size):
                rows = np.arange(count)[piece::pieces]
                needed = rows if mixing is None else np.union1d(rows, mixing.order[rows])
                yield _Wanted(chunk[needed], seed, of_rows(drawn, needed), mixing, chunk, rows)

    def _mixes(self, epoch: int, step: int, random: np.random.Generator) -> bool:
        if self.mix_share < 1 and random.random() >= self.mix_share:
            return False
        return self.mix_until == 1 or (epoch + step / self.steps) / self.epochs < self.mix_until

    def _part(self, wanted: _Wanted, pixels: Tensor) -> Part:
        images = normalise(augment_as_drawn(pixels, wanted.drawn), self.mean, self.std, self.memory_format)
        if "cutout" in wanted.drawn:
            images = cut_out_as_drawn(images, *wanted.drawn["cutout"])
        mixing, rows = wanted.mixing, wanted.rows
        together: Targets = self.labels[self._on_device(wanted.step)]
        if mixing is not None:
            together = mixing.targets(together)
            together = together if self.remix_counts is None else remix(together, self.remix_counts)
            needed = np.union1d(rows, mixing.order[rows])
            first, second = (self._on_device(np.searchsorted(needed, of)) for of in (rows, mixing.order[rows]))
            images = mixing.images(images if len(needed) == len(rows) else images[first], images[second])
        if len(rows) == len(wanted.step):
            return Part(images, together, together, 1.0)
        return Part(images, rows_of(together, self._on_device(rows)), together, len(rows) / len(wanted.step))

    def _on_device(self, indices: np.ndarray) -> Tensor:
        return torch.from_numpy(indices).to(self.device)

    def ordered(self, batch_size: int = 0) -> Iterator[Batch]:
        """All images once, in order, not augmented; of several processes, each has its `World.share` of the batches."""
        for pixels, labels in self.ordered_pixels(batch_size):
            yield Batch(normalise(pixels, self.mean, self.std, self.memory_format), labels)

    def ordered_pixels(self, batch_size: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The same, as uint8 ``(B, 3, H, W)`` and labels."""
        size = batch_size or self.batch_size
        chunks = [np.arange(i, min(i + size, len(self.images))) for i in range(0, len(self.images), size)]
        for wanted, pixels in self._pixels(map(_Wanted, self.world.share(chunks))):
            yield pixels, self.labels[self._on_device(wanted.indices)]

    def _pixels(self, asked: Iterable[_Wanted]) -> Iterator[tuple[_Wanted, Tensor]]:
        if self.pixels is not None:
            for wanted in asked:
                yield wanted, self.pixels.index_select(0, self._on_device(wanted.indices))
            return
        boxes = "resized-crop-flip" in self.augmentation

        def decode(i: int, seed: tuple[int, ...] | None) -> Tensor:
            if boxes and seed is not None:
                return to_tensor(self._random_crop(i, np.random.default_rng((*seed, i + 1))))
            return to_tensor(fit_square(self.images.image(i), self.image_size, self.centre_crop))

        with ThreadPoolExecutor(decoding_threads(self.workers)) as pool:
            waiting: deque[tuple[_Wanted, list[Future]]] = deque()
            for wanted in asked:
                waiting.append((wanted, [pool.submit(decode, int(i), wanted.seed) for i in wanted.indices]))
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

    def _gathered(self, wanted: _Wanted, decoded: list[Future]) -> tuple[_Wanted, Tensor]:
        rows = [future.result().permute(1, 2, 0) for future in decoded]  # as they lie in memory: a plain copy
        return wanted, torch.stack(rows).to(self.device).permute(0, 3, 1, 2)
