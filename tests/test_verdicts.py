"""Which method is better: intervals against other implementations and simulations, and when a win is called."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from equiframe import InputError
from equiframe.summaries import holm
from equiframe.verdicts import in_words, judge, shared_variance, signed, student


def by_seed(*values):
    return dict(enumerate(values))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_against_its_definition(p):
    order = np.argsort(p, kind="stable")
    expected = np.empty(len(p))
    for rank, i in enumerate(order):
        expected[i] = max(min(1, (len(p) - j) * p[order[j]]) for j in range(rank + 1))
    assert holm(p) == pytest.approx(expected)


def test_holm_of_the_textbook():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def test_without_images_the_interval_is_students():
    random = np.random.default_rng(0)
    a, b = random.random(5), random.random(5)
    interval, p = student((a - b).mean(), (a - b).var(ddof=1) / 5, 4, 0.0)
    expected = stats.ttest_rel(a, b)
    assert interval == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert p == pytest.approx(expected.pvalue)


def test_without_seeds_the_interval_is_the_normal_one():
    interval, p = student(0.02, 0.0, 2, 1e-4)
    assert interval == pytest.approx((0.02 - 1.959964 * 0.01, 0.02 + 1.959964 * 0.01), rel=1e-5)
    assert p == pytest.approx(2 * stats.norm.sf(2))
    assert student(0.0, 0.0, 2, 0.0) == ((0, 0), 1)
    assert student(0.1, 0.0, 2, 0.0) == ((0.1, 0.1), 0)


def test_shared_variance_is_the_mean_covariance():
    draws = np.random.default_rng(0).standard_normal((3, 400)) + 2 * np.random.default_rng(1).standard_normal(400)
    pairs = [np.cov(draws[i], draws[j])[0, 1] for i, j in itertools.permutations(range(3), 2)]
    assert shared_variance(draws) == pytest.approx(np.mean(pairs))
    assert shared_variance(draws[:1]) == 0
    assert shared_variance(np.array([[1.0, 2, 3], [3, 2, 1]])) == 0


@pytest.mark.parametrize("image_sd", [0.0, 0.3])
def test_the_interval_over_both_covers_the_truth_as_often_as_it_says(image_sd):
    """Two methods, 4 trainings each, 60 images: an image's difference has a part that all trainings share, and one of
    its own. Over seeds alone the interval covers too rarely where images matter."""
    random = np.random.default_rng(3)
    covered, seeds_alone, times = 0, 0, 600
    for _ in range(times):
        training = 0.05 * random.standard_normal((4, 1))
        scores = 0.1 + training + image_sd * random.standard_normal(60) + 0.2 * random.standard_normal((4, 60))
        picks = random.integers(0, 60, (100, 60))
        v = shared_variance(scores[:, picks].mean(-1))
        d = scores.mean(1)
        (low, high), _ = student(d.mean(), d.var(ddof=1) / 4, 3, v)
        covered += low <= 0.1 <= high
        (low, high), _ = student(d.mean(), d.var(ddof=1) / 4, 3, 0.0)
        seeds_alone += low <= 0.1 <= high
    assert 0.93 <= covered / times <= 0.99
    assert (seeds_alone / times < 0.92) == (image_sd > 0)


def test_a_win_needs_three_seeds_and_the_corrected_interval():
    clear = {"a": by_seed(0.70, 0.71, 0.72), "b": by_seed(0.60, 0.611, 0.622)}
    (comparison,) = judge(clear).to_best
    assert (comparison.method, comparison.against, comparison.call) == ("b", "a", "worse")
    assert comparison.difference == pytest.approx(-0.099)
    assert comparison.over_seeds[1] < 0
    assert comparison.over_both is None
    assert comparison.p_holm == comparison.p
    for num, call in ((2, "cannot be told yet (2 seeds)"), (1, "cannot be told yet (1 seed)")):
        fewer = {m: {s: v for s, v in of.items() if s < num} for m, of in clear.items()}
        assert [c.call for c in judge(fewer, reference="b").to_reference] == [call]
    unclear = {"a": by_seed(0.7, 0.6, 0.7), "b": by_seed(0.6, 0.65, 0.68)}
    assert judge(unclear).to_best[0].call == "cannot be told yet (3 seeds)"
    apart = {"a": {0: 0.7, 1: 0.7}, "b": {2: 0.6}}
    assert judge(apart).to_best[0].call == "cannot be told yet (0 seeds)"
    assert judge(apart).to_best[0].difference is None


def test_many_methods_are_corrected():
    """A difference that one comparison would call a win is none among twelve methods; the reference's family is smaller."""
    random = np.random.default_rng(0)
    base = {f"m{i:02d}": by_seed(*(0.5 + 0.001 * random.standard_normal(4))) for i in range(11)}
    macro = base | {"best": {s: v + 0.004 + 0.001 * (s - 1.5) for s, v in base["m00"].items()}}
    alone = judge({"m00": macro["m00"], "best": macro["best"]}).to_best[0]
    crowd = judge(macro)
    assert crowd.best == "best"
    assert crowd.num_pairs == 66
    among = next(c for c in crowd.to_best if c.method == "m00")
    assert alone.call == "worse"
    assert among.p == pytest.approx(alone.p)
    assert among.p_holm > alone.p_holm
    assert among.call == "cannot be told yet (4 seeds)"
    with_reference = judge(macro, reference="m00")
    named = next(c for c in with_reference.to_reference if c.method == "best")
    assert alone.p_holm < named.p_holm < among.p_holm
    assert len(with_reference.to_reference) == 11


