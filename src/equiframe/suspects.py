"""Labels that may be wrong: a list for a person to look through; nothing is changed by it.

An image is held against its nearest neighbours among the training images, by the cosine of the features of a finished run
(Zhu et al., ICML 2022, find corrupted labels so). With n_y training images of its label, itself left out, and the labels of its
``m = min(10, n_y)`` nearest neighbours,

.. math:: p_j(x) = \\frac{\\#\\{\\text{neighbours of class } j\\}}{m}, \\qquad t_j = \\operatorname{mean}_{i: y_i = j} p_j(x_i)

so that a small class is never outvoted for want of images. As in confident learning (Northcutt et al., JAIR 2021), image x belongs to
the class of the largest p_j among those with p_j(x) ≥ t_j; where that is another than its label, it is a suspect. A class of one image
cannot be judged.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from equiframe.data.prepare import PreparedData
from equiframe.measure import open_run
from equiframe.model import Classifier, ModelCard
from equiframe.numerics import Numerics
from equiframe.recipe import Recipe
from equiframe.second_stage import collect_features
from equiframe.tracking import make_loader, tracked_positions

NEIGHBOURS = 10
REFERENCE = 50_000  # training images that neighbours are looked for among; of more, as many of each class


@dataclass(frozen=True)
class Suspect:
    """An image whose label may be wrong. ``score`` in (-1, 1]: share of its neighbours in ``suggested`` minus that in ``label``."""

    split: str
    image: str
    label: str
    suggested: str
    score: float


def neighbour_shares(
    features: Tensor,
    labels: Tensor,
    known: Tensor,
    known_labels: Tensor,
    num_classes: int,
    *,
    itself: Tensor | None = None,
) -> Tensor:
    """Shares of the classes among the nearest neighbours, ``(N, K)``; zeros where an image's label has no other image.

    Args:
        features, labels: ``(N, D)`` and ``(N,)``: the images to judge.
        known, known_labels: ``(M, D)`` and ``(M,)``: the images to find neighbours among.
        itself: ``(N,)``: an image's own position among the known ones, which is left out; -1 where it is not among them.
    """
    counts = torch.bincount(known_labels, minlength=num_classes)
    others = counts[labels] - (0 if itself is None else (itself >= 0).long())
    wanted = others.clamp(max=min(NEIGHBOURS, len(known)))
    known, features = F.normalize(known.float(), dim=1), F.normalize(features.float(), dim=1)
    shares = torch.zeros(len(features), num_classes, device=features.device)
    for start in range(0, len(features), 1024):
        rows = slice(start, start + 1024)
        cosines = features[rows] @ known.T
        if itself is not None:
            inside = (itself[rows] >= 0).nonzero()[:, 0]
            cosines[inside, itself[rows][inside]] = -torch.inf
        nearest = known_labels[cosines.topk(min(NEIGHBOURS, len(known)), dim=1).indices]
        counted = (torch.arange(nearest.shape[1], device=nearest.device) < wanted[rows, None]).float()
        shares[rows] = shares[rows].scatter_add_(1, nearest, counted) / wanted[rows, None].clamp(min=1)
    return shares


def thresholds(shares: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """t_j ``(K,)``: the mean share of class j around the images labelled j; infinite where there is none."""
    own = shares.gather(1, labels[:, None])[:, 0]
    sums = own.new_zeros(num_classes).index_add_(0, labels, own)
    counts = torch.bincount(labels, minlength=num_classes)
    return torch.where(counts > 0, sums / counts.clamp(min=1), torch.inf)


def suggested_classes(shares: Tensor, labels: Tensor, at_least: Tensor) -> Tensor:
    """The class that each image's neighbours suggest ``(N,)``; its label where none reaches its threshold."""
    reached = torch.where((shares >= at_least) & (shares > 0), shares, -1.0)
    best, suggested = reached.max(1)
    own = shares.gather(1, labels[:, None])[:, 0]
    return torch.where(best > own, suggested, labels)


def find_suspects(
    run: str | Path, *, device: str = "auto", data: str | None = None, data_root: str | None = None
) -> tuple[list[Suspect], dict[str, int]]:
    """Suspects among a finished run's training, validation and test images, the surest first, and how many images were judged, by
    split. ``data`` and ``data_root`` as of `equiframe.measure.open_run`.

    Raises:
        InputError: if the folder is not a finished run, or its data has changed.
    """
    return suspects_of(*open_run(run, device=device, data=data, data_root=data_root))


@torch.no_grad()
def suspects_of(
    model: Classifier, card: ModelCard, images: PreparedData, numerics: Numerics, recipe: Recipe
) -> tuple[list[Suspect], dict[str, int]]:
    """`find_suspects` of an opened run."""
    model.eval()
    num_classes = len(card.class_names)
    splits = {"train": images.train, "val": images.val, "test": images.test}
    if images.test_is != "test":
        del splits["test"]  # the validation images, once more
    found = {
        split: collect_features(model, make_loader(part, card, numerics, recipe), numerics)
        for split, part in splits.items()
        if part is not None
    }
    training = found["train"]
    positions = np.arange(len(training.labels))
    if len(positions) > REFERENCE:
        positions = tracked_positions(images.train.labels, per_class=max(2, REFERENCE // num_classes))
    chosen = torch.from_numpy(positions).to(training.labels.device)
    itself = torch.full_like(training.labels, -1)
    itself[chosen] = torch.arange(len(chosen), device=chosen.device)
    known, known_labels = training.features[chosen], training.labels[chosen]
    suspects, at_least = [], None
    for split, part in found.items():
        shares = neighbour_shares(
            part.features, part.labels, known, known_labels, num_classes, itself=itself if split == "train" else None
        )
        if at_least is None:
            at_least = thresholds(shares, part.labels, num_classes)
        suggested = suggested_classes(shares, part.labels, at_least)
        for i in (suggested != part.labels).nonzero()[:, 0].tolist():
            label, other = int(part.labels[i]), int(suggested[i])
            suspects.append(
                Suspect(
                    split, splits[split].names[i], card.class_names[label], card.class_names[other],
                    round(float(shares[i, other] - shares[i, label]), 4),
                )
            )  # fmt: skip
    return sorted(suspects, key=lambda s: -s.score), {split: len(part.labels) for split, part in found.items()}


def as_csv(suspects: Sequence[Suspect]) -> str:
    """CSV with the columns ``split, image, label, suggested, score``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Suspect.__dataclass_fields__)
    writer.writerows([s.split, s.image, s.label, s.suggested, f"{s.score:.4f}"] for s in suspects)
    return text.getvalue()
