r"""Pull and push: the two halves of cross-entropy's gradient.

For a sample h of class c with probabilities p and logits s·w_jᵀh, weight ω (1/B for a mean)

.. math:: \nabla_h = \underbrace{-\omega s(1-p_c)\,w_c}_{\text{pull}} +
                     \underbrace{\omega s\sum_{j\ne c}p_j w_j}_{\text{push}}, \qquad
          \nabla_{w_k} = \underbrace{-\sum_{c_i=k}\omega_i s(1-p_k^i)\,h_i}_{\text{pull: its own samples}} +
                         \underbrace{\sum_{c_i\ne k}\omega_i s\,p_k^i\,h_i}_{\text{push: all the others}} .
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from equiframe.errors import InputError
from equiframe.peeled.model import PeeledModel


@dataclass(frozen=True)
class GradientSplit:
    """Pull and push on features ``(B, D)`` and on class vectors ``(K, D)``; each pair sums to the whole gradient."""

    feature_pull: Tensor
    feature_push: Tensor
    vector_pull: Tensor
    vector_push: Tensor


def split_gradients(
    features: Tensor,
    vectors: Tensor,
    targets: Tensor,
    *,
    logits: Tensor | None = None,
    probabilities: Tensor | None = None,
    scale: float = 1.0,
    weights: Tensor | None = None,
) -> GradientSplit:
    """Split the gradient of the (weighted) mean cross-entropy of a batch.

    Args:
        features: ``(B, D)``, as they meet the class vectors (normalised, if the head normalises).
        vectors: ``(K, D)`` class vectors.
        targets: ``(B,)`` integer classes.
        logits: ``(B, K)`` of the head, bias, scale and adjustment included; or
        probabilities: ``(B, K)``; without either, the softmax of ``scale · features @ vectors.T``.
        scale: s, the factor between the inner products and the logits.
        weights: ``(B,)``; 1/B by default.

    Returns:
        The four parts, detached, in the dtype of the features (at least float32).
    """
    if targets.ndim != 1 or targets.is_floating_point() or len(targets) != len(features):
        raise InputError(f"targets must be one whole number per feature, got shape {tuple(targets.shape)}")
    if logits is not None and probabilities is not None:
        raise InputError("give logits or probabilities, not both")
    with torch.no_grad():
        dtype = torch.promote_types(features.dtype, torch.float32)
        h, w = features.detach().to(dtype), vectors.detach().to(dtype)
        if probabilities is None:
            logits = scale * h @ w.T if logits is None else logits.detach().to(dtype)
            probabilities = torch.softmax(logits, 1)
        own = targets[:, None]
        others = probabilities.detach().to(dtype).scatter(1, own, 0.0)
        missing = others.sum(1)  # 1 − p_c without cancellation
        omega = scale * (torch.full_like(missing, 1 / len(h)) if weights is None else weights.to(dtype))
        others, missing = omega[:, None] * others, omega * missing
        return GradientSplit(
            feature_pull=-missing[:, None] * w[targets],
            feature_push=others @ w,
            vector_pull=-torch.zeros_like(w).index_add(0, targets, missing[:, None] * h),
            vector_push=others.T @ h,
        )


def class_norms(split: GradientSplit, targets: Tensor) -> dict[str, Tensor]:
    """Lengths per class, ``(K,)`` each: ``vector_pull``, ``vector_push``, and ``feature_pull``, ``feature_push`` summed
    over the class's samples (0 for classes that are not in the batch)."""
    zero = split.vector_pull.new_zeros(len(split.vector_pull))
    return {
        "vector_pull": split.vector_pull.norm(dim=1),
        "vector_push": split.vector_push.norm(dim=1),
        "feature_pull": zero.index_add(0, targets, split.feature_pull.norm(dim=1)),
        "feature_push": zero.index_add(0, targets, split.feature_push.norm(dim=1)),
    }


def push_over_pull(norms: dict[str, Tensor], classes: Tensor, *, of: str = "vector") -> float:
    """Σ‖push‖ / Σ‖pull‖ over a group of ``classes`` (indices or mask), on its class vectors or its features."""
    return float(norms[f"{of}_push"][classes].sum() / norms[f"{of}_pull"][classes].sum())


def track_gradients(
    model: PeeledModel, *, iterations: int = 3000, step: float = 1.0, seed: int = 0, vectors: Tensor | None = None
) -> dict[str, list[float]]:
    """Projected gradient descent on the model under cross-entropy, with pull and push recorded on the way.

    Major classes are those with the largest count, minor ones those with the smallest.

    Args:
        vectors: fixed class vectors; learned from a random start if None.

    Returns:
        Lists under ``iteration``; ``ratio_major``, ``ratio_minor`` (push over pull on the class vectors),
        ``feature_ratio_major``, ``feature_ratio_minor``; ``cosine_minor`` (mean cosine between minor class vectors).
    """
    if model.loss != "ce":
        raise InputError(f"pull and push are defined for cross-entropy, got loss {model.loss!r}")
    major, minor = model.counts == model.counts.max(), model.counts == model.counts.min()
    w = model.random_vectors(seed) if vectors is None else vectors
    h = model.random_features(seed)
    names = ("iteration", "ratio_major", "ratio_minor", "feature_ratio_major", "feature_ratio_minor", "cosine_minor")
    history: dict[str, list[float]] = {name: [] for name in names}
    marks = set(torch.logspace(0, torch.tensor(iterations).log10().item(), 60).long().tolist()) | {0}
    for iteration in range(iterations + 1):
        if iteration in marks:
            split = split_gradients(h, w, model.targets, weights=model.weights)
            norms = class_norms(split, model.targets)
            units = torch.nn.functional.normalize(w[minor], dim=1)
            size = len(units)
            cosine = float((units.sum(0).square().sum() - size) / (size * (size - 1))) if size > 1 else float("nan")
            row = (
                float(iteration),
                push_over_pull(norms, major),
                push_over_pull(norms, minor),
                push_over_pull(norms, major, of="feature"),
                push_over_pull(norms, minor, of="feature"),
                cosine,
            )
            for name, value in zip(names, row, strict=True):
                history[name].append(value)
        to_vectors, to_features = model.gradients(w, h)
        h = model.project_features(h - step * to_features)
        if vectors is None:
            w = model.project_vectors(w - step * to_vectors)
    return history
