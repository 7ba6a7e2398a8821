"""Second stages: a better classifier on features that stay as they are.

The features of the training images, not augmented, are computed once; every stage works on this ``(N, D)`` tensor, so
that it takes seconds. Each ends in an affine map of the features as the trained head normalises them (`AffineHead`).
What has a free number (τ) chooses it by macro accuracy on validation images, never on test images.

Class-balanced sampling draws a class, then one of its images. Its expected loss is the mean over classes of the mean
loss of a class, which is minimised here as it stands, by L-BFGS, instead of by samples:

.. math:: \\frac{1}{K} \\sum_k \\frac{1}{n_k} \\sum_{i \\in k} \\ell_i + \\frac{\\lambda}{2} \\lVert\\theta\\rVert^2

The weight decay λ makes the minimum unique where θ enters linearly. It is 5e-4, that of Kang et al., but for ``crt-adjusted`` and ``crt-blend``, which measure
features by their `spread` first: longer features need shorter class vectors for the same logits, and would be held back less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from equiframe.data.batches import Loader
from equiframe.data.prepare import PreparedData
from equiframe.data.sources import ImageSet
from equiframe.evaluate import class_recall, fit_temperature
from equiframe.heads import AffineHead, Head, affine_map
from equiframe.method import build_head
from equiframe.model import Classifier, ModelCard
from equiframe.modelcard import CROSS_FITTED
from equiframe.numerics import Numerics
from equiframe.recipe import Recipe
from equiframe.tracking import make_loader

WEIGHT_DECAY = 5e-4
SPREAD_DECAY = 2.5e-5  # for features of spread 1; best for frames and linear layers alike: docs/lab.md
LOGITS_AT_ONCE = 1 << 26  # 256 MiB in float32
TAU_NORM_GRID = [i / 20 for i in range(21)]  # 0, 0.05, …, 1
POST_HOC_GRID = [i / 20 for i in range(61)]  # 0, 0.05, …, 3


@dataclass(frozen=True)
class Features:
    """``features (N, D)`` as they meet the class vectors, ``labels (N,)``."""

    features: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Stage:
    """What a second stage may use.

    Attributes:
        weight, bias: ``(K, D)`` and ``(K,)``: the trained head as an affine map of its features.
        training: the training images.
        validation: the validation images, or None.
        counts: ``(K,)`` training images of each class.
        tau: τ where somebody fixed it, or None: chosen on validation images.
    """

    weight: Tensor
    bias: Tensor
    training: Features
    validation: Features | None
    counts: Tensor
    tau: float | None = None

    def logits(self, of: Features) -> Tensor:
        return of.features @ self.weight.T + self.bias


Result = tuple[Tensor, Tensor, dict[str, object]]  # weight (K, D), bias (K,), what was chosen


# --- pure functions ---------------------------------------------------------------------------------------------------


def minimise(
    parameters: Sequence[Tensor],
    losses: Callable[[slice], Tensor],
    labels: Tensor,
    counts: Tensor,
    *,
    weight_decay: float = WEIGHT_DECAY,
    max_iterations: int = 500,
    balance: float = 1.0,
) -> int:
    """Minimise the class-balanced risk of the images' losses over the parameters, in place, by L-BFGS.

    Args:
        losses: the losses of a slice of the images; they are taken so many at a time that logits stay within `LOGITS_AT_ONCE`.
        balance: γ in [0, 1]: an image of class k weighs n_k^−γ, so class k as a whole n_k^(1−γ); the weights sum to 1.

    Returns:
        the number of evaluations.
    """
    of_class = counts**-balance
    weights = (of_class / (of_class * counts).sum())[labels]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=max_iterations, history_size=20, tolerance_grad=1e-6, tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )  # fmt: skip
    rows = max(1, LOGITS_AT_ONCE // len(counts))
    pieces = [slice(start, start + rows) for start in range(0, len(labels), rows)]
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        risk = weight_decay / 2 * sum((p**2).sum() for p in parameters)
        risk.backward()
        for some in pieces:
            of_piece = weights[some] @ losses(some)
            of_piece.backward()
            risk = risk.detach() + of_piece.detach()
        return risk

    with torch.enable_grad():
        optimizer.step(closure)
    return evaluations


def fit_classifier(
    features: Tensor, labels: Tensor, counts: Tensor, *, weight_decay: float = WEIGHT_DECAY, balance: float = 1.0
) -> tuple[Tensor, Tensor]:
    r"""The linear classifier ``(K, D)``, ``(K,)`` of least balanced cross-entropy, from scratch.

    .. math:: \sum_i \frac{n_{y_i}^{-\gamma}}{\sum_k n_k^{1-\gamma}}\,
        \mathrm{CE}\bigl(W h_i + b + (1-\gamma) \log\tfrac{n}{N},\; y_i\bigr) + \frac{\lambda}{2} \lVert W, b\rVert^2

    ``balance`` = γ = 1 weights every class alike, 0 is logit adjustment, and between them both share the work: weights as
    large as n₁/n_K let single images of the tail decide, and an adjustment alone leaves them next to no gradient. Without
    weight decay the best classifier of every γ is that of the balanced error.

    Shapes: features ``(N, D)``, integer labels ``(N,)``, counts ``(K,)``. Source: classifier re-training (cRT, γ = 1), Kang
    et al., ICLR 2020, who sample and augment for some epochs; other γ: Menon et al., ICLR 2021, Theorem 1 with δ = π^(1−γ).
    """
    adjustment = (1 - balance) * torch.log(counts / counts.sum())
    weight = features.new_zeros(len(counts), features.shape[1]).requires_grad_()
    bias = features.new_zeros(len(counts)).requires_grad_()
    minimise(
        [weight, bias],
        lambda some: F.cross_entropy(features[some] @ weight.T + bias + adjustment, labels[some], reduction="none"), labels, counts,
        weight_decay=weight_decay, balance=balance,
    )  # fmt: skip
    return weight.detach(), bias.detach()


def spread(features: Tensor, labels: Tensor, counts: Tensor) -> float:
    r"""Root mean square distance of the features from their mean, every class counting alike.

    .. math:: s = \Bigl(\frac{1}{K} \sum_k \frac{1}{n_k} \sum_{i \in k} \lVert h_i - \bar h\rVert^2\Bigr)^{1/2},
        \quad \bar h = \frac{1}{K} \sum_k \frac{1}{n_k} \sum_{i \in k} h_i

    Shapes: features ``(N, D)``, integer labels ``(N,)``, counts ``(K,)``; every class has an image.
    """
    weights = (1 / (len(counts) * counts))[labels]
    return float(weights @ ((features - weights @ features) ** 2).sum(1)) ** 0.5


def folds_of(labels: Tensor, num_folds: int) -> Tensor:
    """A fold in 0 … ``num_folds``−1 for each image ``(N,)``, every class spread evenly; −1, no fold, for the only image of a class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(labels.device)
    order = order[torch.argsort(labels[order], stable=True)]  # by class, at random within
    counts = torch.bincount(labels)
    rank = torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts)[labels[order]]
    folds = torch.empty_like(labels)
    folds[order] = rank % num_folds
    return torch.where(counts[labels] == 1, -1, folds)


