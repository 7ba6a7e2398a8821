"""The order of an epoch: exact probabilities, exact shares over ranks, a pure function of (seed, epoch)."""

import typing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equiframe.errors import InputError
from equiframe.recipe import Recipe
from equiframe.samplers import SAMPLERS, class_probabilities, epoch_order

COUNTS = np.array([300, 90, 30, 9, 1])
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(5), COUNTS))


@pytest.mark.parametrize("name", SAMPLERS)
def test_probabilities_against_a_loop(name):
    beta = 0.9999
    weight = {
        "instance": lambda n: n,
        "class-balanced": lambda n: 1,
        "square-root": lambda n: n**0.5,
        "effective-number": lambda n: n * (1 - beta) / (1 - beta**n),
        "progressive": lambda n: 0.75 * n / 430 + 0.25 / 5,
    }[name]
    weights = [weight(int(n)) for n in COUNTS]
    p = class_probabilities(COUNTS, name, epoch=2, epochs=9)
    np.testing.assert_allclose(p, [w / sum(weights) for w in weights], rtol=1e-9)


def test_progressive_goes_from_instances_to_balance():
    ends = [class_probabilities(COUNTS, "progressive", epoch=e, epochs=9) for e in (0, 8)]
    np.testing.assert_allclose(ends[0], COUNTS / 430)
    np.testing.assert_allclose(ends[1], 0.2)
    np.testing.assert_allclose(class_probabilities(COUNTS, "progressive"), COUNTS / 430)  # a run of one epoch


def test_effective_number_lies_between_the_extremes():
    np.testing.assert_allclose(class_probabilities(COUNTS, "effective-number", beta=0.0), COUNTS / 430)
    np.testing.assert_allclose(class_probabilities(COUNTS, "effective-number", beta=1 - 1e-9), 0.2, rtol=1e-4)


def test_classes_without_images_never_come():
    for name in SAMPLERS:
        p = class_probabilities([4, 0, 2], name, epoch=1, epochs=3)
        assert p[1] == 0
        assert p.sum() == pytest.approx(1)
    assert set(epoch_order([0, 0, 2], "class-balanced", seed=0, epoch=0).tolist()) <= {0, 1, 2}


def chi_square(observed, p):
    expected = observed.sum() * p
    return float(((observed - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("name", SAMPLERS[1:])
def test_frequencies_follow_the_probabilities(name):
    """χ² of 4 degrees of freedom stays below 23.5 with probability 0.9999; the other samplers' p would be far above."""
    epochs = 9
    for epoch in (0, 4, 8):
        p = class_probabilities(COUNTS, name, epoch=epoch, epochs=epochs)
        drawn = sum(
            np.bincount(LABELS[epoch_order(LABELS, name, seed=s, epoch=epoch, epochs=epochs)], minlength=5)
            for s in range(20)
        )
        assert chi_square(drawn, p) < 23.5
    assert chi_square(drawn, class_probabilities(COUNTS, "instance")) > 1000  # the check can fail


def test_instance_is_a_permutation_as_it_always_was():
    order = epoch_order(LABELS, seed=3, epoch=5)
    np.testing.assert_array_equal(order, np.random.default_rng((3, 5)).permutation(430))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=60), st.sampled_from(SAMPLERS[1:]), st.integers(0, 9), st.integers(0, 2)
)  # fmt: skip
def test_a_class_is_exhausted_before_an_image_comes_again(labels, name, seed, epoch):
    labels = np.array(labels)
    order = epoch_order(labels, name, seed=seed, epoch=epoch, epochs=3)
    assert len(order) == len(labels)
    for k in np.unique(labels):
        members, drawn = np.flatnonzero(labels == k), order[labels[order] == k]
        for start in range(0, len(drawn), len(members)):
            round_ = drawn[start : start + len(members)].tolist()
            assert len(set(round_)) == len(round_)
            assert set(round_) <= set(members.tolist())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=8, max_size=80), st.sampled_from(SAMPLERS), st.integers(1, 8), st.integers(0, 9)
)  # fmt: skip
def test_ranks_share_the_one_process_sequence(labels, name, world_size, seed):
    whole = epoch_order(labels, name, seed=seed, epoch=1, epochs=3)
    shares = [
        epoch_order(labels, name, seed=seed, epoch=1, epochs=3, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert {len(share) for share in shares} == {len(labels) // world_size}
    together = np.stack(shares, axis=1).reshape(-1)  # place 0 of each rank, place 1 of each rank, …
    np.testing.assert_array_equal(together, whole[: len(together)])
    assert len(whole) - len(together) < world_size


def test_step_by_step_the_ranks_show_what_one_process_shows():
    whole = epoch_order(LABELS, "square-root", seed=1, epoch=2).tolist()
    shares = [epoch_order(LABELS, "square-root", seed=1, epoch=2, rank=r, world_size=4).tolist() for r in range(4)]
    for step in range(430 // 32):
        together = [i for share in shares for i in share[step * 8 : step * 8 + 8]]
        assert sorted(together) == sorted(whole[step * 32 : step * 32 + 32])


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_order_is_a_function_of_seed_and_epoch(name):
    order = epoch_order(LABELS, name, seed=1, epoch=2, epochs=4)
    np.testing.assert_array_equal(order, epoch_order(LABELS, name, seed=1, epoch=2, epochs=4))
    for other in ({"seed": 2, "epoch": 2}, {"seed": 1, "epoch": 3}):
        assert not np.array_equal(order, epoch_order(LABELS, name, epochs=4, **other))


def test_wrong_names_and_ranks():
    with pytest.raises(InputError, match="did you mean 'square-root'"):
        epoch_order(LABELS, "square-rot", seed=0, epoch=0)
    with pytest.raises(InputError, match=r"rank must be in 0\.\.1, got 2"):
        epoch_order(LABELS, seed=0, epoch=0, rank=2, world_size=2)


def test_the_recipe_knows_the_same_samplers():
    assert Recipe.__dataclass_fields__["sampler"].metadata["choices"] == SAMPLERS
    assert typing.get_type_hints(Recipe)["sampler"] == str | None
