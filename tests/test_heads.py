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
from equiframe.frames import DenseFrame, make_frame
from equiframe.losses import LogitAdjustedCrossEntropy
from equiframe.method import METHODS, build_head, build_loss, projected_dim, resolve_method


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


def test_a_projection_makes_room_for_a_simplex():
    """Logits of z = M(γ(Ax − μ)/σ + β), entry by entry, on a simplex of 10 vectors for features of width 4."""
    torch.manual_seed(0)
    head = FrameHead(4, 10, logit_scale=2.0, length="free", projection=9).double()
    assert (head.dim, head.inner_dim, head.class_vectors().shape) == (4, 9, (10, 9))
    vectors = head.class_vectors()
    torch.testing.assert_close(vectors @ vectors.T, (10 * torch.eye(10) - 1).double() / 9, rtol=0, atol=1e-6)
    assert training_parameters(head) == {"projection.weight": 36, "batch_norm.weight": 9, "batch_norm.bias": 9}
    x = features(b=12, d=4).double()
    projected = x @ head.projection.weight.T
    mean, sd = projected.mean(0), (projected.var(0, unbiased=False) + head.batch_norm.eps).sqrt()
    expected = 2.0 * ((projected - mean) / sd) @ vectors.T
    output = head(x)
    torch.testing.assert_close(output.logits, expected)
    assert torch.equal(output.raw, x)
    CrossEntropy()(output, torch.arange(10).repeat(2)[:12]).backward()
    assert head.projection.weight.grad.abs().sum() > 0
    with pytest.raises(InputError, match="takes features of width 4, got 9"):
        head(features(d=9))
    with pytest.raises(InputError, match="projection must be at least 1 dimension, got 0"):
        FrameHead(4, 10, logit_scale=1.0, projection=0)


@pytest.mark.parametrize(
    ("fields", "dim", "num_classes", "expected"),
    [
        ({}, 64, 100, None),  # by default features are taken as they are
        ({"projection": "auto"}, 64, 100, 99),
        ({"projection": "auto"}, 64, 65, None),  # the largest simplex that fits without
        ({"projection": "auto"}, 64, 66, 65),
        ({"projection": "auto"}, 64, 1025, 1024),
        ({"projection": "auto"}, 64, 1026, None),  # dense vectors would outgrow what they are for
        ({"projection": "auto", "geometry": "simplex"}, 4, 10, 9),
        ({"projection": "auto", "capacity": 20}, 10, 8, 19),
    ],
)
def test_when_features_are_projected(fields, dim, num_classes, expected):
    fields = resolve_method("etf-ce", fields)
    assert projected_dim(fields, dim, num_classes) == expected
    head = build_head(fields, dim, num_classes)
    assert head.inner_dim == (dim if expected is None else expected)
    assert head.frame.dim == head.inner_dim
    assert (head.frame.geometry == "simplex") is (expected is not None or num_classes <= dim + 1)
    assert head(features(d=dim)).logits.shape == (6, num_classes)


def test_learnable_vectors_take_the_same_projection():
    """`--head cosine` in the default recipe changes the class vectors alone: they learn, and start elsewhere."""
    torch.manual_seed(0)
    head = build_head(resolve_method("etf-sqrt-la", {"head": "cosine"}), 4, 10)
    assert isinstance(head, CosineHead)
    trains = {"projection.weight": 36, "batch_norm.weight": 9, "batch_norm.bias": 9, "weight": 90}
    assert training_parameters(head) == trains
    frame = build_head(resolve_method("etf-sqrt-la", {}), 4, 10)
    frame.projection.load_state_dict(head.projection.state_dict())
    x = features(b=12, d=4)
    torch.testing.assert_close(frame(x).features, head(x).features)
    torch.testing.assert_close(head(x).logits, head(x).features @ head.class_vectors().T)
    torch.testing.assert_close(head.class_vectors().norm(dim=1), torch.ones(10))
    assert build_head(resolve_method("cosine-la", {}), 4, 10).inner_dim == 4


def test_the_default_recipe_projects_where_it_must():
    for method in ("etf-sqrt-la", "etf-sqrt-blend"):
        assert projected_dim(resolve_method(method, {}), 64, 200) == 199
        assert projected_dim(resolve_method(method, {}), 64, 10) is None
    for asked in ({"geometry": "orthoplex"}, {"frame_order": "random"}):  # then there is nothing to make room for
        fields = resolve_method("etf-sqrt-la", asked)
        assert fields["projection"] == "none"
        assert build_head(fields, 6, 10).inner_dim == 6
    blended = build_head(resolve_method("etf-sqrt-blend", {}), 64, 200)
    assert (blended.inner_dim, blended.linear.weight.shape) == (199, (200, 199))
    assert projected_dim(resolve_method("ce", {}), 64, 200) is None


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