def cross_fitted_temperature(
    features: Tensor,
    labels: Tensor,
    counts: Tensor,
    *,
    weight_decay: float = WEIGHT_DECAY,
    balance: float = 1.0,
    num_folds: int = 5,
    share: float = 1.0,
    kept: Tensor | None = None,
) -> float:
    """The temperature for `fit_classifier`'s logits where no validation images exist, by cross-fitting.

    Each fold's images are judged by a classifier that was fitted to the others, and `fit_temperature` looks at those logits. The
    fitted classifier's own logits of the images that it was fitted to are too sure. The features have still seen all
    images, so this errs to that side, too, and less. Where the model's logits are ``share`` of these and ``kept`` ``(N, K)``, those of
    another classifier, that one was fitted to all images, and the temperature errs somewhat more.
    """
    folds = folds_of(labels, num_folds)
    held_out, their_labels = [], []
    for fold in range(num_folds):
        out = folds == fold
        if not out.any():
            continue
        others = torch.bincount(labels[~out], minlength=len(counts)).to(counts)
        weight, bias = fit_classifier(features[~out], labels[~out], others, weight_decay=weight_decay, balance=balance)
        logits = share * (features[out] @ weight.T + bias)
        held_out.append(logits if kept is None else logits + kept[out])
        their_labels.append(labels[out])
    return fit_temperature(torch.cat(held_out), torch.cat(their_labels))


