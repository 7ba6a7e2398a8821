"""Methods: head + loss under one name, and how their parts are built from flat fields.

A recipe names a method and may override any of its fields; a field that the chosen head or loss does not have is
refused with the reason, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from equiframe.errors import InputError, unknown
from equiframe.heads import CosineHead, FrameHead, Head, LinearHead
from equiframe.losses import (
    AngularRegression,
    BalancedSoftmax,
    CrossEntropy,
    DotRegression,
    LogitAdjustedCrossEntropy,
    Loss,
    ReleasedDotRegression,
)

_NORMALISED = {"norm": "batch", "length": "unit", "logit_scale": 16.0, "e_h": 1.0}
HEADS: dict[str, dict[str, object]] = {  # head → its fields and their defaults
    "linear": {},
    "frozen-linear": {},
    "cosine": dict(_NORMALISED),
    "frame": {"geometry": "auto", "e_w": 1.0, **_NORMALISED},
}
LOSSES: dict[str, tuple[type[Loss], dict[str, object]]] = {  # loss → its class, its fields and their defaults
    "ce": (CrossEntropy, {"label_smoothing": 0.0}),
    "balanced-softmax": (BalancedSoftmax, {"label_smoothing": 0.0}),
    "logit-adjusted": (LogitAdjustedCrossEntropy, {"tau": 1.0, "label_smoothing": 0.0}),
    "dr": (DotRegression, {}),
    "angular": (AngularRegression, {}),
    "dr-released": (ReleasedDotRegression, {"length_penalty": 0.0}),
}
_EVERY_LOSS = {"class_weighting": "none"}
METHOD_FIELDS = (
    "head",
    "loss",
    *dict.fromkeys([f for fields in HEADS.values() for f in fields]),
    "class_weighting",
    *dict.fromkeys([f for _, fields in LOSSES.values() for f in fields]),
)


@dataclass(frozen=True)
class Method:
    """A named choice of fields, with one line on what it is."""

    summary: str
    fields: Mapping[str, object]


METHODS: dict[str, Method] = {
    "ce": Method("learnable linear classifier, cross-entropy", {"head": "linear", "loss": "ce"}),
    "frozen-random": Method(
        "linear classifier frozen at random, cross-entropy (the authors' CIFAR baseline, by mistake)",
        {"head": "frozen-linear", "loss": "ce"},
    ),
    "cosine": Method("learnable cosine classifier, cross-entropy", {"head": "cosine", "loss": "ce"}),
    "balanced-softmax": Method(
        "learnable linear classifier, balanced softmax (Ren 2020)", {"head": "linear", "loss": "balanced-softmax"}
    ),
    "logit-adjusted": Method(
        "learnable linear classifier, logit-adjusted cross-entropy (Menon 2021)",
        {"head": "linear", "loss": "logit-adjusted"},
    ),
    "etf-ce": Method(
        "fixed frame, cross-entropy; BatchNorm, free feature length",
        {"head": "frame", "loss": "ce", "length": "free", "logit_scale": 1.0},
    ),
    "etf-la": Method(
        "fixed frame, logit-adjusted cross-entropy; BatchNorm, free feature length",
        {"head": "frame", "loss": "logit-adjusted", "length": "free", "logit_scale": 1.0},
    ),
    "etf-dr": Method("fixed frame, dot regression as the paper writes it, unweighted", {"head": "frame", "loss": "dr"}),
    "etf-dr-balanced": Method(
        "fixed frame, dot regression averaged over the classes of a batch (what the authors' code does)",
        {"head": "frame", "loss": "dr", "class_weighting": "batch-balanced"},
    ),
    "etf-dr-released": Method(
        "fixed frame, the authors' released loss with its per-batch E_W",
        {"head": "frame", "loss": "dr-released", "class_weighting": "batch-balanced"},
    ),
    "etf-angular": Method(
        "fixed frame, regression of the angle (pull only, converges linearly; docs/theory.md), unweighted",
        {"head": "frame", "loss": "angular"},
    ),
    "etf-angular-balanced": Method(
        "fixed frame, regression of the angle averaged over the classes of a batch",
        {"head": "frame", "loss": "angular", "class_weighting": "batch-balanced"},
    ),
}


def resolve_method(method: str, overrides: Mapping[str, object]) -> dict[str, object]:
    """All fields of a method: every name in `METHOD_FIELDS` → its value, or None where head and loss lack it.

    Args:
        overrides: field → value; None means "as the method says".

    Raises:
        InputError: for an unknown method, head or loss, or an override that the head and loss do not have.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    given = {name: value for name, value in overrides.items() if value is not None}
    chosen = {**METHODS[method].fields, **given}
    head, loss = str(chosen["head"]), str(chosen["loss"])
    if head not in HEADS:
        raise unknown("head", head, HEADS)
    if loss not in LOSSES:
        raise unknown("loss", loss, LOSSES)
    if loss in ("dr", "dr-released", "angular") and head != "frame":
        raise InputError(f"loss {loss!r} pulls features to fixed class vectors and needs head 'frame', not {head!r}")
    known = {**HEADS[head], **LOSSES[loss][1], **_EVERY_LOSS}
    for name in given:
        if name not in known and name not in ("head", "loss"):
            raise InputError(f"field {name!r} does not belong to head {head!r} or loss {loss!r} of method {method!r}")
    known |= {name: value for name, value in chosen.items() if name in known}
    return {"head": head, "loss": loss, **{name: known.get(name) for name in METHOD_FIELDS[2:]}}


def build_head(fields: Mapping[str, object], dim: int, num_classes: int, *, seed: int = 0) -> Head:
    """The head that resolved method fields describe; ``seed`` rotates the frame."""
    head = fields["head"]
    options = {name: fields[name] for name in HEADS[head]}
    if head == "frame":
        return FrameHead(dim, num_classes, seed=seed, **options)
    if head == "cosine":
        return CosineHead(dim, num_classes, **options)
    return LinearHead(dim, num_classes, frozen=head == "frozen-linear")


def build_loss(fields: Mapping[str, object], class_counts: Sequence[int] | Tensor) -> Loss:
    """The loss that resolved method fields describe."""
    make, options = LOSSES[fields["loss"]]
    values = {name: fields[name] for name in (*options, *_EVERY_LOSS)}
    return make(class_counts=class_counts, **values)