def test_images_widen_and_seeds_are_paired():
    random = np.random.default_rng(5)
    labels = np.repeat(np.arange(4), 25)
    hard = random.random(100) < 0.4
    correct = {
        "a": {s: hard | (random.random(100) < 0.5) for s in range(3)},
        "b": {s: hard | (random.random(100) < 0.45) for s in range(3)},
    }
    macro = {
        m: {s: np.mean([right[labels == k].mean() for k in range(4)]) for s, right in of.items()}
        for m, of in correct.items()
    }
    verdicts = judge(macro, correct, labels, reference="b")
    (c,) = verdicts.to_reference
    assert (c.method, c.against) == ("a", "b")
    assert c.difference == pytest.approx(np.mean([macro["a"][s] - macro["b"][s] for s in range(3)]))
    for interval in (c.over_seeds, c.over_images, c.over_both):
        assert interval[0] < c.difference < interval[1]
    width = c.over_images[1] - c.over_images[0]
    assert 0.05 < width < 0.3
    for method in ("a", "b"):
        low, high = verdicts.over_images[method]
        assert low < np.mean(list(macro[method].values())) < high
    lacking = {"a": correct["a"], "b": {0: correct["b"][0]}}  # one run of an earlier version
    (c,) = judge(macro, lacking, labels, reference="b").to_reference
    assert c.over_images is None
    assert c.over_both is None
    assert c.over_seeds is not None
    single = judge({m: {0: of[0]} for m, of in macro.items()}, lacking, labels).to_best[0]
    assert single.over_images is not None
    assert single.over_seeds is None
    assert single.over_both is None
    assert single.call == "cannot be told yet (1 seed)"


def test_sides_are_turned_round_together():
    macro = {"low": by_seed(0.1, 0.2, 0.15), "high": by_seed(0.5, 0.58, 0.6), "none": {}}
    (to_best,) = judge(macro).to_best
    (to_low,) = judge(macro, reference="low").to_reference
    assert to_best.difference == -to_low.difference
    assert to_best.over_seeds == (-to_low.over_seeds[1], -to_low.over_seeds[0])
    assert (to_best.call, to_low.call) == ("worse", "better")
    assert math.isclose(to_best.p, to_low.p)
    with pytest.raises(InputError, match="unknown reference 'hgih'; did you mean 'high'"):
        judge(macro, reference="hgih")


def test_a_pair_has_one_verdict():
    """The best against the reference is corrected once, with the reference's other comparisons."""
    random = np.random.default_rng(0)
    macro = {
        name: {seed: mean + 0.01 * random.standard_normal() for seed in range(4)}
        for name, mean in (("ce", 0.5), ("a", 0.53), ("b", 0.535), ("c", 0.54), ("d", 0.545))
    }
    verdicts = judge(macro, reference="ce")
    (to_best,) = [c for c in verdicts.to_best if c.method == "ce"]
    (to_reference,) = [c for c in verdicts.to_reference if c.method == verdicts.best]
    assert to_best.p_holm == to_reference.p_holm
    assert {to_best.call, to_reference.call} in ({"better", "worse"}, {to_best.call})
    assert to_best.difference == -to_reference.difference


def test_methods_that_are_exactly_level_are_said_to_be():
    level = judge({"b": {0: 0.5, 1: 0.7}, "a": {0: 0.5, 1: 0.7}, "c": {0: 0.2, 1: 0.3}})
    assert in_words(level, 0.6).startswith(
        "b has the highest macro accuracy (the mean over classes), 60.0\u00a0%; that of a is exactly the same on the seeds they share."
    )
    ahead = judge({"b": {0: 0.5, 1: 0.7}, "a": {0: 0.5, 1: 0.6}})
    assert "exactly the same" not in in_words(ahead, 0.6)


def test_three_equal_seeds_are_exactly_equal_and_two_are_not_yet():
    for seeds, call in ((3, "exactly equal"), (2, "cannot be told yet (2 seeds)")):
        same = {s: 0.5 + s / 10 for s in range(seeds)}
        verdicts = judge({"b": same, "a": same}, reference="a")
        assert {c.call for c in (*verdicts.to_best, *verdicts.to_reference)} == {call}
    opposite = judge({"b": {0: 0.5, 1: 0.6, 2: 0.7}, "a": {0: 0.6, 1: 0.5, 2: 0.7}})
    assert opposite.to_best[0].call == "cannot be told yet (3 seeds)"


def test_no_difference_has_no_sign():
    assert [signed(x) for x in (0.0, -1e-17, 4e-4, -4e-4, 0.0123, -0.0123)] == [
        "0.0",
        "0.0",
        "0.0",
        "0.0",
        "+1.2",
        "\u22121.2",
    ]