def tau_normalise(weight: Tensor, tau: float) -> Tensor:
    r"""Class vectors :math:`w_k / \lVert w_k\rVert^\tau`, ``(K, D)``: τ = 0 leaves them, τ = 1 makes them unit vectors.

    Source: Kang et al., ICLR 2020, who leave out the bias, as the second stage does.
    """
    return weight / torch.linalg.vector_norm(weight, dim=1, keepdim=True).clamp_min(1e-12) ** tau


def smoothing_of_classes(counts: Tensor, *, head: float = 0.3, tail: float = 0.0) -> Tensor:
    r"""Label smoothing of each class for label-aware smoothing, ``(K,)``, the concave form:

    .. math:: \epsilon_k = \epsilon_K + (\epsilon_1 - \epsilon_K) \sin\frac{\pi (n_k - n_K)}{2 (n_1 - n_K)}

    from ``head`` = ε₁ for the largest class (n₁ images) to ``tail`` = ε_K for the smallest (n_K). The defaults are the
    authors' for CIFAR-10-LT and ImageNet-LT (CIFAR-100-LT: 0.4, 0.1). Where all classes are equally large it is ε_K.

    Source: Zhong et al. (MiSLAS), CVPR 2021.
    """
    share = (counts - counts.min()) / (counts.max() - counts.min()).clamp_min(1)
    return tail + (head - tail) * torch.sin(share * math.pi / 2)


def label_aware_losses(logits: Tensor, labels: Tensor, smoothing: Tensor) -> Tensor:
    r"""Cross-entropy with class y's own smoothing, ``(N,)``:
    :math:`-(1-\epsilon_y) \log p_y - \frac{\epsilon_y}{K} \sum_j \log p_j`.

    The sum includes y, as in the authors' code (its weight is 1 − ε + ε/K, as they say in issue 4 of their repository);
    the paper writes ε/(K−1) over the other classes.
    """
    surprise = -F.log_softmax(logits, dim=1)
    of_class = surprise.gather(1, labels[:, None])[:, 0]
    return (1 - smoothing[labels]) * of_class + smoothing[labels] * surprise.mean(1)


def fit_scales(logits: Tensor, labels: Tensor, counts: Tensor, *, smoothing: Tensor | None = None) -> Tensor:
    """Scales ``f (K,)`` of frozen logits, ``f_k z_k``, of least class-balanced cross-entropy, starting at 1.

    With ``smoothing (K,)`` of least `label_aware_losses`. Source: learnable weight scaling (LWS), Kang et al., ICLR 2020.
    """
    scales = torch.ones_like(counts).requires_grad_()
    if smoothing is None:
        smoothing = torch.zeros_like(counts)
    minimise([scales], lambda some: label_aware_losses(scales * logits[some], labels[some], smoothing), labels, counts)
    return scales.detach()


