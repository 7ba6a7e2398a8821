"""Orders of a frame's vectors: which class gets which."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equiframe.errors import InputError
from equiframe.frames import DenseFrame, OrderedFrame, assign, describe_frame, make_frame
from equiframe.frames.assign import _descend, class_similarity, order_cost


def means_of(k, d=5, seed=0):
    return torch.randn(k, d, generator=torch.Generator().manual_seed(seed))


def matrices(frame, means):
    vectors = frame.dense().double()
    return class_similarity(means), (vectors @ vectors.T).fill_diagonal_(0.0)


def cost_by_loop(similarity, cosines, order):
    k = len(order)
    return sum(float(similarity[i, j] * cosines[order[i], order[j]]) for i in range(k) for j in range(k) if i != j)


def test_similarity_and_cost_are_those_of_a_loop():
    means, frame = means_of(6), make_frame(6, 3)
    similarity, cosines = matrices(frame, means)
    centred = (means - means.mean(0)).double()
    for i, j in itertools.product(range(6), repeat=2):
        cosine = float(centred[i] @ centred[j] / (centred[i].norm() * centred[j].norm()))
        assert similarity[i, j] == pytest.approx(0.0 if i == j else cosine, abs=1e-6)
    order = torch.tensor([2, 0, 1, 5, 4, 3])
    assert order_cost(similarity, cosines, order) == pytest.approx(cost_by_loop(similarity, cosines, order))


@pytest.mark.parametrize("similar", ["apart", "together"])
@pytest.mark.parametrize(("k", "d", "seed"), [(4, 2, 0), (5, 3, 1), (6, 3, 2), (6, 4, 3), (7, 4, 4), (7, 5, 5)])
def test_assignment_finds_the_best_of_all_orders(k, d, seed, similar):
    frame, means = make_frame(k, d, seed=seed), means_of(k, seed=seed)
    similarity, cosines = matrices(frame, means)
    sign = 1 if similar == "apart" else -1
    orders = torch.tensor(list(itertools.permutations(range(k))))
    every = (similarity * cosines[orders[:, :, None], orders[:, None, :]]).sum((1, 2)) * sign
    found = sign * order_cost(similarity, cosines, assign(frame, means, similar=similar, starts=20))
    assert found == pytest.approx(float(every.min()), abs=1e-5)
    assert every.max() > found + 0.1  # there was something to choose


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 14), st.integers(0, 1000))
def test_assignment_is_a_permutation_never_worse_than_the_given_order(k, seed):
    frame, means = make_frame(k, max(2, k // 2), seed=seed), means_of(k, seed=seed)
    order = assign(frame, means, seed=seed, starts=2)
    similarity, cosines = matrices(frame, means)
    assert sorted(order.tolist()) == list(range(k))
    assert order_cost(similarity, cosines, order) <= order_cost(similarity, cosines, torch.arange(k)) + 1e-9
    assert torch.equal(order, assign(frame, means, seed=seed, starts=2))


def test_a_descent_ends_where_no_swap_helps():
    """Its incremental products, after many swaps, still agree with costs counted anew."""
    similarity, cosines = matrices(make_frame(40, 20), means_of(40))
    start = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    order = _descend(similarity, cosines, start)
    end = order_cost(similarity, cosines, order)
    assert end < order_cost(similarity, cosines, start) - 1
    for r, s in itertools.combinations(range(40), 2):
        swapped = order.clone()
        swapped[r], swapped[s] = order[s], order[r]
        assert order_cost(similarity, cosines, swapped) >= end - 1e-8


def test_similar_classes_become_antipodes_of_an_orthoplex():
    pairs = means_of(4, 8).repeat_interleave(2, 0) + 0.01 * means_of(8, 8, seed=1)
    frame = make_frame(8, 4)
    vectors = OrderedFrame(frame, assign(frame, pairs)).dense()
    torch.testing.assert_close(vectors[0::2], -vectors[1::2])
    together = OrderedFrame(frame, assign(frame, pairs, similar="together")).dense()
    assert float((together[0::2] * together[1::2]).sum(1).abs().max()) < 1e-6


def test_a_simplex_keeps_its_order():
    assert assign(make_frame(9, 16), means_of(9)).tolist() == list(range(9))


@pytest.mark.parametrize(("k", "d"), [(6, 8), (8, 4), (60, 16), (200, 16), (150, 8), (300, 20)])
def test_ordered_frame_is_the_frame_in_that_order(k, d):
    frame = make_frame(k, d)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(0))
    ordered = OrderedFrame(frame, order)
    x = means_of(7, d)
    plain = DenseFrame(frame.dense()[order], frame.coherence)
    torch.testing.assert_close(ordered.dense(), plain.dense())
    torch.testing.assert_close(ordered.vectors(torch.arange(k)), plain.dense())
    torch.testing.assert_close(ordered.logits(x), plain.logits(x))
    values, classes = ordered.topk(x, 4)
    torch.testing.assert_close(values, plain.topk(x, 4)[0])
    torch.testing.assert_close(values, ordered.logits(x).gather(1, classes))
    assert (ordered.coherence, ordered.geometry, ordered.dtype) == (frame.coherence, frame.geometry, frame.dtype)
    assert describe_frame(ordered)["reason"].endswith("in an order of its own")
    other = OrderedFrame(make_frame(k, d, seed=5), range(k))
    other.load_state_dict(ordered.state_dict())
    assert torch.equal(other.logits(x), ordered.logits(x))


@pytest.mark.parametrize("order", [[0, 1, 1, 3], [0, 1, 2], [0.0, 1.0, 2.0, 3.0], [1, 2, 3, 4], [True, False]])
def test_wrong_orders(order):
    with pytest.raises(InputError, match=r"each of the 4 vectors 0\.\.3 once"):
        OrderedFrame(make_frame(4, 4), order)


@pytest.mark.parametrize(
    ("means", "options", "message"),
    [
        (means_of(5), {}, r"needs 6 class means \(K, D\), got shape \(5, 5\)"),
        (means_of(6)[0], {}, "needs 6 class means"),
        (means_of(6) * float("nan"), {}, "finite class means"),
        (means_of(6), {"similar": "far"}, "similar must be 'apart' or 'together', got 'far'"),
        (means_of(6), {"starts": 0}, "starts must be at least 1, got 0"),
    ],
)
def test_wrong_assignments(means, options, message):
    with pytest.raises(InputError, match=message):
        assign(make_frame(6, 3), means, **options)
    with pytest.raises(InputError, match="at most 1024 classes"):
        assign(make_frame(1100, 64), means_of(1100))
