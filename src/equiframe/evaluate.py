"""One pass over a data set: outputs → accuracy by group, calibration, collapse.

All functions of measures see tensors, never a model.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from equiframe.collapse import ClassStatistics, centred_means
from equiframe.data.batches import Loader
from equiframe.data.sources import ImageSet
from equiframe.imbalance import class_groups
from equiframe.model import Classifier


@dataclass
class Outputs:
    """What a model said about a data set: ``logits (N, K)`` and ``labels (N,)``, on the CPU; ``features (N, D)`` if kept."""

    logits: Tensor
    labels: Tensor
    features: Tensor | None = None


@torch.no_grad()
def collect(
    model: Classifier,
    loader: Loader,
    *,
    batch_size: int = 256,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    statistics: ClassStatistics | None = None,
    decisions: bool = False,
    keep: bool = True,
    keep_features: bool = False,
) -> Outputs:
    """Run a model in evaluation mode over all images, in order. Processes that share the loader's images share the work; all of
    them get all outputs, and their statistics, which must be fresh, are merged.

    Args:
        autocast: makes the context in which the backbone runs (mixed precision).
        statistics: class statistics to feed with the head's features on the way.
        decisions: also tell them what the classifier decided, for NC4 (they must know class means then).
        keep: False returns no logits, and so never makes N·K numbers; decisions then cost no logits where a frame ranks without.
        keep_features: also return the head's features.
    """
    was_training = model.training
    model.eval()
    logits, labels = [torch.empty(0, model.head.num_classes)], [torch.empty(0, dtype=torch.long)]
    kept = [torch.empty(0, model.head.inner_dim)]

    def look() -> None:
        for images, targets in loader.ordered(batch_size):
            with autocast():
                features = model.backbone(images)
            output = model.head(features)
            if statistics is not None:
                decided = None
                if decisions:
                    decided = output.logits.argmax(1) if keep else model.head.decide(output.features)
                statistics.update(output.features.float(), targets, decided)
            if keep:
                logits.append(output.logits.float().cpu())
            labels.append(targets.cpu())
            if keep_features:
                kept.append(output.features.float().cpu())

    world = loader.world
    world.each(look)
    model.train(was_training)
    if statistics is not None:
        statistics.unite(world)
    all_logits, all_labels = world.rows(torch.cat(logits)), world.rows(torch.cat(labels))
    return Outputs(all_logits, all_labels, world.rows(torch.cat(kept)) if keep_features else None)


def class_recall(predictions: Tensor, labels: Tensor, num_classes: int) -> np.ndarray:
    """Share of each class's images that were classified right, ``(K,)``; NaN for classes without images."""
    total = torch.bincount(labels, minlength=num_classes).double()
    right = torch.bincount(labels[predictions == labels], minlength=num_classes).double()
    return (right / total).numpy()


