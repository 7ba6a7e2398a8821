import io
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from equiframe import (
    CosineHead,
    CrossEntropy,
    DotRegression,
    FrameHead,
    InputError,
    LinearHead,
    MixedTargets,
    NearestFrameHead,
    nearest_simplex,
    training_parameters,
)
from equiframe.method import METHODS, build_head, build_loss, resolve_method


def features(b=6, d=16, seed=0):
    return torch.randn(b, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("e_w", "e_h", "scale"), [(1.0, 1.0, 16.0), (4.0, 9.0, 0.5)])
def test_unit_features_scale_and_lengths(e_w, e_h, scale):
    head = FrameHead(16, 10, logit_scale=scale, norm="none", e_w=e_w, e_h=e_h, seed=3)
    x = features()
    output = head(x)
    torch.testing.assert_close(output.features.norm(dim=1), torch.full((6,), math.sqrt(e_h)))
    cosines = F.normalize(x, dim=1) @ head.frame.dense().T
    torch.testing.assert_close(output.logits, scale * math.sqrt(e_w * e_h) * cosines)
    torch.testing.assert_close(head.class_vectors().norm(dim=1), torch.full((10,), math.sqrt(e_w)))


def test_free_length_leaves_features_alone():
    head = FrameHead(16, 10, logit_scale=1.0, norm="none", length="free")
    x = features()
    assert torch.equal(head(x).features, x)


def test_batch_norm_comes_before_the_length():
    head = FrameHead(16, 10, logit_scale=1.0, norm="batch").train()
    x = features()
    expected = F.normalize((x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt(), dim=1)
    torch.testing.assert_close(head(x).features, expected)
    assert set(training_parameters(head)) == {"batch_norm.weight", "batch_norm.bias"}


def test_logits_are_made_only_when_asked_for(monkeypatch):
    head = FrameHead(16, 10, logit_scale=1.0)
    calls = []
    monkeypatch.setattr(head.frame, "logits", lambda h: calls.append(1) or h @ head.frame.dense().T)
    output = head(features())
    DotRegression(class_weighting="batch-balanced")(output, torch.arange(6)).backward()
    assert calls == []
    assert output.logits is output.logits
    assert calls == [1]


def test_the_scale_has_no_silent_default():
    with pytest.raises(TypeError, match="logit_scale"):
        FrameHead(16, 10)


@pytest.mark.parametrize("kind", ["frame", "nearest-frame", "linear", "frozen-linear", "cosine"])
def test_reloaded_head_is_the_saved_one_to_the_bit(kind):
    fields = {
        "head": kind,
        "geometry": "auto",
        "norm": "batch",
        "length": "unit",
        "logit_scale": 8.0,
        "e_w": 1.0,
        "e_h": 1.0,
        "frame_rate": 0.1,
    }
    head = build_head(fields, 16, 10, seed=0)
    CrossEntropy()(head(features()), torch.arange(6))  # moves the running statistics
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    file.seek(0)
    other = build_head(fields, 16, 10, seed=12345)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = features(seed=1)
    assert torch.equal(head.eval()(x).logits, other.eval()(x).logits)


def test_linear_head_really_learns_and_frozen_one_does_not():
    for frozen in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 16), LinearHead(16, 10, frozen=frozen))
        before = {k: v.clone() for k, v in net[1].state_dict().items()}
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
        CrossEntropy()(net(features()), torch.arange(6)).backward()
        optimizer.step()
        changed = any(not torch.equal(before[k], v) for k, v in net[1].state_dict().items())
        assert changed is not frozen
        assert bool(training_parameters(net[1])) is not frozen


def test_cosine_head_ignores_the_length_of_its_weights():
    head = CosineHead(16, 10, logit_scale=8.0, norm="none")
    x = features()
    first = head(x).logits
    with torch.no_grad():
        head.weight *= 7.0
    torch.testing.assert_close(head(x).logits, first)
    assert first.abs().max() <= 8.0


@pytest.mark.parametrize("cast", ["half", "double", "bfloat16"])
def test_heads_follow_the_dtype(cast):
    head = getattr(FrameHead(16, 10, logit_scale=4.0), cast)().eval()
    output = head(features())
    assert output.logits.dtype == head.frame.dense().dtype
    assert bool(output.logits.isfinite().all())


