r"""Losses: a pure function first, then a thin module with the contract ``loss(output, targets)``.

Targets are integer classes ``(B,)``, class probabilities ``(B, K)``, or `MixedTargets` (what mixup makes: two classes
and a share), so that a loss which needs one class vector a sample never has to look at K of them. Every loss is linear
in the target distribution q: :math:`L(q) = \sum_k q_k L(k)`.

Class weighting is an argument with a name, on every loss:

``none``              each sample counts once.
``batch-balanced``    sample of class c counts B/(C·n_c), with n_c its (soft) count among the C classes of the batch. The
                      mean is then exactly the macro-average over the classes in the batch. The released code of Yang et
                      al. does this by default to dot regression (through its per-batch E_W), and to nothing else.
``class-balanced``    sample of class c counts N/(K·n_c) with n_c from the training set: inverse frequency, mean weight 1.
``effective-number``  in proportion to (1−β)/(1−β^n_c), the weights of the K classes summing to K (Cui et al., CVPR 2019).
                      On a long tail their mean over the training set is far below 1, and so is the step that they make.
``effective-number-mean``  the same, divided by their mean over the batch, as PyTorch's weighted cross-entropy and with it
                      the released code of Cao et al. (LDAM-DRW) do.

The weighting may begin late (``reweight_from``): deferred re-weighting (Cao et al., NeurIPS 2019).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equiframe.angular import angular_regression
from equiframe.errors import InputError, unknown
from equiframe.heads import FrameHead, HeadOutput
from equiframe.transport import transport_cost

CLASS_WEIGHTINGS = ("none", "batch-balanced", "class-balanced", "effective-number", "effective-number-mean")


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


def sampled_cross_entropy(own: Tensor, others: Tensor, targets: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    r"""Cross-entropy of a sample with the partition function estimated from n classes that were drawn uniformly:

    .. math:: L = -z_c + \log\Big(e^{z_c} + \frac Kn \sum_{i:\,s_i \ne c} e^{z_{s_i}}\Big)

    The bracket's expectation over the draws (each of the K classes alike, with replacement) is the whole sum :math:`\sum_k e^{z_k}`;
    the loss's own is at most that of cross-entropy (Jensen), by O(1/n).

    Shapes: own logits :math:`z_c` ``(B,)``, logits of the drawn classes ``(B, n)``, targets ``(B,)``, drawn classes ``(n,)`` → ``(B,)``.
    Range [0, ∞). Source: Bengio & Senécal, *Adaptive importance sampling*, 2008; Jean et al., ACL 2015 (there with another proposal).
    """
    others = (others + math.log(num_classes / len(classes))).masked_fill(classes == targets[:, None], -math.inf)
    return torch.logsumexp(torch.cat([own[:, None], others], 1), 1) - own


def adjust_logits(logits: Tensor, class_counts: Tensor, *, tau: float = 1.0) -> Tensor:
    r"""Logits plus the log prior: :math:`z_k + \tau \log(n_k/N)`, ``(B, K) → (B, K)``.

    Cross-entropy on these is logit adjustment (Menon et al., ICLR 2021) and, for τ = 1, balanced softmax (Ren et al.,
    NeurIPS 2020); prediction uses the plain logits, whose arg-max then aims at the balanced error.
    """
    return logits + tau * torch.log(class_counts / class_counts.sum())


def focal_loss(logits: Tensor, targets: Tensor, *, gamma: float = 2.0) -> Tensor:
    r"""Focal loss of a sample, in its softmax form: :math:`-(1-p_c)^\gamma \log p_c`.

    γ = 0 is cross-entropy. Shapes: logits ``(B, K)``, integer targets ``(B,)`` → ``(B,)``. Range [0, ∞).

    Source: Lin et al., ICCV 2017, eq. 4; their α_c is the class weighting.
    """
    return _focal(cross_entropy(logits, targets), gamma)


def _focal(surprise: Tensor, gamma: float) -> Tensor:
    missing = -torch.expm1(-surprise)  # 1 − p, without cancellation near p = 1
    return missing.clamp_min(torch.finfo(missing.dtype).tiny) ** gamma * surprise


def ldam_margins(class_counts: Tensor, *, max_margin: float = 0.5) -> Tensor:
    r"""Margins :math:`\Delta_k = C/n_k^{1/4}` of cosines, ``(K,)``, with C such that the largest is ``max_margin``.

    Source: Cao et al., NeurIPS 2019, eq. 13; 0.5 in their released code.
    """
    margins = class_counts**-0.25
    return max_margin * margins / margins.max()


def vector_scaling(logits: Tensor, class_counts: Tensor, *, gamma: float, tau: float) -> Tensor:
    r"""Logits of the VS loss: :math:`\Delta_k z_k + \tau\log(n_k/N)` with :math:`\Delta_k = (n_k/n_{max})^\gamma`.

    γ = 0 is `adjust_logits`. ``(B, K) → (B, K)``. Source: Kini et al., NeurIPS 2021, and their released code.
    """
    return adjust_logits(logits * (class_counts / class_counts.max()) ** gamma, class_counts, tau=tau)


def squared_error(logits: Tensor, *, kappa: float = 1.0, target: float = 1.0) -> Tensor:
    r"""Squared error to one-hot targets, of every class as the target, ``(B, K) → (B, K)``.

    .. math:: L(c) = \frac1K\Big(\kappa\,(z_c - M)^2 + \sum_{j\ne c} z_j^2\Big)

    Args:
        kappa: κ, the weight of the target's own term; target: M. Hui & Belkin take κ = M = 1 for few classes and larger
            values for many (their rule begins at 42 classes).

    Averaged over a soft target q at κ = M = 1 it is ‖z−q‖²/K plus a constant. Source: Hui & Belkin, ICLR 2021.
    """
    squares = logits**2
    own = kappa * (logits - target) ** 2
    return (squares.sum(1, keepdim=True) - squares + own) / logits.shape[1]


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


def target_counts(targets: Targets, num_classes: int, sample_weights: Tensor | None = None) -> Tensor:
    """How much of each class the batch holds, ``(K,)`` float; mixed and soft targets count by their share, and samples
    by their weight ``(B,)`` where one is given."""
    if sample_weights is not None:
        shares = target_shares(targets, num_classes)
        return (sample_weights.to(shares.dtype)[:, None] * shares).sum(0)
    if isinstance(targets, MixedTargets):
        first, second, share = targets
        share = torch.as_tensor(share, device=first.device, dtype=torch.get_default_dtype()).expand(first.shape)
        counts = torch.zeros(num_classes, device=first.device, dtype=share.dtype)
        return counts.index_add(0, first, share).index_add(0, second, 1 - share)
    if targets.is_floating_point():
        return targets.sum(0)
    return torch.bincount(targets, minlength=num_classes).to(torch.get_default_dtype())


def target_shares(targets: Targets, num_classes: int) -> Tensor:
    """How much of each class a sample is, ``(B, K)`` float."""
    if isinstance(targets, MixedTargets):
        first, second = (F.one_hot(classes, num_classes) for classes in targets[:2])
        share = torch.as_tensor(targets.share, device=first.device, dtype=torch.get_default_dtype())
        share = share.expand(len(first))[:, None]
        return share * first + (1 - share) * second
    if targets.is_floating_point():
        return targets
    return F.one_hot(targets, num_classes).to(torch.get_default_dtype())


def rows_of(targets: Targets, rows: Tensor) -> Targets:
    """The targets of some samples of a batch."""
    if not isinstance(targets, MixedTargets):
        return targets[rows]
    first, second, share = targets
    return MixedTargets(first[rows], second[rows], share[rows] if isinstance(share, Tensor) and share.ndim else share)


def batch_balanced_weights(targets: Targets, num_classes: int, sample_weights: Tensor | None = None) -> Tensor:
    """Weights B/(C·n_k) of the classes in a batch, ``(K,)``; 0 for absent classes, which nothing meets. With weights of
    the samples, n_k is their sum in class k, and B that of all."""
    counts = target_counts(targets, num_classes, sample_weights)
    present = counts > 0
    return torch.where(present, counts.sum() / (present.sum() * counts.clamp_min(1e-12)), 0.0)


def class_balanced_weights(class_counts: Tensor) -> Tensor:
    """Weights N/(K·n_k) from the training set, ``(K,)``: their mean over the training samples is 1."""
    return class_counts.sum() / (len(class_counts) * class_counts)


def effective_number_weights(class_counts: Tensor, *, beta: float = 0.9999) -> Tensor:
    r"""Weights in proportion to the inverse effective number of images, :math:`(1-\beta)/(1-\beta^{n_k})`, ``(K,)``.

    They sum to K. β = 0 gives ones, β → 1 the inverse frequency. Source: Cui et al., CVPR 2019.
    """
    effective = -torch.expm1(class_counts.double() * (math.log(beta) if beta else -math.inf))
    weights = 1 / effective
    return (len(weights) * weights / weights.sum()).to(class_counts.dtype)


# --- modules ----------------------------------------------------------------------------------------------------------


class Loss(nn.Module):
    """``loss(output, targets) -> scalar``: the weighted mean over the batch.

    Where a batch is one part of a step (of one process of several, or of gradient accumulation), ``together`` gives the targets of
    the whole step: weights that depend on the batch are then the step's. The mean of the parts' losses, each weighted by
    its share of the samples, is the loss of the step. What depends on the features of a batch (``alignment``, a head that
    observes) is over all processes (``head.world``) and over one part at a time.

    ``sample_weights (B,)``, ≥ 0, say how much each sample counts: the loss is the mean of weight times loss over the batch
    (divide them by their mean over the training set to keep the size of a step), and whatever counts the classes of a
    batch counts by weight. ``alignment`` knows no weights.

    A subclass gives the loss of hard targets, ``per_target(output, targets (B,)) -> (B,)``, and may give that of all
    classes, ``per_class(output) -> (B, K)``, in less time; only dense soft targets need it.

    Args:
        class_weighting: a name in `CLASS_WEIGHTINGS`.
        class_counts: training images of each class; needed where a formula has n_k in it.
        reweight_from: share of the run in [0, 1) after which the class weighting begins; `at` tells how far the run is.
        effective_beta: β in [0, 1) of the effective number.
        alignment: weight λ ≥ 0 of `transport_cost` between the features and the frame, which is added to the mean: that
            of a frame head, else that of the head's ``aligner`` (Gao et al., ICML 2024: λ = 0.1).
    """

    class_counts: Tensor | None
    fixed_weights: Tensor | None

    def __init__(
        self,
        *,
        class_weighting: str = "none",
        class_counts: Sequence[int] | Tensor | None = None,
        reweight_from: float = 0.0,
        effective_beta: float = 0.9999,
        alignment: float = 0.0,
        needs_counts: bool = False,
    ) -> None:
        super().__init__()
        if class_weighting not in CLASS_WEIGHTINGS:
            raise unknown("class weighting", class_weighting, CLASS_WEIGHTINGS)
        for name, value in (("reweight_from", reweight_from), ("effective_beta", effective_beta)):
            _check_range(name, value, below=1)
        _check_range("alignment", alignment)
        self.class_weighting, self.reweight_from, self.alignment = class_weighting, reweight_from, float(alignment)
        if class_counts is not None:
            class_counts = torch.as_tensor(class_counts, dtype=torch.get_default_dtype())
        if needs_counts or class_weighting not in ("none", "batch-balanced"):
            if class_counts is None:
                raise InputError(f"{type(self).__name__} needs class_counts (training images of each class)")
            if bool((class_counts < 1).any()):
                empty = int((class_counts < 1).nonzero()[0])
                raise InputError(
                    f"class {empty} has no training image: {type(self).__name__} needs at least one of each"
                )
        self.register_buffer("class_counts", class_counts, persistent=False)
        weights = None
        if class_weighting == "class-balanced":
            weights = class_balanced_weights(self.counts)
        elif class_weighting.startswith("effective-number"):
            weights = effective_number_weights(self.counts, beta=effective_beta)
        self.register_buffer("fixed_weights", weights, persistent=False)
        self.at(0.0)

    @property
    def counts(self) -> Tensor:
        """``class_counts`` where they are needed, and so known."""
        assert self.class_counts is not None
        return self.class_counts

    def at(self, done: float) -> None:
        """Say that a share ``done`` in [0, 1] of the run is done: from ``reweight_from`` on, classes are weighted."""
        self.reweights = done >= self.reweight_from

    def per_target(self, output: HeadOutput, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def per_class(self, output: HeadOutput) -> Tensor:
        classes = torch.arange(output.head.num_classes, device=output.features.device)
        return torch.stack([self.per_target(output, k.expand(len(output.features))) for k in classes], dim=1)

    def forward(
        self,
        output: HeadOutput,
        targets: Targets,
        together: Targets | None = None,
        sample_weights: Tensor | None = None,
    ) -> Tensor:
        if not isinstance(output, HeadOutput):
            raise InputError(f"{type(self).__name__} takes what a head returns: loss(head(features), targets)")
        head = output.head
        if self.class_counts is not None and len(self.class_counts) != head.num_classes:
            raise InputError(
                f"{len(self.class_counts)} class counts were given for a head of {head.num_classes} classes"
            )
        if head.observes and head.training:
            shares = target_shares(targets, head.num_classes)
            head.observe(output.features, shares if sample_weights is None else sample_weights[:, None] * shares)
        if sample_weights is not None and together is not None:
            raise InputError("sample_weights are those of one batch: they do not go with the targets of a whole step")
        of_step = targets if together is None else together
        weights = self._class_weights(of_step, head.num_classes, sample_weights) if self.reweights else None
        if isinstance(targets, MixedTargets):
            first, second, share = targets
            losses = share * self._hard(output, first, weights) + (1 - share) * self._hard(output, second, weights)
        elif targets.is_floating_point():
            shares = targets if weights is None else targets * weights
            losses = (shares * self.per_class(output)).sum(1)
        else:
            losses = self._hard(output, targets, weights)
        if sample_weights is not None:
            losses = sample_weights * losses
        return losses.mean() + self.alignment * _transport(output) if self.alignment else losses.mean()

    def _hard(self, output: HeadOutput, targets: Tensor, weights: Tensor | None) -> Tensor:
        losses = self.per_target(output, targets)
        return losses if weights is None else losses * weights[targets]

    def _class_weights(self, targets: Targets, num_classes: int, sample_weights: Tensor | None) -> Tensor | None:
        if self.class_weighting == "batch-balanced":
            return batch_balanced_weights(targets, num_classes, sample_weights)
        if self.class_weighting == "effective-number-mean":
            counts = target_counts(targets, num_classes, sample_weights)
            assert self.fixed_weights is not None
            return self.fixed_weights * counts.sum() / (self.fixed_weights * counts).sum()
        return self.fixed_weights


def _check_range(name: str, value: float, *, below: float = math.inf) -> None:
    if not 0 <= value < below:
        allowed = "at least 0 and finite" if below == math.inf else f"in [0, {below:g})"
        raise InputError(f"{name} must be {allowed}, got {value!r}")


def _transport(output: HeadOutput) -> Tensor:
    """`transport_cost` from the features to the frame that they are to align with."""
    head = output.head if isinstance(output.head, FrameHead) else output.head.aligner
    if head is None:
        raise InputError("alignment needs a frame: take a frame head, or set head.aligner to one")
    features = output.features if head is output.head else head(output.raw).features
    return transport_cost(output.head.world.batch(features), head.class_vectors())


class CrossEntropy(Loss):
    """`cross_entropy` of the head's logits, with optional label smoothing.

    ``pull_and_push``: whether its gradient is p − δ by the head's logits, which tracking splits."""

    pull_and_push = True

    def __init__(self, *, label_smoothing: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check_range("label_smoothing", label_smoothing, below=1)
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

    def __init__(self, *, tau: float = 1.0, **kwargs: Any) -> None:
        super().__init__(needs_counts=True, **kwargs)
        self.tau = float(tau)

    def training_logits(self, output: HeadOutput) -> Tensor:
        return adjust_logits(output.logits, self.counts, tau=self.tau)


class BalancedSoftmax(LogitAdjustedCrossEntropy):
    """Balanced softmax (Ren et al., NeurIPS 2020): logit adjustment at τ = 1."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(tau=1.0, **kwargs)


class SampledCrossEntropy(Loss):
    """`sampled_cross_entropy` of the head's logits: B·n instead of B·K of them a step. With τ > 0 logit-adjusted (`adjust_logits`).

    Each call draws classes from torch's global generator, shared by the batch. In evaluation mode, where n ≥ K, and for dense soft
    targets it is cross-entropy on all classes.

    Args:
        sampled_classes: n, 1 or more.
        tau: τ of the logit adjustment; above 0 it needs ``class_counts``.
    """

    def __init__(self, *, sampled_classes: int = 1024, tau: float = 0.0, **kwargs: Any) -> None:
        super().__init__(needs_counts=tau > 0, **kwargs)
        _check_range("tau", tau)
        if sampled_classes < 1:
            raise InputError(f"sampled_classes must be at least 1, got {sampled_classes!r}")
        self.sampled_classes, self.tau = int(sampled_classes), float(tau)

    def per_target(self, output: HeadOutput, targets: Tensor) -> Tensor:
        head, features = output.head, output.features
        if not self.training or self.sampled_classes >= head.num_classes:
            return cross_entropy(self._adjusted(output.logits), targets)
        classes = torch.randint(head.num_classes, (self.sampled_classes,), device=features.device)
        own, others = head.logits_of_own(features, targets), head.logits_of(features, classes)
        if self.tau:
            prior = self.tau * torch.log(self.counts / self.counts.sum())
            own, others = own + prior[targets], others + prior[classes]
        return sampled_cross_entropy(own, others, targets, classes, head.num_classes)

    def per_class(self, output: HeadOutput) -> Tensor:
        return -F.log_softmax(self._adjusted(output.logits), dim=1)

    def _adjusted(self, logits: Tensor) -> Tensor:
        return adjust_logits(logits, self.counts, tau=self.tau) if self.tau else logits


class FocalLoss(Loss):
    """`focal_loss` of the head's logits."""

    def __init__(self, *, focal_gamma: float = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check_range("focal_gamma", focal_gamma)
        self.gamma = float(focal_gamma)

    def per_target(self, output: HeadOutput, targets: Tensor) -> Tensor:
        return focal_loss(output.logits, targets, gamma=self.gamma)

    def per_class(self, output: HeadOutput) -> Tensor:
        return _focal(-F.log_softmax(output.logits, dim=1), self.gamma)


class LDAM(Loss):
    r"""Label-distribution-aware margins: cross-entropy after the margin of `ldam_margins` is taken off the own cosine.

    .. math:: L = -\log\frac{e^{s(\cos_c - \Delta_c)}}{e^{s(\cos_c - \Delta_c)} + \sum_{j\ne c} e^{s\cos_j}}

    s is the head's ``cosine_scale`` (30 in the authors' code); margins are cosines, so the head must have one.

    Source: Cao et al., NeurIPS 2019, eq. 12 and 13.
    """

    margins: Tensor

    def __init__(self, *, max_margin: float = 0.5, **kwargs: Any) -> None:
        super().__init__(needs_counts=True, **kwargs)
        _check_range("max_margin", max_margin, below=2)
        self.register_buffer("margins", ldam_margins(self.counts, max_margin=max_margin), persistent=False)

    def per_target(self, output: HeadOutput, targets: Tensor) -> Tensor:
        scale = output.head.cosine_scale
        if scale is None:
            raise InputError("LDAM sets margins of cosines and needs a cosine or frame head with length='unit'")
        margins = scale * self.margins.to(output.logits.dtype)[targets, None]
        return cross_entropy(output.logits.scatter_add(1, targets[:, None], -margins), targets)


class VectorScaling(CrossEntropy):
    """The VS loss: cross-entropy of `vector_scaling` (Kini et al., NeurIPS 2021; defaults of their released code)."""

    pull_and_push = False  # Δ_k stands before each

    def __init__(self, *, vs_gamma: float = 0.3, tau: float = 1.0, **kwargs: Any) -> None:
        super().__init__(needs_counts=True, **kwargs)
        _check_range("vs_gamma", vs_gamma)
        self.gamma, self.tau = float(vs_gamma), float(tau)

    def training_logits(self, output: HeadOutput) -> Tensor:
        return vector_scaling(output.logits, self.counts, gamma=self.gamma, tau=self.tau)


class SquaredError(Loss):
    """`squared_error` of the head's logits (Hui & Belkin, ICLR 2021)."""

    def __init__(self, *, mse_kappa: float = 1.0, mse_target: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, value in (("mse_kappa", mse_kappa), ("mse_target", mse_target)):
            if not (value > 0 and math.isfinite(value)):
                raise InputError(f"{name} must be a positive number, got {value!r}")
        self.kappa, self.target = float(mse_kappa), float(mse_target)

    def per_class(self, output: HeadOutput) -> Tensor:
        return squared_error(output.logits, kappa=self.kappa, target=self.target)

    def per_target(self, output: HeadOutput, targets: Tensor) -> Tensor:
        return self.per_class(output).gather(1, targets[:, None])[:, 0]


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
        return self._loss(output.target_products(targets), output, head)

    def per_class(self, output: HeadOutput) -> Tensor:
        head = _frame_head(output, self)
        return self._loss(output.products().T, output, head).T


class ReleasedDotRegression(DotRegression):
    """`released_dot_regression`: what the authors' code computes, with its optional penalty on ‖h‖."""

    def __init__(self, *, length_penalty: float = 0.0, **kwargs: Any) -> None:
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
