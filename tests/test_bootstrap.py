"""The bootstrap over test images against a plain loop, and against the standard errors that are known in closed form."""

import numpy as np
import pytest

from equiframe.bootstrap import bootstrap_macro, percentile_interval


def loop(correct, labels, replicates, seed):
    """The definition, image by image, with the same draws."""
    random = np.random.default_rng(seed)
    order = sorted(range(len(labels)), key=lambda i: labels[i])
    uniform = random.random((replicates, len(labels)))
    found = np.zeros((replicates, len(correct)))
    for b in range(replicates):
        right, total = {}, {}
        for position, i in enumerate(order):
            same = [j for j in order if labels[j] == labels[i]]
            chosen = same[int(uniform[b, position] * len(same))]
            total[labels[i]] = total.get(labels[i], 0) + 1
            right.setdefault(labels[i], np.zeros(len(correct)))
            right[labels[i]] += correct[:, chosen]
        found[b] = np.mean([right[k] / total[k] for k in total], axis=0)
    return found


@pytest.mark.parametrize("chunk", [1, 57, 10**6])
def test_against_a_loop(chunk, monkeypatch):
    monkeypatch.setattr("equiframe.bootstrap._CHUNK", chunk)
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 25) * 3  # classes 1, 2, 4, 5, … have no images
    correct = random.random((3, 25)) < 0.6
    np.testing.assert_allclose(bootstrap_macro(correct, labels, replicates=7, seed=5), loop(correct, labels, 7, 5))


def test_one_class_is_the_binomial_and_many_are_stratified():
    random = np.random.default_rng(1)
    right = random.random(400) < 0.3
    a = right.mean()
    one = bootstrap_macro(right[None], np.zeros(400, int), replicates=4000)[:, 0]
    assert one.std() == pytest.approx(np.sqrt(a * (1 - a) / 400), rel=0.05)
    assert one.mean() == pytest.approx(a, abs=4 * one.std() / np.sqrt(4000))
    sizes, accuracy = np.array([300, 60, 12]), []
    labels = np.repeat([0, 1, 2], sizes)
    right = random.random(372) < np.repeat([0.9, 0.6, 0.3], sizes)
    accuracy = np.array([right[labels == k].mean() for k in range(3)])
    expected = np.sqrt((accuracy * (1 - accuracy) / sizes).sum()) / 3
    assert bootstrap_macro(right[None], labels, replicates=4000)[:, 0].std() == pytest.approx(expected, rel=0.05)


def test_runs_share_their_draws():
    """The same run twice differs by nothing; a paired difference varies less than two runs would alone."""
    random = np.random.default_rng(2)
    labels = np.repeat(np.arange(5), 40)
    one = random.random(200) < 0.6
    other = one ^ (random.random(200) < 0.05)
    draws = bootstrap_macro(np.stack([one, one, other]), labels, replicates=500)
    assert np.array_equal(draws[:, 0], draws[:, 1])
    assert (draws[:, 0] - draws[:, 2]).std() < 0.6 * draws[:, 0].std()
    assert np.array_equal(draws, bootstrap_macro(np.stack([one, one, other]), labels, replicates=500))
    assert not np.array_equal(draws, bootstrap_macro(np.stack([one, one, other]), labels, replicates=500, seed=1))


def test_percentiles():
    assert percentile_interval(np.arange(1001), level=0.9) == pytest.approx((50, 950))