def test_autocast_does_not_round_cosines():
    head = FrameHead(16, 10, logit_scale=1.0, norm="none")
    x = features()
    plain = head(x).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(x).logits, plain)


def test_zero_features_are_finite():
    head = FrameHead(16, 10, logit_scale=16.0, norm="none")
    x = torch.zeros(3, 16, requires_grad=True)
    DotRegression()(head(x), torch.arange(3)).backward()
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "layer"}, "unknown norm 'layer'"),
        ({"length": "units"}, "did you mean 'unit'"),
        ({"logit_scale": 0.0}, "logit_scale must be a positive number"),
        ({"e_w": -1.0}, "e_w must be a positive number"),
        ({"e_h": float("nan")}, "e_h must be a positive number"),
        ({"frame_rate": 0.0}, "frame_rate must be above 0 and at most 1, got 0.0"),
        ({"geometry": "simplex", "dim": 4}, "needs D >= 9, got D=4"),
    ],
)
def test_wrong_options(options, message):
    options = {"logit_scale": 1.0, **options}
    make = NearestFrameHead if "frame_rate" in options else FrameHead
    with pytest.raises(InputError, match=message):
        make(options.pop("dim", 16), 10, **options)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_builds_and_steps(method):
    fields = resolve_method(method, {})
    torch.manual_seed(0)
    net = nn.Linear(8, 16)
    head = build_head(fields, 16, 4)
    loss = build_loss(fields, [40, 20, 10, 5])(head(net(features(8, 8))), torch.tensor([0, 0, 0, 0, 1, 1, 2, 3]))
    loss.backward()
    assert bool(loss.isfinite())
    assert net.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("method", "overrides", "message"),
    [
        ("etf-rd", {}, "did you mean 'etf-dr'"),
        ("ce", {"geometry": "simplex"}, "field 'geometry' does not belong to head 'linear'"),
        ("etf-dr", {"tau": 2.0}, "field 'tau' does not belong"),
        ("etf-dr", {"head": "linear"}, "needs head 'frame'"),
        ("ce", {"head": "liner"}, "did you mean 'linear'"),
        ("ce", {"loss": "cee"}, "did you mean 'ce'"),
    ],
)
def test_method_fields_are_refused_with_the_reason(method, overrides, message):
    with pytest.raises(InputError, match=message):
        resolve_method(method, overrides)


def test_overrides_reach_the_parts():
    fields = resolve_method("etf-dr", {"loss": "logit-adjusted", "tau": 2.0, "logit_scale": 8.0, "norm": None})
    assert build_loss(fields, [3, 2]).tau == 2.0
    head = build_head(fields, 16, 2)
    assert (head.logit_scale, head.norm) == (8.0, "batch")


def test_head_compiles():
    """torch.compile's graph capture, without a C++ compiler: the result is the eager one."""
    head = FrameHead(16, 10, logit_scale=4.0, norm="none")
    compiled = torch.compile(lambda x: head(x).logits, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(features()), head(features()).logits)


# --- the nearest-frame head, and heads with an aligner ----------------------------------------------------------------


def nearest_head(**options):
    return NearestFrameHead(16, 4, **{"logit_scale": 4.0, "norm": "none", **options}).double()


