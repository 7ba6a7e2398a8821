"""Class vectors that follow a tree of two levels."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equiframe import DotRegression, FrameHead
from equiframe.errors import InputError
from equiframe.frames import TreeFrame, describe_frame, mistake_severity, simplex_vectors, tree_vectors
from equiframe.frames.tree import tree_gram


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=5), st.floats(0.0, 1.0, exclude_max=True), st.integers(0, 3))
def test_cosines_are_exact_and_the_smallest_possible(sizes, share, extra):
    parents = [g for g, n in enumerate(sizes) for _ in range(n)]
    k = len(parents)
    rho = -1 / (k - 1) + share * (0.98 + 1 / (k - 1))
    vectors = tree_vectors(parents, k - 1 + extra, sibling_cosine=rho, seed=1)
    gram = tree_gram(parents, rho)
    torch.testing.assert_close(vectors @ vectors.T, gram, atol=1e-9, rtol=0)
    others = {round(float(gram[i, j]), 12) for i in range(k) for j in range(k) if parents[i] != parents[j]}
    assert len(others) == 1
    lower = gram - 1e-4 * (torch.tensor(parents)[:, None] != torch.tensor(parents))
    assert float(torch.linalg.eigvalsh(lower)[0]) < -1e-6  # with a smaller cosine no such vectors exist


@pytest.mark.parametrize(("groups", "size", "rho"), [(2, 5, 0.5), (4, 3, 0.3), (5, 2, 0.9), (3, 1, 0.1)])
def test_equal_groups_have_the_closed_form(groups, size, rho):
    """A simplex of groups, and in each an own simplex in a space of its own, mixed by one angle."""
    gram = tree_gram([g for g in range(groups) for _ in range(size)], rho)
    alpha = (1 + rho * (size - 1)) / size
    assert float(gram[0, -1]) == pytest.approx(-alpha / (groups - 1), abs=1e-12)
    coarse, fine = simplex_vectors(groups, groups), simplex_vectors(size, size) if size > 1 else torch.zeros(1, 1)
    mixed = torch.zeros(groups, size, groups + groups * fine.shape[1], dtype=torch.float64)
    for g in range(groups):
        mixed[g, :, :groups] = math.sqrt(alpha) * coarse[g]
        start = groups + g * fine.shape[1]
        mixed[g, :, start : start + fine.shape[1]] = math.sqrt(1 - alpha) * fine
    mixed = mixed.flatten(0, 1)
    torch.testing.assert_close(mixed @ mixed.T, gram, atol=1e-9, rtol=0)


def test_at_its_lower_end_the_tree_is_the_simplex():
    parents = [0, 0, 0, 1, 2, 2]
    expected = 6 / 5 * torch.eye(6, dtype=torch.float64) - 1 / 5
    torch.testing.assert_close(tree_gram(parents, -1 / 5), expected, atol=1e-12, rtol=0)


def test_frame_head_takes_a_tree():
    frame = TreeFrame([0, 0, 1, 1, 1], 8, sibling_cosine=0.4)
    head = FrameHead(8, 5, geometry=frame, logit_scale=2.0, norm="none")
    x = torch.randn(3, 8)
    output = head(x)
    torch.testing.assert_close(output.logits, 2 * output.features @ frame.dense().T)
    assert DotRegression()(head(frame.dense()), torch.arange(5)).item() == pytest.approx(0, abs=1e-12)
    assert frame.coherence == pytest.approx(0.4)
    assert "siblings" in describe_frame(frame)["reason"]
    other = FrameHead(8, 5, geometry=TreeFrame([0, 1, 0, 1, 1], 8, seed=3), logit_scale=2.0, norm="none")
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(x).logits, output.logits)


def test_mistake_severity_by_hand():
    parents, labels = [7, 7, 9, 9], torch.tensor([0, 0, 1, 2, 3, 3])
    predictions = torch.tensor([0, 1, 2, 3, 3, 0])  # right, sibling, across, sibling, right, across
    assert mistake_severity(predictions, labels, parents) == pytest.approx((1 + 2 + 1 + 2) / 4)
    assert math.isnan(mistake_severity(labels, labels, parents))


@pytest.mark.parametrize(
    ("parents", "options", "message"),
    [
        ([0, 0, 0], {}, "at least 2 groups"),
        ([0.0, 1.0], {}, "whole numbers, the group of each class"),
        (
            [0, 0, 1, 1],
            {"sibling_cosine": 1.0},
            r"sibling_cosine must be in \[-1/\(K-1\), 1\) = \[-0.3333, 1\), got 1.0",
        ),
        ([0, 0, 1, 1], {"sibling_cosine": -0.5}, "sibling_cosine must be in"),
        ([0, 0, 1, 1, 2, 2, 3, 3, 3], {}, "K=9 needs D >= 8, got D=7; widen"),
    ],
)
def test_wrong_trees(parents, options, message):
    with pytest.raises(InputError, match=message):
        TreeFrame(parents, 7, **options)
