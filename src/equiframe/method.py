"""Methods: head + loss + second stage under one name, and how their parts are built from flat fields.

A recipe names a method and may override any of its fields; a field that the chosen head or loss does not have is
refused with the reason, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from equiframe.errors import InputError, unknown
from equiframe.frames import TreeFrame, make_frame
from equiframe.frames.assign import SIMILAR
from equiframe.heads import AffineHead, CosineHead, FrameHead, Head, LinearHead, NearestFrameHead
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
    SampledCrossEntropy,
    SquaredError,
    VectorScaling,
)

_NORMALISED = {"norm": "batch", "length": "unit", "logit_scale": 16.0, "e_h": 1.0}
HEADS: dict[str, dict[str, object]] = {  # head → its fields and their defaults
    "linear": {},
    "frozen-linear": {},
    "cosine": {"projection": "none", **_NORMALISED},
    "frame": {
        "geometry": "auto",
        "projection": "none",
        "capacity": None,
        "frame_order": "given",
        "e_w": 1.0,
        **_NORMALISED,
    },
    "nearest-frame": {"e_w": 1.0, "frame_rate": 0.01, **_NORMALISED},
}
FRAME_ORDERS = ("given", "random", *SIMILAR)
TREE_FIELDS: dict[str, object] = {"sibling_cosine": 0.5}  # of geometry tree
ORDER_FIELDS: dict[str, object] = {"frame_order_after": 0.0}  # of the orders by similarity
PROJECTIONS = ("none", "auto")
PROJECTION_LIMIT = 1024
"""The most dimensions that ``projection="auto"`` goes to: a dense simplex of 4 MB. Beyond, a frame in the features' own dimensions is the cheap one."""
FRAME_HEADS = ("frame", "nearest-frame")
LOSSES: dict[str, tuple[type[Loss], dict[str, object]]] = {  # loss → its class, its fields and their defaults
    "ce": (CrossEntropy, {"label_smoothing": 0.0}),
    "sampled-ce": (SampledCrossEntropy, {"sampled_classes": 1024, "tau": 0.0}),
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
MIXING: dict[str, object] = {"mixup": 0.0, "cutmix": 0.0, "remix": False, "mix_share": "all", "mix_until": 1.0}
"""How training images are mixed: fields and their defaults (`equiframe.data.mixing`), those of no mixing."""
_EVERY_METHOD = {"sampler": "instance", **MIXING, "class_tree": None, "second_stage": "none"}
_EVERY_LOSS = {"class_weighting": "none", "alignment": 0.0}
WEIGHTING_FIELDS: dict[str, dict[str, object]] = {  # class weighting → its fields and their defaults
    name: {
        **({"reweight_from": 0.0} if name != "none" else {}),
        **({"effective_beta": 0.9999} if name.startswith("effective-number") else {}),
    }
    for name in CLASS_WEIGHTINGS
}
_RESCALABLE = ("linear", "frozen-linear", "cosine")
SECOND_STAGES: dict[str, tuple[str, tuple[str, ...] | None]] = {  # name → what it is, and the heads it makes sense on
    "none": ("the model as it was trained", None),
    "crt": ("a linear classifier anew, class-balanced (Kang 2020)", None),
    "crt-adjusted": ("crt, balanced half by weights n^−½ and half by logit adjustment (Menon 2021)", None),
    "crt-blend": (
        "the trained classifier and crt-adjusted, mixed by how well the first knows the training images",
        None,
    ),
    "tau-norm": ("class vectors divided by their length to the power τ (Kang 2020)", ("linear",)),
    "lws": ("learned scales of the logits, class-balanced (Kang 2020)", _RESCALABLE),
    "label-aware-smoothing": ("lws with more label smoothing for larger classes (MiSLAS, Zhong 2021)", _RESCALABLE),
    "ncm": ("nearest class mean by cosine (Kang 2020)", None),
    "ncm-euclidean": ("nearest class mean by distance", None),
    "post-hoc": ("logits minus τ·log(n_k/N) (Menon 2021)", None),
}
STAGES_WITH_TAU = ("tau-norm", "post-hoc")
METHOD_FIELDS = (
    "head",
    "loss",
    "sampler",
    *MIXING,
    *dict.fromkeys([f for fields in HEADS.values() for f in fields]),
    *TREE_FIELDS,
    *ORDER_FIELDS,
    "class_tree",
    *_EVERY_LOSS,
    *dict.fromkeys([f for fields in WEIGHTING_FIELDS.values() for f in fields]),
    "second_stage",
    "stage_tau",
    *dict.fromkeys([f for _, fields in LOSSES.values() for f in fields]),
)


@dataclass(frozen=True)
class Method:
    """A named choice of fields, with one line on what it is."""

    summary: str
    fields: Mapping[str, object]


_LDAM = {"head": "cosine", "loss": "ldam", "norm": "none", "logit_scale": 30.0}
_ETF_SQRT_LA = {
    "head": "frame",
    "loss": "logit-adjusted",
    "projection": "auto",
    "length": "free",
    "logit_scale": 1.0,
    "sampler": "square-root",
}
_MIXES_KNOWN = {"mixup": 1.0, "mix_share": "known", "mix_until": 0.8}
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
    "crt": Method(
        "ce, then a linear classifier anew on class-balanced features (Kang 2020)",
        {"head": "linear", "loss": "ce", "second_stage": "crt"},
    ),
    "crt-adjusted": Method(
        "ce, then crt, balanced half by weights and half by logit adjustment (Menon 2021)",
        {"head": "linear", "loss": "ce", "second_stage": "crt-adjusted"},
    ),
    "tau-norm": Method(
        "ce, then class vectors normalised by their length to the power τ (Kang 2020)",
        {"head": "linear", "loss": "ce", "second_stage": "tau-norm"},
    ),
    "lws": Method(
        "ce, then learned scales of the class vectors (Kang 2020)",
        {"head": "linear", "loss": "ce", "second_stage": "lws"},
    ),
    "label-aware-smoothing": Method(
        "ce, then scales learned with label-aware smoothing (MiSLAS, Zhong 2021, without shifted BatchNorm)",
        {"head": "linear", "loss": "ce", "second_stage": "label-aware-smoothing"},
    ),
    "ncm": Method(
        "ce, then nearest class mean by cosine (Kang 2020)", {"head": "linear", "loss": "ce", "second_stage": "ncm"}
    ),
    "post-hoc": Method(
        "ce, then logits minus τ·log prior (Menon 2021)", {"head": "linear", "loss": "ce", "second_stage": "post-hoc"}
    ),
    "balanced-softmax": Method(
        "learnable linear classifier, balanced softmax (Ren 2020)", {"head": "linear", "loss": "balanced-softmax"}
    ),
    "logit-adjusted": Method(
        "learnable linear classifier, logit-adjusted cross-entropy (Menon 2021)",
        {"head": "linear", "loss": "logit-adjusted"},
    ),
    "cosine-la": Method(
        "learnable class vectors of length 1, logit-adjusted cross-entropy; BatchNorm, free feature length",
        {"head": "cosine", "loss": "logit-adjusted", "length": "free", "logit_scale": 1.0},
    ),
    "sqrt-la": Method(
        "logit-adjusted on classes drawn by the square root of their size (Mahajan 2018)",
        {"head": "linear", "loss": "logit-adjusted", "sampler": "square-root"},
    ),
    "sqrt-blend": Method(
        "sqrt-la, then crt-blend: the trained classifier, and one fitted to its features, for what it leaves to mend",
        {"head": "linear", "loss": "logit-adjusted", "sampler": "square-root", "second_stage": "crt-blend"},
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
    "etf-crt": Method(
        "etf-ce, then crt-adjusted: features learned on a fixed frame, a linear classifier fitted to them",
        {"head": "frame", "loss": "ce", "length": "free", "logit_scale": 1.0, "second_stage": "crt-adjusted"},
    ),
    "etf-la": Method(
        "fixed frame, logit-adjusted cross-entropy; BatchNorm, free feature length",
        {"head": "frame", "loss": "logit-adjusted", "length": "free", "logit_scale": 1.0},
    ),
    "etf-sqrt-la": Method(
        "etf-la on classes drawn by the square root of their size: small ones are seen more often and adjusted for in full",
        _ETF_SQRT_LA,
    ),
    "etf-sqrt-blend": Method(
        "etf-sqrt-la, then crt-blend: the frame, and a linear classifier fitted to the features, for what it leaves to mend",
        {**_ETF_SQRT_LA, "second_stage": "crt-blend"},
    ),
    "etf-mix-la": Method(
        "etf-sqrt-la, with mixup of as many batches as the network knows, until the learning rate falls",
        {**_ETF_SQRT_LA, **_MIXES_KNOWN},
    ),
    "etf-mix-blend": Method(
        "etf-mix-la, then crt-blend: the frame, and a linear classifier fitted to the features, for what it leaves to mend",
        {**_ETF_SQRT_LA, **_MIXES_KNOWN, "second_stage": "crt-blend"},
    ),
    "etf-sampled-ce": Method(
        "fixed frame, cross-entropy on sampled classes (for very many)",
        {"head": "frame", "loss": "sampled-ce", "length": "free", "logit_scale": 1.0},
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
    known = {**HEADS[head], **LOSSES[loss][1], **_EVERY_LOSS, **WEIGHTING_FIELDS[weighting], **_EVERY_METHOD}
    if chosen.get("second_stage") in STAGES_WITH_TAU:
        known["stage_tau"] = None
    projection = str(chosen.get("projection", "none"))
    if projection not in PROJECTIONS:
        raise unknown("projection", projection, PROJECTIONS)
    if head == "frame":
        known |= _check_frame(chosen)
        if projection == "auto" and not _takes_projection(chosen):
            if "projection" in given:
                raise InputError(
                    "projection 'auto' makes room for a simplex: it goes with geometry auto or simplex and without frame_order"
                )
            chosen["projection"] = "none"
    for name in given:
        if name not in known and any(name in fields for fields in WEIGHTING_FIELDS.values()):
            raise InputError(f"field {name!r} does not belong to class weighting {weighting!r} of method {method!r}")
        if name == "stage_tau" and name not in known:
            raise InputError(f"field 'stage_tau' belongs to the second stages {' and '.join(STAGES_WITH_TAU)}")
        if head == "frame" and name in TREE_FIELDS and name not in known:
            raise InputError(f"field {name!r} belongs to geometry 'tree', not to {chosen.get('geometry', 'auto')!r}")
        if head == "frame" and name in ORDER_FIELDS and name not in known:
            raise InputError(
                f"field {name!r} belongs to frame_order {' and '.join(map(repr, SIMILAR))} by the classes' images or features"
                + ("; class_tree decides the order before training" if given.get("class_tree") else "")
            )
        if name not in known and name not in ("head", "loss"):
            raise InputError(f"field {name!r} does not belong to head {head!r} or loss {loss!r} of method {method!r}")
    chosen |= _check_mixing(chosen, given)
    known |= {name: value for name, value in chosen.items() if name in known}
    if loss == "ldam" and known.get("length") != "unit":
        raise InputError(
            f"loss 'ldam' sets margins of cosines and needs head 'cosine', 'frame' or 'nearest-frame' with length 'unit', "
            f"not head {head!r}" + (f" with length {known['length']!r}" if "length" in known else "")
        )
    _check_second_stage(str(known["second_stage"]), head, loss)
    if known.get("capacity") is not None and known["second_stage"] != "none":
        raise InputError(
            f"capacity reserves vectors of the frame, and second stage {known['second_stage']!r} puts a linear classifier in its "
            "place; take a method without one (etf-ce, etf-la), or second_stage none (--second-stage none)"
        )
    return {"head": head, "loss": loss, **{name: known.get(name) for name in METHOD_FIELDS[2:]}}


def method_with(fields: Mapping[str, object]) -> str | None:
    """The named method that has exactly these fields; None where none has.

    >>> method_with(resolve_method("ce", {"second_stage": "crt"}))
    'crt'
    """
    return next((name for name in METHODS if resolve_method(name, {}) == fields), None)


def _check_mixing(chosen: Mapping[str, object], given: Mapping[str, object]) -> dict[str, object]:
    """The fields of no mixing where neither mixup nor cutmix is on; one that was asked for nevertheless is an `InputError`."""
    if chosen.get("mixup") or chosen.get("cutmix"):
        return {}
    for name, does in (
        ("remix", "changes the targets of mixed images"),
        ("mix_share", "says how many batches are mixed"),
        ("mix_until", "ends the mixing of images"),
    ):
        if given.get(name, MIXING[name]) != MIXING[name]:
            raise InputError(f"{name} {does}; it needs mixup or cutmix above 0")
    return dict(MIXING)


def _check_frame(chosen: Mapping[str, object]) -> dict[str, object]:
    """The fields that a frame head's geometry and order bring with them; what makes no sense together is an `InputError`."""
    order, tree = chosen.get("frame_order", "given"), chosen.get("class_tree")
    if order not in FRAME_ORDERS:
        raise unknown("frame order", str(order), FRAME_ORDERS)
    if chosen.get("geometry") == "tree":
        if tree is None:
            raise InputError("geometry 'tree' needs class_tree, the group of each class (0,0,1,1,2)")
        if order != "given":
            raise InputError(
                "frame_order does not go with geometry 'tree': the tree says which class gets which vector"
            )
        if chosen.get("capacity") is not None:
            raise InputError(
                "capacity does not go with geometry 'tree': a class that comes later has no place in the tree"
            )
        return dict(TREE_FIELDS)
    if order == "given":
        return {}
    if chosen.get("capacity") is not None:
        raise InputError(
            f"frame_order {order!r} does not go with capacity: classes that come later cannot be compared yet"
        )
    after = chosen.get("frame_order_after")
    if after is not None and not 0 <= after < 1:  # type: ignore[operator]
        raise InputError(f"frame_order_after must be in [0, 1), a share of the run, got {after!r}")
    return dict(ORDER_FIELDS) if order in SIMILAR and tree is None else {}


def _check_second_stage(stage: str, head: str, loss: str) -> None:
    if stage not in SECOND_STAGES:
        raise unknown("second stage", stage, SECOND_STAGES)
    heads = SECOND_STAGES[stage][1]
    if heads is not None and head not in heads:
        why = "never learned their lengths" if head == "frozen-linear" else "all have equal length by construction"
        raise InputError(
            f"second stage {stage!r} mends the lengths of class vectors, and those of head {head!r} {why}; "
            "crt, crt-adjusted, ncm and post-hoc take any head"
        )
    adjusted = issubclass(LOSSES[loss][0], LogitAdjustedCrossEntropy | VectorScaling)
    if stage == "crt-blend" and not adjusted:
        raise InputError(
            f"second stage 'crt-blend' keeps a part of the trained classifier, and that of loss {loss!r} takes no account of class counts; "
            "take loss logit-adjusted, balanced-softmax or vs, or another second stage (--second-stage none or crt-adjusted)"
        )
    if stage == "post-hoc" and adjusted:
        raise InputError(f"second stage 'post-hoc' adjusts logits by class counts, which loss {loss!r} does already")


def build_head(fields: Mapping[str, object], dim: int, num_classes: int, *, seed: int = 0) -> Head:
    """The head that resolved method fields describe; ``seed`` rotates the frame.

    With an ``alignment`` a learnable head gets a frame head beside it as its ``aligner`` (BatchNorm, unit length).
    After a second stage that is an `AffineHead` on features as the method's own head normalises them (of unit length for
    ``ncm``, whose logits are cosines).
    """
    head, stage = fields["head"], fields.get("second_stage", "none")
    if stage != "none":
        norm, length, e_h = (fields[name] for name in ("norm", "length", "e_h"))
        length = "unit" if stage == "ncm" else length or "free"
        projection = projected_dim(fields, dim, num_classes)
        return AffineHead(dim, num_classes, norm=norm or "none", length=length, e_h=e_h or 1.0, projection=projection)
    options = {name: fields.get(name, default) for name, default in HEADS[head].items()}
    if "projection" in options:
        options["projection"] = projected_dim(fields, dim, num_classes)
    tree = fields.get("class_tree")
    if tree is not None and len(tree) != num_classes:
        raise InputError(f"class_tree names the group of {len(tree)} classes, the data have {num_classes}")
    if head == "frame":
        return _frame_head(dim, num_classes, fields, options, seed)
    if head == "nearest-frame":
        return NearestFrameHead(dim, num_classes, seed=seed, **options)
    if head == "cosine":
        built: Head = CosineHead(dim, num_classes, **options)
    else:
        built = LinearHead(dim, num_classes, frozen=head == "frozen-linear")
    if fields.get("alignment"):
        built.aligner = FrameHead(dim, num_classes, logit_scale=1.0, seed=seed)
    return built


def _takes_projection(fields: Mapping[str, object]) -> bool:
    """Whether these fields leave the frame a simplex, or leave open what it is, or make none."""
    return fields.get("geometry") in (None, "auto", "simplex") and fields.get("frame_order") in (None, "given")


def projected_dim(fields: Mapping[str, object], dim: int, num_classes: int) -> int | None:
    """P, the dimensions that a head with these fields projects features of width D to; None where it takes them as they are.

    ``projection="auto"`` goes to K−1 dimensions, the fewest that hold a simplex of K vectors, where D holds none (K > D+1), K−1 is at most
    `PROJECTION_LIMIT`, and neither another geometry than the simplex nor an order was asked for. K counts the vectors that ``capacity`` reserves. Saved
    models say ``auto``, so this rule stays as it is.
    """
    if fields.get("projection") != "auto" or not _takes_projection(fields):
        return None
    vectors = cast(int, fields.get("capacity") or num_classes)
    return vectors - 1 if dim + 1 < vectors <= PROJECTION_LIMIT + 1 else None


def _frame_head(dim: int, num_classes: int, fields: Mapping, options: dict[str, object], seed: int) -> FrameHead:
    order = options.pop("frame_order") or "given"
    if options["geometry"] == "tree":
        options["geometry"] = TreeFrame(fields["class_tree"], dim, sibling_cosine=fields["sibling_cosine"], seed=seed)
    elif order != "given":
        frame = make_frame(num_classes, dim, geometry=str(options["geometry"]), seed=seed)
        if frame.geometry == "simplex":
            raise InputError(
                f"frame_order {order!r} makes no sense on a simplex (K={num_classes} <= D+1={dim + 1}): all its angles are equal"
            )
        generator = torch.Generator().manual_seed(seed)
        options |= {
            "geometry": frame,
            "order": torch.randperm(num_classes, generator=generator) if order == "random" else range(num_classes),
        }
    return FrameHead(dim, num_classes, seed=seed, **options)


def build_loss(fields: Mapping[str, object], class_counts: Sequence[int] | Tensor) -> Loss:
    """The loss that resolved method fields describe."""
    make, options = LOSSES[fields["loss"]]
    names = (*options, *_EVERY_LOSS, *WEIGHTING_FIELDS[fields["class_weighting"]])
    return make(class_counts=class_counts, **{name: fields[name] for name in names if name in fields})
