"""Every head with every loss: it builds and steps, or is refused with the reason. The docs tell the same as the code."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from equiframe import FrameHead, InputError, LinearHead, MixedTargets, NearestFrameHead
from equiframe.losses import CLASS_WEIGHTINGS
from equiframe.method import (
    FRAME_HEADS,
    HEADS,
    LOSSES,
    METHOD_FIELDS,
    METHODS,
    MIXING,
    WEIGHTING_FIELDS,
    build_head,
    build_loss,
    resolve_method,
)
from equiframe.recipe import FIELD_NAMES

K, COUNTS = 4, [40, 20, 10, 5]
HARD = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])
TARGETS = {
    "hard": HARD,
    "mixed": MixedTargets(HARD, HARD.flip(0), 0.7),
    "soft": torch.rand(8, K, generator=torch.Generator().manual_seed(1)).softmax(1),
}
LENGTHS = {head: ("unit", "free") if "length" in fields else (None,) for head, fields in HEADS.items()}


def step(fields, targets):
    """Gradient of a small network under these fields, and its loss."""
    torch.manual_seed(0)
    net = nn.Linear(6, 16)
    head = build_head(fields, 16, K)
    loss = build_loss(fields, COUNTS)
    value = loss(head(net(torch.randn(8, 6))), targets)
    value.backward()
    return value, net.weight.grad


def refusal(head, loss, length):
    """Why a pair does not make sense, or None."""
    if loss in ("dr", "dr-released", "angular") and head not in FRAME_HEADS:
        return "pulls features to fixed class vectors and needs head 'frame' or 'nearest-frame'"
    if loss == "ldam" and length != "unit":
        return "sets margins of cosines and needs head 'cosine', 'frame' or 'nearest-frame' with length 'unit'"
    return None


@pytest.mark.parametrize(("head", "loss"), list(itertools.product(HEADS, LOSSES)))
def test_every_pair_steps_or_is_refused_with_the_reason(head, loss):
    for length in LENGTHS[head]:
        chosen = {"head": head, "loss": loss, "length": length}
        if reason := refusal(head, loss, length):
            with pytest.raises(InputError, match=reason):
                resolve_method("ce", chosen)
            continue
        for weighting, alignment in itertools.product(CLASS_WEIGHTINGS, (None, 0.1)):
            fields = resolve_method("ce", {**chosen, "class_weighting": weighting, "alignment": alignment})
            for kind, targets in TARGETS.items():
                value, gradient = step(fields, targets)
                assert bool(torch.cat([value[None], gradient.ravel()]).isfinite().all()), (chosen, weighting, kind)
                assert gradient.abs().sum() > 0, (chosen, weighting, kind)


def test_every_method_field_is_a_recipe_field_and_resolves():
    assert set(METHOD_FIELDS) <= set(FIELD_NAMES)
    for name, method in METHODS.items():
        fields = resolve_method(name, {})
        assert tuple(fields) == METHOD_FIELDS
        assert method.fields.items() <= fields.items()
        assert resolve_method(name, fields) == fields  # a settled recipe means the same method


def test_mixing_is_the_methods_unless_the_recipe_says_otherwise():
    mixed = resolve_method("etf-mix-la", {})
    assert [mixed[name] for name in MIXING] == [1.0, 0.0, False, "known", 0.8]
    assert {**mixed, **MIXING} == resolve_method("etf-sqrt-la", {}), "nothing else is different"
    assert resolve_method("etf-mix-la", {"mixup": 0.0}) == resolve_method("etf-sqrt-la", {}), "off is off, whole"
    assert resolve_method("etf-mix-la", {"mixup": 0.0, "cutmix": 0.5})["mix_share"] == "known"
    assert resolve_method("etf-mix-la", {"mix_share": "all"})["mixup"] == 1.0
    plain = resolve_method("ce", {"mixup": 0.4})
    assert [plain[name] for name in MIXING] == [0.4, 0.0, False, "all", 1.0]
    for asked in ({"remix": True}, {"mix_share": "known"}, {"mix_until": 0.5}):
        with pytest.raises(InputError, match="it needs mixup or cutmix above 0"):
            resolve_method("ce", asked)
        with pytest.raises(InputError, match="it needs mixup or cutmix above 0"):
            resolve_method("etf-mix-la", {"mixup": 0.0, **asked})
        assert resolve_method("ce", {"cutmix": 1.0, **asked}).items() >= asked.items()


@pytest.mark.parametrize("name", sorted({f for _, fields in LOSSES.values() for f in fields}))
def test_loss_fields_reach_the_loss(name):
    loss = next(loss for loss, (_, fields) in LOSSES.items() if name in fields)
    method = {"ldam": "ldam", "dr-released": "etf-dr-released"}.get(loss, "ce")
    values = []
    for value in (1, 2) if name == "sampled_classes" else (0.11, 0.37):
        fields = resolve_method(method, {"loss": loss, name: value})
        values.append(step(fields, HARD)[0].item())
    assert values[0] != values[1]


@pytest.mark.parametrize(
    ("name", "values", "method"),
    [
        ("reweight_from", (0.0, 0.5), "class-weighted"),
        ("effective_beta", (0.0, 0.9), "effective-number"),
        ("alignment", (0.1, 0.2), "etf-dr"),
        ("frame_rate", (0.1, 0.9), "nearest-frame-dr"),
        ("class_weighting", ("none", "batch-balanced"), "ldam"),
    ],
)
def test_other_new_fields_reach_their_parts(name, values, method):
    first, second = (step(resolve_method(method, {name: value}), HARD)[0].item() for value in values)
    assert first != second


def test_weighting_fields_belong_to_their_weightings():
    for weighting, field in itertools.product(CLASS_WEIGHTINGS, ("reweight_from", "effective_beta")):
        chosen = {"class_weighting": weighting, field: 0.5}
        if field in WEIGHTING_FIELDS[weighting]:
            assert resolve_method("ce", chosen)[field] == 0.5
        else:
            with pytest.raises(InputError, match=f"'{field}' does not belong to class weighting '{weighting}'"):
                resolve_method("ce", chosen)
    plain = resolve_method("ldam-drw", {"class_weighting": "none"})  # what the method itself set falls away
    assert (plain["reweight_from"], plain["effective_beta"]) == (None, None)
    with pytest.raises(InputError, match="did you mean 'effective-number'"):
        resolve_method("ce", {"class_weighting": "effective-numbers"})


@pytest.mark.parametrize(
    ("method", "overrides", "message"),
    [
        ("ldam", {"head": "linear"}, "not head 'linear'"),
        ("ldam", {"length": "free"}, "not head 'cosine' with length 'free'"),
        ("etf-ce", {"loss": "ldam"}, "not head 'frame' with length 'free'"),
        ("etf-dr", {"frame_order": "near"}, "frame order 'near'"),
        ("etf-dr", {"frame_order_after": 0.1}, "'frame_order_after' belongs to frame_order 'apart' and 'together'"),
        (
            "etf-dr",
            {"frame_order": "random", "frame_order_after": 0.1},
            "belongs to frame_order 'apart' and 'together'",
        ),
        (
            "etf-dr",
            {"frame_order": "apart", "frame_order_after": 1.0},
            r"must be in \[0, 1\), a share of the run, got 1.0",
        ),
        (
            "etf-dr",
            {"frame_order": "apart", "frame_order_after": 0.1, "class_tree": (0, 1)},
            "class_tree decides the order before training",
        ),
        ("etf-dr", {"frame_order": "apart", "capacity": 20}, "does not go with capacity"),
        ("etf-dr", {"geometry": "tree"}, "needs class_tree, the group of each class"),
        ("etf-dr", {"geometry": "tree", "class_tree": (0, 1), "frame_order": "random"}, "the tree says which class"),
        ("etf-dr", {"geometry": "tree", "class_tree": (0, 1), "capacity": 9}, "has no place in the tree"),
        ("etf-dr", {"sibling_cosine": 0.1}, "'sibling_cosine' belongs to geometry 'tree', not to 'auto'"),
        ("ce", {"sibling_cosine": 0.1}, "'sibling_cosine' does not belong to head 'linear'"),
        ("ce", {"capacity": 20}, "'capacity' does not belong to head 'linear'"),
        ("etf-la", {"projection": "autp"}, "unknown projection 'autp'; did you mean 'auto'"),
        (
            "etf-la",
            {"projection": "auto", "geometry": "orthoplex"},
            "goes with geometry auto or simplex and without frame_order",
        ),
        ("etf-la", {"projection": "auto", "frame_order": "random"}, "makes room for a simplex"),
        ("ce", {"projection": "auto"}, "'projection' does not belong to head 'linear'"),
        ("ce", {"frame_order": "apart"}, "'frame_order' does not belong to head 'linear'"),
        ("nearest-frame-dr", {"frame_order": "apart"}, "'frame_order' does not belong to head 'nearest-frame'"),
        ("nearest-frame-dr", {"geometry": "simplex"}, "'geometry' does not belong to head 'nearest-frame'"),
        ("etf-dr", {"frame_rate": 0.1}, "'frame_rate' does not belong to head 'frame'"),
        ("focal", {"label_smoothing": 0.1}, "'label_smoothing' does not belong to head 'linear' or loss 'focal'"),
        ("vs", {"focal_gamma": 1.0}, "'focal_gamma' does not belong"),
    ],
)
def test_what_does_not_belong_together_is_refused(method, overrides, message):
    with pytest.raises(InputError, match=message):
        resolve_method(method, overrides)


def test_heads_are_what_their_names_say():
    assert type(build_head(resolve_method("nearest-frame-la", {}), 16, K)) is NearestFrameHead
    assert type(build_head(resolve_method("etf-disa", {}), 16, K)) is FrameHead
    disa = build_head(resolve_method("disa", {}), 16, K)
    assert (type(disa), type(disa.aligner)) == (LinearHead, FrameHead)
    with pytest.raises(InputError, match="needs D >= 9, got D=8"):
        build_head(resolve_method("nearest-frame-dr", {}), 8, 10)


def test_docs_tell_every_method_its_head_and_its_loss():
    text = (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    assert [row[0].strip("`") for row in rows] == list(METHODS)
    for name, head, loss, formula, _, told in rows:
        fields = resolve_method(name.strip("`"), {})
        assert (head.strip("`"), loss.strip("`")) == (fields["head"], fields["loss"]), name
        assert formula
        for field, value in re.findall(r"`(\w+)` ([\w.-]+)", told):  # a value that is told is the one that is used
            used = fields[field]
            assert value == used if isinstance(used, str) else float(value) == used, (name, field)
        needed = set(LOSSES[fields["loss"]][1]) if "as `" not in told else set()
        assert needed | set(METHODS[name.strip("`")].fields) - {"head", "loss"} <= {
            *re.findall(r"`(\w+)`", told),
            *(METHODS["ldam"].fields if "as `ldam`" in told else ()),
        }, name
