"""Methods: head + loss under one name, and how their parts are built from flat fields.

A recipe names a method and may override any of its fields; a field that the chosen head or loss does not have is
refused with the reason, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from equiframe.errors import InputError, unknown
from equiframe.heads import CosineHead, FrameHead, Head, LinearHead, NearestFrameHead
from equiframe.losses import (
    CLASS_WEIGHTINGS,
    LDAM,
    AngularRegression,
    BalancedSoftmax,
    CrossEntropy,
    DotRegression,
    FocalLoss,
    LogitAdjustedCrossEntropy,
    Loss,
    ReleasedDotRegression,
    SquaredError,
    VectorScaling,
)

_NORMALISED = {"norm": "batch", "length": "unit", "logit_scale": 16.0, "e_h": 1.0}
HEADS: dict[str, dict[str, object]] = {  # head → its fields and their defaults
    "linear": {},
    "frozen-linear": {},
    "cosine": dict(_NORMALISED),
    "frame": {"geometry": "auto", "e_w": 1.0, **_NORMALISED},
    "nearest-frame": {"e_w": 1.0, "frame_rate": 0.01, **_NORMALISED},
}
FRAME_HEADS = ("frame", "nearest-frame")
LOSSES: dict[str, tuple[type[Loss], dict[str, object]]] = {  # loss → its class, its fields and their defaults
    "ce": (CrossEntropy, {"label_smoothing": 0.0}),
    "balanced-softmax": (BalancedSoftmax, {"label_smoothing": 0.0}),
    "logit-adjusted": (LogitAdjustedCrossEntropy, {"tau": 1.0, "label_smoothing": 0.0}),
    "vs": (VectorScaling, {"vs_gamma": 0.3, "tau": 1.0, "label_smoothing": 0.0}),
    "focal": (FocalLoss, {"focal_gamma": 2.0}),
    "ldam": (LDAM, {"max_margin": 0.5}),
    "mse": (SquaredError, {"mse_kappa": 1.0, "mse_target": 1.0}),
    "dr": (DotRegression, {}),
    "angular": (AngularRegression, {}),
    "dr-released": (ReleasedDotRegression, {"length_penalty": 0.0}),
}
_EVERY_LOSS = {"class_weighting": "none", "alignment": 0.0}
WEIGHTING_FIELDS: dict[str, dict[str, object]] = {  # class weighting → its fields and their defaults
    name: {
        **({"reweight_from": 0.0} if name != "none" else {}),
        **({"effective_beta": 0.9999} if name.startswith("effective-number") else {}),
    }
    for name in CLASS_WEIGHTINGS
}
METHOD_FIELDS = (
    "head",
    "loss",
    *dict.fromkeys([f for fields in HEADS.values() for f in fields]),
    *_EVERY_LOSS,
    *dict.fromkeys([f for fields in WEIGHTING_FIELDS.values() for f in fields]),
    *dict.fromkeys([f for _, fields in LOSSES.values() for f in fields]),
)


@dataclass(frozen=True)
class Method:
    """A named choice of fields, with one line on what it is."""

    summary: str
    fields: Mapping[str, object]


_LDAM = {"head": "cosine", "loss": "ldam", "norm": "none", "logit_scale": 30.0}
METHODS: dict[str, Method] = {
    "ce": Method("learnable linear classifier, cross-entropy", {"head": "linear", "loss": "ce"}),
    "frozen-random": Method(
        "linear classifier frozen at random, cross-entropy (the authors' CIFAR baseline, by mistake)",
        {"head": "frozen-linear", "loss": "ce"},
    ),
    "label-smoothing": Method(
        "learnable linear classifier, cross-entropy with targets smoothed by 0.1",
        {"head": "linear", "loss": "ce", "label_smoothing": 0.1},
    ),
    "focal": Method("learnable linear classifier, focal loss (Lin 2017)", {"head": "linear", "loss": "focal"}),
    "mse": Method(
        "learnable linear classifier, squared error to one-hot targets (Hui & Belkin 2021)",
        {"head": "linear", "loss": "mse"},
    ),
    "class-weighted": Method(
        "learnable linear classifier, cross-entropy weighted by inverse class frequency",
        {"head": "linear", "loss": "ce", "class_weighting": "class-balanced"},
    ),
    "effective-number": Method(
        "learnable linear classifier, class-balanced cross-entropy by effective numbers (Cui 2019)",
        {"head": "linear", "loss": "ce", "class_weighting": "effective-number"},
    ),
    "cosine": Method("learnable cosine classifier, cross-entropy", {"head": "cosine", "loss": "ce"}),
    "balanced-softmax": Method(
        "learnable linear classifier, balanced softmax (Ren 2020)", {"head": "linear", "loss": "balanced-softmax"}
    ),
    "logit-adjusted": Method(
        "learnable linear classifier, logit-adjusted cross-entropy (Menon 2021)",
        {"head": "linear", "loss": "logit-adjusted"},
    ),
    "vs": Method("learnable linear classifier, VS loss (Kini 2021)", {"head": "linear", "loss": "vs"}),
    "ldam": Method("learnable cosine classifier, label-distribution-aware margins (Cao 2019)", _LDAM),
    "ldam-drw": Method(
        "ldam, with classes weighted by effective number in the last fifth of the run (Cao 2019)",
        {**_LDAM, "class_weighting": "effective-number-mean", "reweight_from": 0.8},
    ),
    "disa": Method(
        "learnable linear classifier, cross-entropy, features transported to a fixed frame (Gao 2024)",
        {"head": "linear", "loss": "ce", "alignment": 0.1},
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
    "etf-disa": Method(
        "etf-ce, with features transported to the frame (Gao 2024)",
        {"head": "frame", "loss": "ce", "length": "free", "logit_scale": 1.0, "alignment": 0.1},
    ),
    "nearest-frame-ce": Method(
        "etf-ce, with the frame nearest to the running class means (Markou 2024)",
        {"head": "nearest-frame", "loss": "ce", "length": "free", "logit_scale": 1.0},
    ),
    "nearest-frame-la": Method(
        "etf-la, with the frame nearest to the running class means",
        {"head": "nearest-frame", "loss": "logit-adjusted", "length": "free", "logit_scale": 1.0},
    ),
    "nearest-frame-dr": Method(
        "etf-dr, with the frame nearest to the running class means", {"head": "nearest-frame", "loss": "dr"}
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
    if loss in ("dr", "dr-released", "angular") and head not in FRAME_HEADS:
        raise InputError(
            f"loss {loss!r} pulls features to fixed class vectors and needs head 'frame' or 'nearest-frame', not {head!r}"
        )
    weighting = str(chosen.get("class_weighting", "none"))
    if weighting not in CLASS_WEIGHTINGS:
        raise unknown("class weighting", weighting, CLASS_WEIGHTINGS)
    known = {**HEADS[head], **LOSSES[loss][1], **_EVERY_LOSS, **WEIGHTING_FIELDS[weighting]}
    for name in given:
        if name not in known and any(name in fields for fields in WEIGHTING_FIELDS.values()):
            raise InputError(f"field {name!r} does not belong to class weighting {weighting!r} of method {method!r}")
        if name not in known and name not in ("head", "loss"):
            raise InputError(f"field {name!r} does not belong to head {head!r} or loss {loss!r} of method {method!r}")
    known |= {name: value for name, value in chosen.items() if name in known}
    if loss == "ldam" and known.get("length") != "unit":
        raise InputError(
            f"loss 'ldam' sets margins of cosines and needs head 'cosine', 'frame' or 'nearest-frame' with length 'unit', "
            f"not head {head!r}" + (f" with length {known['length']!r}" if "length" in known else "")
        )
    return {"head": head, "loss": loss, **{name: known.get(name) for name in METHOD_FIELDS[2:]}}


def build_head(fields: Mapping[str, object], dim: int, num_classes: int, *, seed: int = 0) -> Head:
    """The head that resolved method fields describe; ``seed`` rotates the frame.

    With an ``alignment`` a learnable head gets a frame head beside it as its ``aligner`` (BatchNorm, unit length).
    """
    head = fields["head"]
    options = {name: fields[name] for name in HEADS[head]}
    if head == "frame":
        return FrameHead(dim, num_classes, seed=seed, **options)
    if head == "nearest-frame":
        return NearestFrameHead(dim, num_classes, seed=seed, **options)
    if head == "cosine":
        built: Head = CosineHead(dim, num_classes, **options)
    else:
        built = LinearHead(dim, num_classes, frozen=head == "frozen-linear")
    if fields.get("alignment"):
        built.aligner = FrameHead(dim, num_classes, logit_scale=1.0, seed=seed)
    return built


def build_loss(fields: Mapping[str, object], class_counts: Sequence[int] | Tensor) -> Loss:
    """The loss that resolved method fields describe."""
    make, options = LOSSES[fields["loss"]]
    names = (*options, *_EVERY_LOSS, *WEIGHTING_FIELDS[fields["class_weighting"]])
    return make(class_counts=class_counts, **{name: fields[name] for name in names if name in fields})
