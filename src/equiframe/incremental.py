r"""Classes that arrive later, a few images each (few-shot class-incremental learning).

After a base session the backbone is frozen. What it is remembered by is the mean feature of each class; in a later session a small
projection g learns to send those means and the new images' features x to the class vectors of a frame that was drawn for all classes to come:

.. math:: \min_g \sum_{k\ \text{old}} L_{DR}(g(\bar x_k), w_k) + \sum_{i\ \text{new}} L_{DR}(g(x_i), w_{y_i})

No class vector ever moves, so nobody needs to make room. Source: Yang et al., ICLR 2023 (NC-FSCIL).

    head = FrameHead(dim, 7, capacity=10, norm="none", logit_scale=1.0)   # base session: train backbone, projection and head
    memory = mean_features(features, labels)                              # of the backbone, which is frozen from here on
    head.add_classes(1)
    fit_session(projection, head, features_of_new, labels_of_new, memory)
    memory = memory.joined(mean_features(features_of_new, labels_of_new))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from equiframe.errors import InputError
from equiframe.heads import Head
from equiframe.losses import DotRegression, Loss


class Memory(NamedTuple):
    """One feature for each class seen: ``means (M, D)`` and their ``classes (M,)``."""

    means: Tensor
    classes: Tensor

    def joined(self, other: Memory) -> Memory:
        """Both memories in one; `InputError` if they share a class."""
        both = torch.cat([self.classes, other.classes])
        if len(both.unique()) < len(both):
            raise InputError("a class is in both memories: each session brings classes of its own")
        return Memory(torch.cat([self.means, other.means]), both)


@torch.no_grad()
def mean_features(features: Tensor, labels: Tensor) -> Memory:
    """The mean of the features ``(N, D)`` of each class among the ``labels (N,)``, classes in increasing order."""
    classes, where, counts = labels.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(classes), features.shape[1], dtype=features.dtype, device=features.device)
    return Memory(sums.index_add(0, where, features) / counts[:, None].to(features.dtype), classes)


def fit_session(
    projection: nn.Module,
    head: Head,
    features: Tensor,
    labels: Tensor,
    memory: Memory,
    *,
    loss: Loss | None = None,
    steps: int = 100,
    lr: float = 0.1,
    momentum: float = 0.9,
) -> list[float]:
    """Train projection and head on one session: the memory and all new features in every step, by SGD.

    Projection and head stay in evaluation mode, so that BatchNorm keeps the statistics of the base session; their parameters train (a
    frame has none). No random choice is made.

    Args:
        projection: ``(B, D) -> (B, D')``, with the head the only thing that learns.
        head: with the new classes in use (`FrameHead.add_classes`), or a learnable head with as many rows.
        features, labels: of the new images ``(N, D)``, ``(N,)``, as the frozen backbone makes them.
        memory: of the classes seen before.
        loss: `DotRegression` averaged over classes unless given; a class's memory counts like its images together then.

    Returns:
        the loss before each step.

    Raises:
        InputError: if a new class is in the memory, or the head has no vector in use for a class, or an option is out of range.
    """
    if steps < 1 or not (lr > 0 and math.isfinite(lr)) or not 0 <= momentum < 1:
        raise InputError(
            f"steps >= 1, lr > 0 and momentum in [0, 1) are needed, got {steps!r}, {lr!r} and {momentum!r}"
        )
    again = sorted(set(labels.tolist()) & set(memory.classes.tolist()))
    if again:
        raise InputError(f"class {again[0]} is in the memory already: a session brings new classes")
    inputs = torch.cat([memory.means, features]).detach()
    targets = torch.cat([memory.classes, labels])
    if int(targets.max()) >= head.num_classes:
        raise InputError(f"class {int(targets.max())} is not in use: the head has {head.num_classes} (add_classes)")
    loss = DotRegression(class_weighting="batch-balanced") if loss is None else loss
    parameters = [p for p in (*projection.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=momentum)
    projection.eval()
    head.eval()
    losses = []
    for _ in range(steps):
        value = loss(head(projection(inputs)), targets)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def incremental_measures(
    predictions: Sequence[Tensor], labels: Sequence[Tensor], num_seen: Sequence[int]
) -> dict[str, object]:
    r"""What is kept of T+1 sessions, from the predictions on the test images of all classes seen after each.

    With :math:`a_{t,j}` the accuracy after session t on the images of the classes that session j brought:

    - ``accuracy``: after each session, over all images of classes seen; ``average``: their mean; ``drop``: first less last;
    - ``base``, ``new``: after each session, on the classes of session 0, and on all later ones (None after session 0);
    - ``harmonic``: 2·base·new/(base+new), their harmonic mean (None after session 0);
    - ``forgetting``: :math:`\frac1T\sum_{j<T}\big(\max_{j\le t<T} a_{t,j} - a_{T,j}\big)` (Chaudhry et al., ECCV 2018), in [−1, 1]; None for T = 0.

    Args:
        predictions, labels: one ``(N_t,)`` each after each session.
        num_seen: classes seen after each session; classes are numbered as they come.

    Raises:
        InputError: if the lengths differ, ``num_seen`` does not grow, a label was not seen yet, or a session has no test image.
    """
    if not len(predictions) == len(labels) == len(num_seen) or not num_seen:
        raise InputError("predictions, labels and num_seen need one entry for each session")
    starts = [0, *num_seen]
    if any(b <= a for a, b in pairwise(starts)):
        raise InputError(f"num_seen must grow with every session, got {list(num_seen)}")
    table: list[list[float]] = []  # a_{t,j}
    accuracy, base, new, harmonic = [], [], [], []
    for t, (predicted, true) in enumerate(zip(predictions, labels, strict=True)):
        if len(true) and not 0 <= int(true.min()) <= int(true.max()) < num_seen[t]:
            raise InputError(f"a label of session {t} is outside the {num_seen[t]} classes seen")
        right = (predicted == true).double()
        session = torch.bucketize(true, torch.tensor(num_seen, device=true.device), right=True)
        parts = [right[session == j] for j in range(t + 1)]
        if not all(map(len, parts)):
            raise InputError(f"after session {t} a session's classes have no test image")
        table.append([float(part.mean()) for part in parts])
        accuracy.append(float(right.mean()))
        base.append(table[t][0])
        new.append(float(right[session > 0].mean()) if t else None)
        both = base[t] + new[t] if t else 0.0
        harmonic.append((2 * base[t] * new[t] / both if both else 0.0) if t else None)
    last = len(table) - 1
    lost = [max(table[t][j] for t in range(j, last)) - table[last][j] for j in range(last)]
    return {
        "accuracy": accuracy,
        "average": sum(accuracy) / len(accuracy),
        "drop": accuracy[0] - accuracy[-1],
        "base": base,
        "new": new,
        "harmonic": harmonic,
        "forgetting": sum(lost) / last if last else None,
    }
