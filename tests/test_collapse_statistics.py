"""One pass: order, split, merge, precision, and the decision of the nearest mean."""

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equiframe import collapse
from equiframe.collapse import (
    ClassStatistics,
    LinearAgreement,
    NearestMean,
    collapse_measures,
    merge_states,
    nc4_agreement,
)
from equiframe.errors import InputError

K, D = 5, 6


@pytest.fixture(autouse=True)
def one_thread():
    """Small problems on a busy machine: two threads would wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def case(seed, num=60, dtype=torch.float64, offset=0.0):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(K, (num,), generator=g)
    means = torch.randn(K, D, generator=g, dtype=torch.float64)
    x = means[y] + 0.5 * torch.randn(num, D, generator=g, dtype=torch.float64) + offset
    return x.to(dtype), y


def assert_same(a, b, tolerance=1e-12):
    assert torch.equal(a.counts, b.counts)
    names = ["class_means", "within_variance", "norm_mean", "norm_variance", "sample_mean"]
    names += {"full": ["within_scatter"], "sketch": ["sketched_scatter"], "none": []}[a.within]
    for name in names:
        left, right = getattr(a, name), getattr(b, name)
        size = float(right.nan_to_num().abs().max()) if right.numel() else 0.0
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance * size, equal_nan=True, msg=name)
    assert torch.equal(a.decided, b.decided)
    assert torch.equal(a.agreed, b.agreed)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num=st.integers(0, 40),
    cuts=st.lists(st.integers(0, 40), max_size=6),
    passes=st.integers(1, 4),
    within=st.sampled_from(["full", "sketch", "none"]),
    offset=st.sampled_from([0.0, 1e4]),
)
def test_any_order_split_and_merge_is_the_one_shot(seed, num, cuts, passes, within, offset):
    x, y = case(seed, num, offset=offset)
    predictions = torch.randint(K, (num,))
    kwargs = {"within": within, "class_means": torch.randn(K, D) + offset}
    whole = ClassStatistics(K, D, **kwargs).update(x, y, predictions)
    order = torch.randperm(num)
    edges = sorted({0, num, *(c for c in cuts if c < num)})
    parts = [order[a:b] for a, b in itertools.pairwise(edges)]
    made = [ClassStatistics(K, D, **kwargs) for _ in range(passes)]
    for i, rows in enumerate(parts):
        made[i % passes].update(x[rows], y[rows], predictions[rows])
    # Rounding of x itself at an offset of 1e4 is no error: the same numbers go in. What is summed is near 1.
    tolerance = 1e-12 if offset == 0 else 1e-10
    stacked = merge_states(torch.stack([m.state for m in made]), K, D, within)
    assert_same(ClassStatistics.from_state(stacked, K, D, within=within), whole, tolerance)
    first = made[0]
    for other in made[1:]:
        before = other.state.clone()
        first.merge(other)
        assert torch.equal(other.state, before)
    assert_same(first, whole, tolerance)
    if within != "none" and int(whole.present.sum()) > 1:
        assert collapse.nc1(first) == pytest.approx(collapse.nc1(whole), rel=1e-9, nan_ok=True)


def test_merge_is_a_group_with_the_empty_pass():
    x, y = case(0)
    s = ClassStatistics(K, D).update(x, y)
    state = s.state.clone()
    assert torch.equal(s.merge(ClassStatistics(K, D)).state, state)
    assert torch.equal(ClassStatistics(K, D).merge(s).state, state)
    twice = copy.deepcopy(s).merge(s)
    assert_same(twice, ClassStatistics(K, D).update(x.repeat(2, 1), y.repeat(2)))
    assert_same(copy.deepcopy(s).merge(copy.deepcopy(s)), twice)
    itself = copy.deepcopy(s)
    assert_same(itself.merge(itself), twice)
    assert torch.equal(s.state, state)


def test_copies_are_whole_and_independent():
    x, y = case(0)
    s = ClassStatistics(K, D).update(x, y)
    for twin in (copy.deepcopy(s), pickle.loads(pickle.dumps(s))):
        assert_same(twin, s)
        twin.update(x, y)
        assert twin.num_samples == 2 * s.num_samples
        assert twin.state[1 : 1 + K].sum() == twin.num_samples  # its parts still lie in its own state


def test_blocks_do_not_show():
    """More rows than a block and than a chunk, in batches that never fit them."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(7001, 3, generator=g, dtype=torch.float64), torch.randint(K, (7001,), generator=g)
    whole = ClassStatistics(K, 3).update(x, y)
    parts = ClassStatistics(K, 3)
    for a, b in zip(x.split(911), y.split(911), strict=True):
        parts.update(a, b)
        parts.within_scatter.sum()  # reading between batches is allowed
    assert_same(parts, whole)
    r = x - whole.class_means[y]
    torch.testing.assert_close(whole.within_scatter, r.T @ r / len(r), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("noise", [1.0, 1e-2])
def test_float32_products_cost_little(offset, noise):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(20, (4000,), generator=g)
    x = (torch.randn(20, 64, generator=g)[y] + noise * torch.randn(4000, 64, generator=g) + offset).float()
    single = ClassStatistics(20, 64).update(x, y)
    double = ClassStatistics(20, 64).update(x.double(), y)
    assert single.wide == 0
    assert double.wide == 1
    assert_same(single, double, 1e-5 if offset else 2e-6)  # residuals rounded to float32
    assert collapse.nc1(single) == pytest.approx(collapse.nc1(double), rel=1e-6)


def test_dtypes_mix():
    """float32 rows that come after float64 origins are widened; half precision is computed as float32."""
    x, y = case(3)
    mixed = ClassStatistics(K, D).update(x[:30], y[:30]).update(x[30:].float(), y[30:])
    exact = ClassStatistics(K, D).update(torch.cat([x[:30], x[30:].float().double()]), y)
    assert_same(mixed, exact)
    other = ClassStatistics(K, D).update(x[:30].float(), y[:30]).update(x[30:], y[30:])
    assert_same(other, ClassStatistics(K, D).update(torch.cat([x[:30].float().double(), x[30:]]), y), 1e-6)
    half = ClassStatistics(K, D).update(x.bfloat16(), y.int())
    assert_same(half, ClassStatistics(K, D).update(x.bfloat16().double(), y), 1e-5)


def test_deep_collapse_keeps_its_digits():
    """Scatter 1e-12 of the means' spread: residuals from a sample of the class, not from a common centre, see it."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(40) % 4
    steps = torch.randn(40, 8, generator=g, dtype=torch.float64)
    means = torch.randint(-8, 8, (4, 8), generator=g).double()
    x = means[y] + 2.0**-36 * (steps * 2**8).round() / 2**8  # exact in float64
    near = ClassStatistics(4, 8).update(x - means[y], y).within_trace
    assert near == pytest.approx(2.0**-72 * 8, rel=0.5)
    assert ClassStatistics(4, 8).update(x, y).within_trace == pytest.approx(near, rel=1e-9)


@pytest.mark.parametrize("num_classes", [20, 100])
def test_sketch_is_unbiased_and_knows_its_error(num_classes):
    g = torch.Generator().manual_seed(0)
    gaps, errors = [], []
    for _ in range(30):
        y = torch.arange(num_classes).repeat(12)
        x = torch.randn(num_classes, 32, generator=g)[y] + 0.5 * torch.randn(len(y), 32, generator=g)
        exact = collapse.nc1(ClassStatistics(num_classes, 32).update(x, y))
        sketch = ClassStatistics(num_classes, 32, within="sketch").update(x, y)
        gaps.append(collapse.nc1(sketch) / exact - 1)
        errors.append(collapse.nc1_standard_error(sketch) / exact)
    gaps, errors = torch.tensor(gaps), torch.tensor(errors)
    assert abs(gaps.mean()) < 3.5 * gaps.std() / 30**0.5
    assert errors.mean() == pytest.approx(float(gaps.std()), rel=0.4)  # sd of sd from 30: 13 %
    assert gaps.std() < 3 * (2 / num_classes / min(32, num_classes - 1)) ** 0.5


def test_memory_of_each_kind():
    assert collapse.state_size(1000, 2048) == 1 + 7 * 1000 + 2 * 1000 * 2048 + 2048**2
    assert collapse.state_size(1000, 2048, "sketch") == 1 + 8 * 1000 + 3 * 1000 * 2048
    s = ClassStatistics(K, D, within="none").update(*case(0))
    assert collapse.nc1(s, method="quotient") > 0
    for call in (lambda: s.within_scatter, lambda: collapse.nc1(s), lambda: s.sketched_scatter):
        with pytest.raises(InputError, match="within"):
            call()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(3, D + 1), torch.zeros(3, dtype=torch.long)), r"\(B, 6\)"),
        ((torch.zeros(3, D), torch.zeros(2, dtype=torch.long)), "3 whole numbers"),
        ((torch.zeros(3, D), torch.zeros(3)), "whole numbers"),
        ((torch.zeros(3, D), torch.tensor([0, 1, K])), "0 … 4"),
        ((torch.zeros(3, D), torch.tensor([0, -1, 2])), "0 … 4"),
        ((torch.full((3, D), torch.nan), torch.tensor([0, 1, 2])), "NaN"),
        ((torch.zeros(3, D), torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2])), "class_means"),
    ],
)
def test_wrong_input_is_refused_and_leaves_no_trace(arguments, words):
    s = ClassStatistics(K, D).update(*case(0))
    before = s.state.clone()
    with pytest.raises(InputError, match=words):
        s.update(*arguments)
    assert torch.equal(s.state, before)


def test_wrong_settings_are_refused():
    with pytest.raises(InputError, match="full, none, sketch"):
        ClassStatistics(K, D, within="all")
    with pytest.raises(InputError, match="class_means must be"):
        ClassStatistics(K, D, class_means=torch.zeros(K, D + 1))
    with pytest.raises(InputError, match="cannot merge"):
        ClassStatistics(K, D).merge(ClassStatistics(K, D, within="none"))
    assert "num_samples=0" in repr(ClassStatistics(K, D))


def test_empty_batches_and_single_rows():
    x, y = case(1)
    s = ClassStatistics(K, D)
    s.update(x[:0], y[:0])
    for i in range(len(x)):
        s.update(x[i : i + 1], y[i : i + 1])
    assert_same(s, ClassStatistics(K, D).update(x, y))


def test_gradients_are_not_kept():
    x, y = case(2)
    x.requires_grad_()
    s = ClassStatistics(K, D).update(x * 2, y)
    assert not s.state.requires_grad
    w = torch.randn(K, D, requires_grad=True)  # an untouched Linear.weight
    assert collapse_measures(s, w, full=True)["nc3"] > 0


# --- NC4 --------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    noise=st.sampled_from([0.0, 0.1, 0.5, 2.0]),
    offset=st.sampled_from([0.0, 100.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    gone=st.booleans(),
)
def test_agreement_is_that_of_all_distances(seed, noise, offset, dtype, gone):
    """The short cut through the triangle inequality never changes a decision."""
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(12, 4, generator=g, dtype=torch.float64) + offset
    x = means[torch.randint(12, (50,), generator=g)] + noise * torch.randn(50, 4, generator=g, dtype=torch.float64)
    decisions = torch.randint(12, (50,), generator=g)
    logits = torch.randn(50, 12, generator=g) if seed % 2 else -torch.cdist(x, means)
    if gone:
        means[3] = torch.nan
    distances = torch.cdist(x.to(dtype).double(), means, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.nan_to_num(torch.inf).argmin(1)
    assert torch.equal(NearestMean(means)(x.to(dtype)), nearest)
    assert nc4_agreement(x.to(dtype), decisions, means) == pytest.approx(float((nearest == decisions).double().mean()))
    share = float((nearest == logits.argmax(1)).double().mean())
    assert nc4_agreement(x.to(dtype), logits, means) == pytest.approx(share)


def test_agreement_in_the_same_pass():
    x, y = case(0)
    means = ClassStatistics(K, D).update(*case(1)).class_means
    logits = x @ torch.randn(D, K, dtype=torch.float64) + torch.randn(K)
    s = ClassStatistics(K, D, class_means=means)
    for rows in torch.arange(len(x)).split(7):
        s.update(x[rows], y[rows], logits[rows].argmax(1))
    assert collapse.nc4(s) == pytest.approx(nc4_agreement(x, logits, means))
    each = [nc4_agreement(x[y == k], logits[y == k], means) for k in range(K)]
    assert collapse.nc4(s, weighted=False) == pytest.approx(sum(each) / K)
    assert collapse.nc4(ClassStatistics(K, D).update(x, y)) != collapse.nc4(s)  # NaN: nothing was decided


def test_bias_counts_in_nc4():
    x, y = case(0)
    means = ClassStatistics(K, D).update(x, y).class_means
    w, b = means, -means.square().sum(1) / 2  # the nearest-mean rule is itself linear, with a bias
    assert nc4_agreement(x, x @ w.T + b, means) == 1
    assert nc4_agreement(x, x @ w.T, means) < 1


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    noise=st.sampled_from([0.0, 0.1, 0.5, 2.0]),
    offset=st.sampled_from([0.0, 100.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    gone=st.booleans(),
    bias=st.sampled_from([None, 1.0, 30.0]),
    turned=st.sampled_from([0.0, 0.3, 3.0]),
)
def test_linear_agreement_is_that_of_all_scores(seed, noise, offset, dtype, gone, bias, turned):
    """The radii never change a decision, whatever the classifier and however wrong the targets."""
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(12, 4, generator=g, dtype=torch.float64)
    w = means + turned * torch.randn(12, 4, generator=g, dtype=torch.float64)
    b = None if bias is None else bias * torch.randn(12, generator=g, dtype=torch.float64)
    means = means + offset
    y = torch.randint(12, (50,), generator=g)
    x = (means[y] + noise * torch.randn(50, 4, generator=g, dtype=torch.float64)).to(dtype)
    if gone:
        means[3] = torch.nan
    distances = torch.cdist(x.double(), means, compute_mode="donot_use_mm_for_euclid_dist")
    logits = x.double() @ w.T + (0 if b is None else b)
    expected = distances.nan_to_num(torch.inf).argmin(1) == logits.argmax(1)
    agreement = LinearAgreement(means, w, b)
    assert torch.equal(agreement(x, y), expected)
    assert torch.equal(agreement(x, torch.randint(12, (50,), generator=g)), expected)
    assert torch.equal(agreement.decisions(x), logits.argmax(1))


def test_collapsed_features_need_no_scores(monkeypatch):
    x, y = case(0)
    w = torch.eye(K, D, dtype=torch.float64)
    near, far = 10 * w[y] + 0.01 * x, 10 * w[y] + 10 * x
    agreement = LinearAgreement(10 * w, w)
    asked = []
    monkeypatch.setattr(agreement, "decisions", lambda x: asked.append(len(x)) or (x @ w.T).argmax(1))
    assert agreement(near, y).all()
    assert asked == []
    assert agreement(far, y).all()  # means of equal length are the vectors: one rule
    assert len(asked) == 1
    with pytest.raises(InputError, match="class_vectors must be"):
        LinearAgreement(w, w[:3])
