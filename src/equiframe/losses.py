r"""Losses: a pure function first, then a thin module with the contract ``loss(output, targets)``.

Targets are integer classes ``(B,)``, class probabilities ``(B, K)``, or `MixedTargets` (what mixup makes: two classes
and a share), so that a loss which needs one class vector a sample never has to look at K of them. Every loss is linear
in the target distribution q: :math:`L(q) = \sum_k q_k L(k)`.

Class weighting is an argument with a name, on every loss:

``none``            each sample counts once.
``batch-balanced``  sample of class c counts B/(C·n_c), with n_c its (soft) count among the C classes of the batch. The
                    mean is then exactly the macro-average over the classes in the batch. The released code of Yang et
                    al. does this by default to dot regression (through its per-batch E_W), and to nothing else.
``class-balanced``  sample of class c counts N/(K·n_c) with n_c from the training set: inverse frequency, mean weight 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equiframe.angular import angular_regression
from equiframe.errors import InputError, unknown
from equiframe.heads import FrameHead, HeadOutput

CLASS_WEIGHTINGS = ("none", "batch-balanced", "class-balanced")


class MixedTargets(NamedTuple):
    """Sample i is class ``first[i]`` with share ``share`` and class ``second[i]`` with the rest."""

    first: Tensor
    second: Tensor
    share: Tensor | float


Targets = Tensor | MixedTargets


# --- pure functions ---------------------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    r"""Cross-entropy of a sample: :math:`-\sum_j \big((1-\epsilon)\delta_{jc} + \epsilon/K\big) \log p_j`.

    Shapes: logits ``(B, K)``, integer targets ``(B,)`` → ``(B,)``. Range [0, ∞).
    """
    return F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")


def adjust_logits(logits: Tensor, class_counts: Tensor, *, tau: float = 1.0) -> Tensor:
    r"""Logits plus the log prior: :math:`z_k + \tau \log(n_k/N)`, ``(B, K) → (B, K)``.

    Cross-entropy on these is logit adjustment (Menon et al., ICLR 2021) and, for τ = 1, balanced softmax (Ren et al.,
    NeurIPS 2020); prediction uses the plain logits, whose arg-max then aims at the balanced error.
    """
    return logits + tau * torch.log(class_counts / class_counts.sum())


def dot_regression(products: Tensor, *, e_w: float = 1.0, e_h: float = 1.0) -> Tensor:
    r"""Dot regression as the paper writes it.

    .. math:: L = \frac{1}{2\sqrt{E_W E_H}}\big(w_c^\top h - \sqrt{E_W E_H}\big)^2

    With :math:`\lVert h\rVert^2 = E_H` its gradient is :math:`-(1-\cos\angle(h, w_c))\,w_c`: the pull of cross-entropy
    with 1−p replaced by 1−cos, and no push. Zero exactly at :math:`h = \sqrt{E_H/E_W}\,w_c`.

    Args:
        products: :math:`w_c^\top h`, any shape; the class vectors have squared length E_W.

    Range: [0, 2√(E_W E_H)] on the ball. Source: Yang et al., NeurIPS 2022, as quoted in issue 3 of their repository.
    """
    bound = math.sqrt(e_w * e_h)
    return (products - bound) ** 2 / (2 * bound)


def released_dot_regression(
    products: Tensor, feature_lengths: Tensor, *, e_w: float = 1.0, length_penalty: float = 0.0
) -> Tensor:
    r"""Dot regression as the authors' released code computes it.

    .. math:: L = \frac{(w_c^\top h - \sqrt{E_W}\,\bar\ell)^2}{2\bar\ell} + \lambda\lVert h\rVert, \qquad
              \bar\ell = \mathrm{detach}(\lVert h\rVert)

    The length is measured, not bounded, is a constant for the gradient, and √E_W is missing from the denominator.
    For unit features and E_W = 1 the value is that of `dot_regression`. With free lengths the radial gradient pushes
    ‖h‖ up, which is what the penalty λ (0.01 in their ImageNet recipe, else 0) holds.

    Args:
        products: :math:`w_c^\top h`.
        feature_lengths: ‖h‖, of a shape that broadcasts with ``products``.

    Source: ``methods.dot_loss`` of NeuralCollapseApplications/ImbalancedLearning (commit 2ebb309).
    """
    lengths = feature_lengths.detach().clamp_min(1e-8)
    loss = (products - math.sqrt(e_w) * lengths) ** 2 / (2 * lengths)
    return loss + length_penalty * feature_lengths if length_penalty else loss


def target_counts(targets: Targets, num_classes: int) -> Tensor:
    """How much of each class the batch holds, ``(K,)`` float; mixed and soft targets count by their share."""
    if isinstance(targets, MixedTargets):
        first, second, share = targets
        share = torch.as_tensor(share, device=first.device, dtype=torch.get_default_dtype()).expand(first.shape)
        counts = torch.zeros(num_classes, device=first.device, dtype=share.dtype)
        return counts.index_add(0, first, share).index_add(0, second, 1 - share)
    if targets.is_floating_point():
        return targets.sum(0)
    return torch.bincount(targets, minlength=num_classes).to(torch.get_default_dtype())


def batch_balanced_weights(targets: Targets, num_classes: int) -> Tensor:
    """Weights B/(C·n_k) of the classes in a batch, ``(K,)``; 0 for absent classes, which nothing meets."""
    counts = target_counts(targets, num_classes)
    present = counts > 0
    return torch.where(present, counts.sum() / (present.sum() * counts.clamp_min(1e-12)), 0.0)


def class_balanced_weights(class_counts: Tensor) -> Tensor:
    """Weights N/(K·n_k) from the training set, ``(K,)``: their mean over the training samples is 1."""
    return class_counts.sum() / (len(class_counts) * class_counts)


# --- modules ----------------------------------------------------------------------------------------------------------


class Loss(nn.Module):
    """``loss(output, targets) -> scalar``: the weighted mean over the batch.

    A subclass gives the loss of hard targets, ``per_target(output, targets (B,)) -> (B,)``, and of all classes,
    ``per_class(output) -> (B, K)``, which only dense soft targets need.

    Args:
        class_weighting: a name in `CLASS_WEIGHTINGS`.
        class_counts: training images of each class; needed where a formula has n_k in it.
    """

    class_counts: Tensor | None

    def __init__(
        self, *, class_weighting: str = "none", class_counts: Sequence[int] | Tensor | None = None, needs_counts=False
    ) -> None:
        super().__init__()
        if class_weighting not in CLASS_WEIGHTINGS:
            raise unknown("class weighting", class_weighting, CLASS_WEIGHTINGS)
        self.class_weighting = class_weighting
        if class_counts is not None:
            class_counts = torch.as_tensor(class_counts, dtype=torch.get_default_dtype())
        if needs_counts or class_weighting == "class-balanced":
            if class_counts is None:
                raise InputError(f"{type(self).__name__} needs class_counts (training images of each class)")
            if bool((class_counts < 1).any()):
                empty = int((class_counts < 1).nonzero()[0])
                raise InputError(
                    f"class {empty} has no training image: {type(self).__name__} needs at least one of each"
                )
        self.register_buffer("class_counts", class_counts, persistent=False)

    def per_target(self, output: HeadOutput, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def per_class(self, output: HeadOutput) -> Tensor:
        raise NotImplementedError

    def forward(self, output: HeadOutput, targets: Targets) -> Tensor:
        weights = self._class_weights(targets, output.head.num_classes)
        if isinstance(targets, MixedTargets):
            first, second, share = targets
            losses = share * self._hard(output, first, weights) + (1 - share) * self._hard(output, second, weights)
        elif targets.is_floating_point():
            shares = targets if weights is None else targets * weights
            losses = (shares * self.per_class(output)).sum(1)
        else:
            losses = self._hard(output, targets, weights)
        return losses.mean()

    def _hard(self, output: HeadOutput, targets: Tensor, weights: Tensor | None) -> Tensor:
        losses = self.per_target(output, targets)
        return losses if weights is None else losses * weights[targets]

    def _class_weights(self, targets: Targets, num_classes: int) -> Tensor | None:
        if self.class_weighting == "batch-balanced":
            return batch_balanced_weights(targets, num_classes)
        if self.class_weighting == "class-balanced":
            return class_balanced_weights(self.class_counts)
        return None


class CrossEntropy(Loss):
    """`cross_entropy` of the head's logits, with optional label smoothing."""

    def __init__(self, *, label_smoothing: float = 0.0, **kwargs) -> None:
        super().__init__(**kwargs)
        if not 0 <= label_smoothing < 1:
            raise InputError(f"label_smoothing must be in [0, 1), got {label_smoothing!r}")
        self.label_smoothing = label_smoothing

    def training_logits(self, output: HeadOutput) -> Tensor:
        return output.logits

    def per_target(self, output: HeadOutput, targets: Tensor) -> Tensor:
        return cross_entropy(self.training_logits(output), targets, label_smoothing=self.label_smoothing)

    def per_class(self, output: HeadOutput) -> Tensor:
        surprise = -F.log_softmax(self.training_logits(output), dim=1)
        return (1 - self.label_smoothing) * surprise + self.label_smoothing * surprise.mean(1, keepdim=True)


