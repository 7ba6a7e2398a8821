"""Mixing the images of a batch in pairs: mixup, cutmix, and remix for their targets."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from equiframe.losses import MixedTargets

REMIX_KAPPA, REMIX_TAU = 3.0, 0.5


def _partners(count: int, random: np.random.Generator, device: torch.device) -> Tensor:
    return torch.from_numpy(random.permutation(count)).to(device)


def mix_up(images: Tensor, targets: Tensor, alpha: float, random: np.random.Generator) -> tuple[Tensor, MixedTargets]:
    r"""Mixup (Zhang et al., ICLR 2018): :math:`\lambda x_i + (1-\lambda) x_{\pi(i)}`, one λ ~ Beta(α, α) a batch."""
    share = float(random.beta(alpha, alpha))
    order = _partners(len(targets), random, images.device)
    return torch.lerp(images[order], images, share), MixedTargets(targets, targets[order], share)


def cut_mix(images: Tensor, targets: Tensor, alpha: float, random: np.random.Generator) -> tuple[Tensor, MixedTargets]:
    r"""Cutmix (Yun et al., ICCV 2019): a box of image π(i) replaces that of image i, the same box for the whole batch.

    λ ~ Beta(α, α) a batch; the box has sides :math:`\sqrt{1-\lambda}` of the image's (whole pixels) around a uniform
    centre and is clipped at the border. The share of the first target is what the clipped box left of the image,
    exactly: 1 − box area / (H·W).
    """
    h, w = images.shape[-2:]
    side = (1 - random.beta(alpha, alpha)) ** 0.5
    order = _partners(len(targets), random, images.device)
    top, bottom = _interval(int(h * side), h, random)
    left, right = _interval(int(w * side), w, random)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[order, :, top:bottom, left:right]
    share = 1 - (bottom - top) * (right - left) / (h * w)
    return mixed, MixedTargets(targets, targets[order], share)


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
    """Mix a batch as asked: by mixup, cutmix, one of the two with probability ½ each, or (both 0) not at all.

    Args:
        mixup: α of mixup; 0 is off. ``cutmix`` likewise.
        remix_counts: training images of each class, for `remix` targets; None leaves them as the mixing says.
    """
    if not mixup and not cutmix:
        return images, targets
    box = bool(cutmix) and (not mixup or random.random() < 0.5)
    mixed, both = cut_mix(images, targets, cutmix, random) if box else mix_up(images, targets, mixup, random)
    return mixed, both if remix_counts is None else remix(both, remix_counts)
