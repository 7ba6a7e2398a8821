"""Mixing the images of a batch in pairs: mixup, cutmix, and remix for their targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from equiframe.losses import MixedTargets

REMIX_KAPPA, REMIX_TAU = 3.0, 0.5


class Mixing(NamedTuple):
    """How a batch is mixed: image i with image ``order[i]``, by ``share`` (mixup) or by a ``box`` (cutmix: top, bottom, left,
    right) that comes from the second."""

    order: np.ndarray
    share: float
    box: tuple[int, int, int, int] | None = None

    def targets(self, labels: Tensor) -> MixedTargets:
        """Of a batch with these labels ``(B,)``."""
        return MixedTargets(labels, labels[torch.from_numpy(self.order).to(labels.device)], self.share)

    def images(self, first: Tensor, second: Tensor) -> Tensor:
        """Images mixed with their partners, ``(…, C, H, W)``."""
        if self.box is None:
            return torch.lerp(second, first, self.share)
        top, bottom, left, right = self.box
        mixed = first.clone()
        mixed[:, :, top:bottom, left:right] = second[:, :, top:bottom, left:right]
        return mixed


def draw_mixup(count: int, alpha: float, random: np.random.Generator) -> Mixing:
    share = float(random.beta(alpha, alpha))
    return Mixing(random.permutation(count), share)


def draw_cutmix(count: int, size: Sequence[int], alpha: float, random: np.random.Generator) -> Mixing:
    h, w = size
    side = (1 - random.beta(alpha, alpha)) ** 0.5
    order = random.permutation(count)
    top, bottom = _interval(int(h * side), h, random)
    left, right = _interval(int(w * side), w, random)
    return Mixing(order, 1 - (bottom - top) * (right - left) / (h * w), (top, bottom, left, right))


def draw_mixing(
    count: int, size: Sequence[int], random: np.random.Generator, *, mixup: float = 0.0, cutmix: float = 0.0
) -> Mixing | None:
    """Mixup, cutmix, one of the two with probability ½ each, or (both 0) None, for a batch of images of a height and width.

    Args:
        mixup: α of mixup; 0 is off. ``cutmix`` likewise.
    """
    if not mixup and not cutmix:
        return None
    box = bool(cutmix) and (not mixup or random.random() < 0.5)
    return draw_cutmix(count, size, cutmix, random) if box else draw_mixup(count, mixup, random)


def _mixed(images: Tensor, targets: Tensor, mixing: Mixing) -> tuple[Tensor, MixedTargets]:
    partners = images[torch.from_numpy(mixing.order).to(images.device)]
    return mixing.images(images, partners), mixing.targets(targets)


def mix_up(images: Tensor, targets: Tensor, alpha: float, random: np.random.Generator) -> tuple[Tensor, MixedTargets]:
    r"""Mixup (Zhang et al., ICLR 2018): :math:`\lambda x_i + (1-\lambda) x_{\pi(i)}`, one λ ~ Beta(α, α) a batch."""
    return _mixed(images, targets, draw_mixup(len(targets), alpha, random))


def cut_mix(images: Tensor, targets: Tensor, alpha: float, random: np.random.Generator) -> tuple[Tensor, MixedTargets]:
    r"""Cutmix (Yun et al., ICCV 2019): a box of image π(i) replaces that of image i, the same box for the whole batch.

    λ ~ Beta(α, α) a batch; the box has sides :math:`\sqrt{1-\lambda}` of the image's (whole pixels) around a uniform
    centre and is clipped at the border. The share of the first target is what the clipped box left of the image,
    exactly: 1 − box area / (H·W).
    """
    return _mixed(images, targets, draw_cutmix(len(targets), images.shape[-2:], alpha, random))


def _interval(length: int, size: int, random: np.random.Generator) -> tuple[int, int]:
    """``length`` pixels around a uniform centre in ``0..size − 1``, clipped to the image: (start, end)."""
    start = int(random.integers(size)) - length // 2
    return max(start, 0), min(start + length, size)


def remix(targets: MixedTargets, class_counts: Tensor, *, kappa: float = REMIX_KAPPA, tau: float = REMIX_TAU):
    r"""Targets of mixed images that favour the smaller class (Remix; Chou et al., ECCV Workshops 2020).

    With λ the share of the first image and n, m the training images of the first and second class,

    .. math:: \lambda_y = 0 \text{ if } n/m \ge \kappa,\ \lambda < \tau;\quad
              1 \text{ if } n/m \le 1/\kappa,\ 1-\lambda < \tau;\quad \lambda \text{ otherwise.}

    Args:
        class_counts: training images of each class, ``(K,)``.

    Returns:
        `MixedTargets` with a share of each sample's own, ``(B,)``.
    """
    first, second, share = targets
    ratio = class_counts[first] / class_counts[second]
    shares = torch.as_tensor(share, dtype=torch.get_default_dtype(), device=first.device).expand(first.shape)
    shares = torch.where((ratio >= kappa) & (shares < tau), 0.0, shares)
    shares = torch.where((ratio <= 1 / kappa) & (1 - shares < tau), 1.0, shares)
    return MixedTargets(first, second, shares)


def mix(
    images: Tensor,
    targets: Tensor,
    random: np.random.Generator,
    *,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    remix_counts: Tensor | None = None,
) -> tuple[Tensor, Tensor | MixedTargets]:
    """Mix a batch as `draw_mixing` says.

    Args:
        remix_counts: training images of each class, for `remix` targets; None leaves them as the mixing says.
    """
    mixing = draw_mixing(len(targets), images.shape[-2:], random, mixup=mixup, cutmix=cutmix)
    if mixing is None:
        return images, targets
    mixed, both = _mixed(images, targets, mixing)
    return mixed, both if remix_counts is None else remix(both, remix_counts)