class LogitAdjustedCrossEntropy(CrossEntropy):
    """Cross-entropy of `adjust_logits`: logit adjustment with strength τ (Menon et al., ICLR 2021)."""

    def __init__(self, *, tau: float = 1.0, **kwargs) -> None:
        super().__init__(needs_counts=True, **kwargs)
        self.tau = float(tau)

    def training_logits(self, output: HeadOutput) -> Tensor:
        return adjust_logits(output.logits, self.class_counts, tau=self.tau)


class BalancedSoftmax(LogitAdjustedCrossEntropy):
    """Balanced softmax (Ren et al., NeurIPS 2020): logit adjustment at τ = 1."""

    def __init__(self, **kwargs) -> None:
        super().__init__(tau=1.0, **kwargs)


def _frame_head(output: HeadOutput, loss: nn.Module) -> FrameHead:
    if not isinstance(output.head, FrameHead):
        raise InputError(f"{type(loss).__name__} needs a frame head, got {type(output.head).__name__}")
    return output.head


class DotRegression(Loss):
    """`dot_regression` with the head's E_W and E_H. Never looks at more than the target's class vector."""

    def _loss(self, products: Tensor, output: HeadOutput, head: FrameHead) -> Tensor:
        return dot_regression(products, e_w=head.e_w, e_h=head.e_h)

    def per_target(self, output: HeadOutput, targets: Tensor) -> Tensor:
        head = _frame_head(output, self)
        return self._loss((output.features * head.vectors(targets)).sum(1), output, head)

    def per_class(self, output: HeadOutput) -> Tensor:
        head = _frame_head(output, self)
        return self._loss(head.products(output.features).T, output, head).T


class ReleasedDotRegression(DotRegression):
    """`released_dot_regression`: what the authors' code computes, with its optional penalty on ‖h‖."""

    def __init__(self, *, length_penalty: float = 0.0, **kwargs) -> None:
        super().__init__(**kwargs)
        self.length_penalty = float(length_penalty)

    def _loss(self, products: Tensor, output: HeadOutput, head: FrameHead) -> Tensor:
        lengths = torch.linalg.vector_norm(output.features, dim=1)
        return released_dot_regression(products, lengths, e_w=head.e_w, length_penalty=self.length_penalty)


class AngularRegression(Loss):
    """`angular_regression` with s = √(E_W E_H): dot regression's optimum and pull, with a linear rate at every s."""

    def per_target(self, output: HeadOutput, targets: Tensor) -> Tensor:
        head = _frame_head(output, self)
        return angular_regression(output.features, head.vectors(targets), scale=math.sqrt(head.e_w * head.e_h))

    def per_class(self, output: HeadOutput) -> Tensor:
        head = _frame_head(output, self)
        classes = torch.arange(head.num_classes, device=output.features.device)
        return torch.stack([self.per_target(output, k.expand(len(output.features))) for k in classes], dim=1)