def class_means(features: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Mean feature of each class, ``(K, D)``."""
    sums = features.new_zeros(len(counts), features.shape[1]).index_add_(0, labels, features)
    return sums / counts[:, None]


def macro_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Mean recall of the classes that have images, in [0, 1]."""
    return float(np.nanmean(class_recall(logits.argmax(1).cpu(), labels.cpu(), logits.shape[1])))


def choose_tau(logits_at: Callable[[float], Tensor], labels: Tensor, grid: Sequence[float]) -> float:
    """The τ of the grid whose logits ``(N, K)`` have the best macro accuracy; the first of equals."""
    return max(grid, key=lambda tau: macro_accuracy(logits_at(tau), labels))


# --- the stages -------------------------------------------------------------------------------------------------------


def _refit(stage: Stage, *, unit: float = 1.0, share: float = 1.0, **options: float) -> Result:
    """`fit_classifier` on features measured in ``unit``. Of the logits ``share`` is the new classifier's, the rest the trained one's."""
    training, rest = stage.training, 1 - share
    known = training.features / unit, training.labels, stage.counts
    weight, bias = fit_classifier(*known, **options)
    weight, bias = share / unit * weight + rest * stage.weight, share * bias + rest * stage.bias
    chosen: dict[str, object] = {}
    tells = (
        stage.validation is not None
        and macro_accuracy(stage.validation.features @ weight.T + bias, stage.validation.labels) < 1
    )  # images that are all right do not tell how sure the classifier may be
    # of a share below a half cross-fitting tells little: most of the logits are those of a classifier that saw all images
    if not tells and stage.counts.max() > 1 and share > 0.5:
        kept = rest * stage.logits(training)
        chosen["temperature"] = cross_fitted_temperature(*known, share=share, kept=kept, **options)
    return weight, bias, chosen


def _crt(stage: Stage) -> Result:
    return _refit(stage)


def _crt_adjusted(stage: Stage, share: float = 1.0) -> Result:
    """With features in units of their spread, so that the logits do not depend on how long the network makes features."""
    unit = spread(stage.training.features, stage.training.labels, stage.counts) or 1.0
    return _refit(stage, unit=unit, share=share, weight_decay=SPREAD_DECAY, balance=0.5)


def _crt_blend(stage: Stage) -> Result:
    """Features of images that the network knows by heart do not tell a new classifier where new images will fall. So it gets the share of
    the logits that the trained one leaves to mend: that of the training images that it has wrong, every class counting alike."""
    training = stage.training
    share = 1 - macro_accuracy(stage.logits(training), training.labels)
    weight, bias, chosen = _crt_adjusted(stage, share)
    return weight, bias, chosen | {"share": share}


def _tau_norm(stage: Stage) -> Result:
    """Without validation images τ = 0.7, about where Kang et al. found it."""
    lengths = torch.linalg.vector_norm(stage.weight, dim=1)
    plain = replace(stage, bias=torch.zeros_like(stage.bias))
    tau, chosen = _tau(plain, lambda tau, logits: logits / lengths**tau, TAU_NORM_GRID, otherwise=0.7)
    return tau_normalise(stage.weight, tau), plain.bias, chosen


def _lws(stage: Stage, smoothing: Tensor | None = None) -> Result:
    scales = fit_scales(stage.logits(stage.training), stage.training.labels, stage.counts, smoothing=smoothing)
    return scales[:, None] * stage.weight, scales * stage.bias, {}


def _label_aware_smoothing(stage: Stage) -> Result:
    """MiSLAS's second stage with class vectors that are scaled only; the authors also train them, at a lower rate, and
    let BatchNorm's statistics shift to balanced batches, which cached features rule out."""
    return _lws(stage, smoothing_of_classes(stage.counts))


def _ncm(stage: Stage) -> Result:
    """Cosines: the head that follows makes features unit vectors."""
    means = class_means(stage.training.features, stage.training.labels, stage.counts)
    return F.normalize(means, dim=1), torch.zeros_like(stage.bias), {}


def _ncm_euclidean(stage: Stage) -> Result:
    """−‖h − μ_k‖²/2 without the part −‖h‖²/2 that all classes share."""
    means = class_means(stage.training.features, stage.training.labels, stage.counts)
    return means, -(means**2).sum(1) / 2, {}


def _post_hoc(stage: Stage) -> Result:
    """Menon et al., ICLR 2021. Without validation images τ = 1, which is right where softmax(z) are probabilities."""
    prior = torch.log(stage.counts / stage.counts.sum())
    tau, chosen = _tau(stage, lambda tau, logits: logits - tau * prior, POST_HOC_GRID, otherwise=1.0)
    return stage.weight, stage.bias - tau * prior, chosen


def _tau(
    stage: Stage, change: Callable[[float, Tensor], Tensor], grid: Sequence[float], *, otherwise: float
) -> tuple[float, dict[str, object]]:
    """The τ by which ``change(τ, logits)`` is best on validation images; ``otherwise`` where there are none."""
    if stage.tau is not None:
        return stage.tau, {"tau": stage.tau, "tau_from": "recipe"}
    if stage.validation is None:
        return otherwise, {"tau": otherwise, "tau_from": "default"}
    logits = stage.logits(stage.validation)
    tau = choose_tau(lambda tau: change(tau, logits), stage.validation.labels, grid)
    return tau, {"tau": tau, "tau_from": "validation"}


_STAGES: dict[str, Callable[[Stage], Result]] = {
    "crt": _crt,
    "crt-adjusted": _crt_adjusted,
    "crt-blend": _crt_blend,
    "tau-norm": _tau_norm,
    "lws": _lws,
    "label-aware-smoothing": _label_aware_smoothing,
    "ncm": _ncm,
    "ncm-euclidean": _ncm_euclidean,
    "post-hoc": _post_hoc,
}


# --- a trained model → a model with a new head ------------------------------------------------------------------------


@torch.no_grad()
def run_second_stage(
    name: str, model: Classifier, card: ModelCard, data: PreparedData, numerics: Numerics, recipe: Recipe
) -> tuple[Classifier, ModelCard, dict[str, object]]:
    """A trained model with the head that a second stage gives it.

    Args:
        name: a name of `equiframe.method.SECOND_STAGES`, not ``none``.

    Returns:
        the new model (it shares the backbone with the old one), its card (with the temperature, where it is cross-fitted), and for ``metrics.json`` ``second_stage`` (the
        name), ``second_stage_tau`` and ``second_stage_tau_from`` (``recipe``, ``validation`` or ``default``) where it has a τ, and
        ``second_stage_val_macro`` where there are validation images.
    """
    model.eval()

    def features_of(images: ImageSet) -> Features:
        return collect_features(model, make_loader(images, card, numerics, recipe), numerics)

    weight, bias = affine_map(model.head)
    training = features_of(data.train)
    validation = None if data.val is None else features_of(data.val)
    counts = torch.tensor(card.train_counts, dtype=weight.dtype, device=weight.device)
    weight, bias, chosen = _STAGES[name](Stage(weight, bias, training, validation, counts, recipe.stage_tau))
    card = replace(card, method_fields={**card.method_fields, "second_stage": name})
    if "temperature" in chosen:
        card = replace(card, temperature=chosen.pop("temperature"), temperature_from=CROSS_FITTED)
    model = Classifier(model.backbone, _with_values(card, model.head, weight, bias))
    if validation is not None:
        chosen["val_macro"] = macro_accuracy(validation.features @ weight.T + bias, validation.labels)
    numerics.world.copy(model.head)
    return model.eval(), card, {"second_stage": name} | {f"second_stage_{key}": v for key, v in chosen.items()}


@torch.no_grad()
def collect_features(model: Classifier, loader: Loader, numerics: Numerics, *, batch_size: int = 256) -> Features:
    """Features of all images, in order, as the head normalises them; ``model`` must be in evaluation mode."""
    like = model.head.class_vectors()
    features, labels = [like.new_empty(0, model.head.inner_dim)], [like.new_empty(0, dtype=torch.long)]

    def look() -> None:
        for images, targets in loader.ordered(batch_size):
            with numerics.autocast():
                raw = model.backbone(images)
            features.append(model.head(raw).features)
            labels.append(targets)

    loader.world.each(look)
    return Features(*(loader.world.rows(torch.cat(parts)) for parts in (features, labels)))


def _with_values(card: ModelCard, head: Head, weight: Tensor, bias: Tensor) -> AffineHead:
    """The card's head with these values, and with the projection and BatchNorm of the trained head."""
    new = build_head(card.method_fields, head.dim, head.num_classes).to(weight)
    if hasattr(head, "batch_norm"):
        new.projection.load_state_dict(head.projection.state_dict())
        new.batch_norm.load_state_dict(head.batch_norm.state_dict())
    new.linear.weight.copy_(weight)
    new.linear.bias.copy_(bias)
    return new