def _mean(values: np.ndarray) -> float | None:
    """Mean over what is not NaN; None where nothing is."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None


def accuracy_measures(predictions: Tensor, labels: Tensor, train_counts: Sequence[int]) -> dict[str, float | None]:
    """Accuracy over all images (``top1``), over classes (``macro``: mean recall of the classes that have images), over
    groups of classes by training count (``many medium few``, and thirds ``head middle tail``), and of the ``worst``
    class. In [0, 1]; None for a group without images."""
    recall = class_recall(predictions, labels, len(train_counts))
    groups = {name: _mean(recall[mask]) for name, mask in class_groups(train_counts).items()}
    return {
        "top1": float((predictions == labels).double().mean()),
        "macro": _mean(recall),
        **groups,
        "worst": float(np.nanmin(recall)),
    }


def expected_calibration_error(probabilities: Tensor, labels: Tensor, *, num_bins: int = 15) -> float:
    r"""ECE of the predicted class, :math:`\sum_b \frac{|B_b|}{N}\,|\mathrm{acc}(B_b) - \mathrm{conf}(B_b)|`.

    Bins of equal width, right-closed (Guo et al., ICML 2017). Range [0, 1].
    """
    counts, confidence, accuracy = reliability_bins(probabilities, labels, num_bins=num_bins)
    return float((counts * (accuracy - confidence)).abs().nansum() / len(labels))


def reliability_bins(probabilities: Tensor, labels: Tensor, *, num_bins: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """Images, mean confidence and accuracy of the predicted class by bin of confidence, each ``(num_bins,)``; NaN for the
    means of an empty bin."""
    confidence, prediction = probabilities.double().max(1)
    bins = (torch.ceil(confidence * num_bins).long() - 1).clamp(0, num_bins - 1)
    zero = torch.zeros(num_bins, dtype=torch.float64)
    counts = zero.index_add(0, bins, torch.ones_like(confidence))
    right = zero.index_add(0, bins, (prediction == labels).double())
    return counts, zero.index_add(0, bins, confidence) / counts, right / counts


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    r"""The temperature T that minimises the macro-averaged negative log-likelihood of softmax(z/T).

    Macro (each class weighs the same), so that a long-tailed validation split does not fit the head classes alone.
    One convex parameter in 1/T: solved by bisection on its derivative, T in [1e-3, 1e3].
    """
    logits, labels = logits.double(), labels
    counts = torch.bincount(labels, minlength=logits.shape[1]).double()
    weights = 1 / counts[labels]
    weights = weights / weights.sum()
    target = logits.gather(1, labels[:, None])[:, 0]

    def slope(log_beta: float) -> float:  # derivative of the loss with respect to beta = 1/T
        expected = (F.softmax(math.exp(log_beta) * logits, dim=1) * logits).sum(1)
        return float((weights * (expected - target)).sum())

    low, high = math.log(1e-3), math.log(1e3)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return math.exp(-(low + high) / 2)


def calibration_measures(logits: Tensor, labels: Tensor, temperature: float) -> dict[str, float]:
    """``ece`` (`expected_calibration_error`) and ``nll`` (mean −log p of the true class, nats) at a temperature."""
    log_p = F.log_softmax(logits.double() / temperature, dim=1)
    return {
        "ece": expected_calibration_error(log_p.exp(), labels),
        "nll": float(F.nll_loss(log_p, labels)),
    }


def class_table(
    predictions: Tensor, labels: Tensor, class_names: Sequence[str], train_counts: Sequence[int]
) -> list[dict[str, object]]:
    """One record a class: name, images in training and test, accuracy."""
    recall = class_recall(predictions, labels, len(class_names))
    tested = torch.bincount(labels, minlength=len(class_names)).tolist()
    return [
        {"name": n, "num_train": int(c), "num_test": t, "accuracy": None if math.isnan(r) else float(r)}
        for n, c, t, r in zip(class_names, train_counts, tested, recall.tolist(), strict=True)
    ]


def prediction_arrays(outputs: Outputs, temperature: float) -> dict[str, np.ndarray]:
    """What ``predictions.npz`` keeps of each test image, in order: ``labels (N,)``, the ``predicted`` class and its
    ``probability`` (float16) at the temperature."""
    probability, predicted = F.softmax(outputs.logits.double() / temperature, dim=1).max(1)
    whole = np.uint16 if outputs.logits.shape[1] <= 1 << 16 else np.uint32
    return {
        "labels": outputs.labels.numpy().astype(whole),
        "predicted": predicted.numpy().astype(whole),
        "probability": probability.numpy().astype(np.float16),
    }


# --- what the report shows of a run -----------------------------------------------------------------------------------


def cosine_matrix(vectors: Tensor, order: Sequence[int], *, at_most: int = 100) -> list[list[float]]:
    """Cosines between vectors ``(K, D)`` in the given order; for more than ``at_most`` classes, averaged over blocks of
    neighbours (the diagonal left out). Three decimals: for pictures."""
    unit = F.normalize(vectors[torch.as_tensor(order)].double().cpu(), dim=1)
    cosines = unit @ unit.T
    if len(order) > at_most:
        block = torch.arange(len(order)) * at_most // len(order)
        off = 1 - torch.eye(len(order), dtype=torch.float64)
        pool = F.one_hot(block, at_most).double().T
        cosines = pool @ (cosines * off) @ pool.T / (pool @ off @ pool.T).clamp_min(1)
    return [[round(v, 3) for v in row] for row in cosines.tolist()]


def confident_errors(
    probabilities: Tensor,
    labels: Tensor,
    images: ImageSet,
    class_names: Sequence[str],
    *,
    num: int = 24,
    side: int = 64,
) -> list[dict[str, object]]:
    """The wrongly classified images with the most probable wrong class: names, probability, a thumbnail as data URI."""
    confidence, predicted = probabilities.max(1)
    wrong = torch.nonzero(predicted != labels)[:, 0]
    records = []
    for i in wrong[confidence[wrong].argsort(descending=True)][:num].tolist():
        picture = images.image(i)
        picture.thumbnail((side, side))
        file = io.BytesIO()
        picture.save(file, "PNG")
        records.append(
            {
                "name": images.names[i],
                "true": class_names[int(labels[i])],
                "predicted": class_names[int(predicted[i])],
                "probability": round(float(confidence[i]), 4),
                "thumbnail": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(),
            }
        )
    return records


def picture_details(
    outputs: Outputs,
    temperature: float,
    statistics: ClassStatistics,
    class_vectors: Tensor,
    images: ImageSet,
    class_names: Sequence[str],
    train_counts: Sequence[int],
) -> dict[str, object]:
    """What the report draws of a run and ``metrics.json`` does not hold: the content of ``details.json``."""
    probabilities = F.softmax(outputs.logits.double() / temperature, dim=1)
    counts, confidence, accuracy = (t.tolist() for t in reliability_bins(probabilities, outputs.labels))
    order = np.argsort(-np.asarray(train_counts), kind="stable").tolist()
    return {
        "reliability": [
            {"count": int(n), "confidence": round(c, 4), "accuracy": round(a, 4)}
            for n, c, a in zip(counts, confidence, accuracy, strict=True)
            if n
        ],
        "cosines": {
            "means": cosine_matrix(centred_means(statistics), order),
            "vectors": cosine_matrix(class_vectors, order),
        },
        "wrong": confident_errors(probabilities, outputs.labels, images, class_names),
    }