# --- reserved vectors, and orders -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "capacity"), [(16, 12), (8, 14), (16, 60), (16, 250)])
@pytest.mark.parametrize("ordered", [False, True])
def test_added_classes_leave_the_old_ones_as_they_were_to_the_bit(dim, capacity, ordered):
    order = torch.randperm(capacity, generator=torch.Generator().manual_seed(1)) if ordered else None
    head = FrameHead(dim, 5, logit_scale=4.0, capacity=capacity, order=order, norm="none", e_w=2.0)
    whole = FrameHead(dim, capacity, logit_scale=4.0, order=order, norm="none", e_w=2.0)
    x, before, state = (
        features(d=dim),
        head(features(d=dim)).logits,
        {k: v.clone() for k, v in head.state_dict().items()},
    )
    assert before.shape == (6, 5)
    assert head.class_vectors().shape == (5, dim)
    head.add_classes(3)
    head.add_classes(1)
    assert (head.num_classes, head.capacity) == (9, capacity)
    assert torch.equal(head(x).logits[:, :5], before)
    assert torch.equal(head(x).logits, whole(x).logits[:, :9])
    assert torch.equal(head.class_vectors(), whole.class_vectors()[:9])
    assert torch.equal(head.vectors(torch.arange(9)), whole.vectors(torch.arange(9)))
    assert [k for k, v in head.state_dict().items() if not torch.equal(v, state[k])] == ["classes_in_use"]


@pytest.mark.parametrize("make", [CrossEntropy, DotRegression])
def test_losses_see_the_classes_in_use_alone(make):
    """A head with reserved vectors has the losses of a head on the vectors in use."""
    head = FrameHead(16, 3, logit_scale=4.0, capacity=7, norm="none")
    head.add_classes(1)
    few = FrameHead(
        16, 4, logit_scale=4.0, geometry=DenseFrame(head.class_vectors(), head.frame.coherence), norm="none"
    )
    for targets in (torch.arange(6) % 4, F.one_hot(torch.arange(6) % 4, 4).float() * 0.7 + 0.075):
        loss = make(class_weighting="batch-balanced")
        torch.testing.assert_close(loss(head(features()), targets), loss(few(features()), targets))
    with pytest.raises(InputError, match=r"class 5 is not in use yet: call add_classes \(4 are\)"):
        DotRegression()(head(features()), torch.arange(6))


def test_state_dict_carries_the_classes_in_use_and_the_order():
    head = FrameHead(8, 4, logit_scale=1.0, capacity=14, order=list(reversed(range(14))))
    head.add_classes(6)
    other = nn.Sequential(FrameHead(8, 4, logit_scale=1.0, capacity=14, order=range(14), seed=9))
    other.load_state_dict({f"0.{name}": value for name, value in head.state_dict().items()})
    assert other[0].num_classes == 10
    assert torch.equal(other.eval()(features(d=8)).logits, head.eval()(features(d=8)).logits)
    wrong = {**head.state_dict(), "classes_in_use": torch.tensor(15)}
    with pytest.raises(InputError, match="the state has 15 classes in use, this head has a capacity of 14"):
        FrameHead(8, 4, logit_scale=1.0, capacity=14, order=range(14)).load_state_dict(wrong)
    assert "classes_in_use" not in FrameHead(8, 4, logit_scale=1.0).state_dict()


def test_order_may_change_after_a_warm_up():
    head = FrameHead(4, 8, logit_scale=1.0, order=range(8), norm="none")
    plain = FrameHead(4, 8, logit_scale=1.0, norm="none")
    x = features(d=4)
    assert torch.equal(head(x).logits, plain(x).logits)
    head.set_order([7, 6, 5, 4, 3, 2, 1, 0])
    assert torch.equal(head(x).logits, plain(x).logits.flip(1))
    assert torch.equal(head.vectors(torch.tensor([0])), plain.vectors(torch.tensor([7])))


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: FrameHead(16, 5, logit_scale=1.0, capacity=4), "capacity must be at least num_classes=5, got 4"),
        (lambda: FrameHead(16, 5, logit_scale=1.0).add_classes(1), "no reserved vectors: make it with capacity="),
        (lambda: FrameHead(16, 5, logit_scale=1.0, capacity=7).add_classes(3), "2 of 7 class vectors are reserved"),
        (lambda: FrameHead(16, 5, logit_scale=1.0, capacity=7).add_classes(0), "cannot add 0 classes"),
        (lambda: FrameHead(16, 5, logit_scale=1.0).set_order(range(5)), r"make it with order=range\(K\)"),
        (lambda: FrameHead(16, 5, logit_scale=1.0, order=range(4)), r"each of the 5 vectors 0\.\.4 once"),
        (lambda: FrameHead(16, 5, logit_scale=1.0, geometry=make_frame(6, 16)), "given frame has K=6 and D=16"),
        (
            lambda: NearestFrameHead(16, 5, logit_scale=1.0, capacity=7),
            "capacity does not belong to a frame that follows",
        ),
    ],
)
def test_wrong_use_of_reserved_vectors_and_orders(use, message):
    with pytest.raises(InputError, match=message):
        use()


def test_what_does_not_fit_together_is_told_in_one_line():
    head = FrameHead(8, 4, logit_scale=1.0)
    with pytest.raises(InputError, match="takes features of width 8, got 7"):
        head(torch.randn(5, 7))
    with pytest.raises(InputError, match="3 class counts were given for a head of 4 classes"):
        LogitAdjustedCrossEntropy(class_counts=[3, 2, 1])(head(torch.randn(5, 8)), torch.zeros(5, dtype=torch.long))
    with pytest.raises(InputError, match=r"DotRegression takes what a head returns: loss\(head\(features\), targets\)"):
        DotRegression()(torch.randn(5, 8), torch.zeros(5, dtype=torch.long))
