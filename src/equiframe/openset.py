"""Is this a sample of a class that the model knows? Scores (larger: more likely known), and how well they tell.

`open_set_scores` works with every head; those from the angle to the nearest class vector cost no softmax.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from equiframe.errors import InputError
from equiframe.heads import HeadOutput


@torch.no_grad()
def open_set_scores(output: HeadOutput, *, temperature: float = 1.0) -> dict[str, Tensor]:
    r"""Scores ``(B,)`` by name, from the cosines :math:`c_k = \cos\angle(h, w_k)` and the logits z.

    - ``cosine``: :math:`c_1`, the cosine to the nearest class vector, in [−1, 1];
    - ``margin``: :math:`(c_1 - c_2)/(1 - \cos\angle(w_1, w_2))` with the nearest two class vectors: 0 on the boundary between them and 1
      at the nearest, however close the two are (in a simplex all pairs are alike, and this is the plain margin times a constant);
    - ``max-softmax``: :math:`\max_k p_k` (Hendrycks & Gimpel, ICLR 2017), in (0, 1];
    - ``energy``: :math:`T\log\sum_k e^{z_k/T}` (Liu et al., NeurIPS 2020, with the sign turned).

    Args:
        output: of a head with two classes or more; only classes in use count.
        temperature: T of the energy, positive.
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise InputError(f"temperature must be a positive number, got {temperature!r}")
    vectors = F.normalize(output.head.class_vectors().to(output.features.dtype), dim=1)
    features = F.normalize(output.features, dim=1)
    best, classes = (features @ vectors.T).topk(2, dim=1)
    between = (vectors[classes[:, 0]] * vectors[classes[:, 1]]).sum(1)
    logits = output.logits
    return {
        "cosine": best[:, 0],
        "margin": (best[:, 0] - best[:, 1]) / (1 - between).clamp_min(torch.finfo(features.dtype).eps),
        "max-softmax": F.softmax(logits, dim=1).amax(1),
        "energy": temperature * torch.logsumexp(logits / temperature, dim=1),
    }


def auroc(known: Tensor, unknown: Tensor) -> float:
    r"""Area under the ROC curve: :math:`P(s > u) + \tfrac12 P(s = u)` for scores s of known and u of unknown samples.

    0.5 is chance, 1 means that some threshold tells them apart. O(N log N).

    Raises:
        InputError: if either is empty or has a NaN.
    """
    for name, scores in (("known", known), ("unknown", unknown)):
        if scores.numel() == 0 or bool(scores.isnan().any()):
            raise InputError(f"auroc needs {name} scores, at least one and none NaN")
    known, ordered = known.flatten().double(), unknown.flatten().double().sort().values
    below = torch.searchsorted(ordered, known, right=False) + torch.searchsorted(ordered, known, right=True)
    return float(below.double().mean() / (2 * len(ordered)))