def batch(b=12, seed=0):
    x = torch.randn(b, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    return x, torch.arange(b) % 3  # class 3 is never seen


def test_nearest_frame_follows_the_running_class_means():
    head = nearest_head(frame_rate=0.25, e_h=4.0)
    means = 2 * head.class_vectors().numpy().copy()
    start = head.class_vectors().clone()
    for seed in range(5):
        x, targets = batch(seed=seed)
        output = head(x)
        DotRegression()(output, targets)
        h = output.features.detach().numpy()
        for k in range(3):
            own = [h[i] for i in range(len(h)) if targets[i] == k]
            means[k] = 0.75 * means[k] + 0.25 * sum(own) / len(own)
    torch.testing.assert_close(head.class_means, torch.from_numpy(means))
    torch.testing.assert_close(head.class_vectors(), nearest_simplex(head.class_means), atol=2e-2, rtol=0)
    gram = 4 / 3 * torch.eye(4, dtype=torch.float64) - 1 / 3
    torch.testing.assert_close(head.class_vectors() @ head.class_vectors().T, gram)
    assert (head.class_vectors() - start).norm() > 0.1
    assert training_parameters(head) == {}


def test_nearest_frame_is_still_in_evaluation_and_at_its_fixed_point():
    head = nearest_head()
    start = head.class_vectors().clone()
    torch.testing.assert_close(2 * nearest_head(e_h=4.0).class_vectors(), nearest_head(e_h=4.0).class_means)
    x, targets = batch()
    DotRegression()(head.eval()(x), targets)
    assert torch.equal(head.class_vectors(), start)
    DotRegression()(head.train()(start[targets]), targets)
    torch.testing.assert_close(head.class_vectors(), start)


def test_nearest_frame_moves_before_the_loss_and_takes_no_gradient():
    """The loss of a batch is that of a fixed head with the moved frame, and so is its gradient."""
    head = nearest_head(frame_rate=0.5)
    x, targets = batch()
    loss = CrossEntropy()(head(x), targets)
    fixed = FrameHead(16, 4, logit_scale=4.0, norm="none").double()
    fixed.frame.class_vectors.copy_(head.class_vectors())
    expected = CrossEntropy()(fixed(x), targets)
    assert torch.equal(loss, expected)
    assert torch.equal(torch.autograd.grad(loss, x)[0], torch.autograd.grad(expected, x)[0])


def test_an_earlier_graph_survives_the_move():
    head = nearest_head(frame_rate=0.5)
    x, targets = batch()
    first = CrossEntropy()(head(x), targets)
    CrossEntropy()(head(x), targets.roll(1))
    first.backward()
    assert bool(x.grad.isfinite().all())


def test_nearest_frame_counts_mixed_targets_by_their_share():
    x, targets = batch()
    q = F.one_hot(targets, 4).double()
    soft = 0.7 * q + 0.3 * q.roll(1, 0)
    heads = [nearest_head(frame_rate=0.5) for _ in range(2)]
    for head, given in zip(heads, (soft, MixedTargets(targets, targets.roll(1), 0.7)), strict=True):
        CrossEntropy()(head(x), given)
    torch.testing.assert_close(heads[0].class_means, heads[1].class_means, rtol=1e-6, atol=1e-7)
    h = heads[0].normalise(x).detach()
    expected = 0.5 * nearest_head().class_means[0] + 0.5 * soft[:, 0] @ h / soft[:, 0].sum()
    torch.testing.assert_close(heads[0].class_means[0], expected)


def test_nearest_frame_ignores_what_is_not_finite():
    head = nearest_head()
    start = head.class_vectors().clone()
    x, targets = batch()
    loss = CrossEntropy()(head(x * math.inf), targets)
    assert not loss.isfinite()
    assert torch.equal(head.class_vectors(), start)


def test_learnable_head_gets_an_aligner_where_a_method_aligns():
    for method in ("ce", "cosine"):
        fields = resolve_method(method, {"alignment": 0.1})
        head = build_head(fields, 16, 4)
        assert set(training_parameters(head)) >= {"aligner.batch_norm.weight", "aligner.batch_norm.bias"}
        assert build_head(resolve_method(method, {}), 16, 4).aligner is None
        other = build_head(fields, 16, 4, seed=9)
        other.load_state_dict(head.state_dict())
        assert torch.equal(other.aligner.class_vectors(), head.aligner.class_vectors())


def test_cosine_scale_is_the_logit_of_cosine_1():
    for head in (
        CosineHead(16, 4, logit_scale=3.0, norm="none", e_h=4.0),
        FrameHead(16, 4, logit_scale=3.0, norm="none", e_w=2.0, e_h=4.0),
        nearest_head(e_w=2.0).eval(),
    ):
        own = head(head.class_vectors().detach()).logits.diagonal()
        torch.testing.assert_close(own, torch.full_like(own, head.cosine_scale))
    assert CosineHead(16, 4, logit_scale=3.0, length="free").cosine_scale is None
    assert LinearHead(16, 4).cosine_scale is None
