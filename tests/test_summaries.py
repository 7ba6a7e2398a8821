import math

import numpy as np
import pytest
from scipy import stats

from equiframe.summaries import Summary, paired_difference


def test_summary_is_mean_and_sample_sd():
    s = Summary.of([0.5, None, 0.7, float("nan"), 0.9])
    assert (s.mean, s.sd, s.n) == (pytest.approx(0.7), pytest.approx(0.2), 3)
    assert s.percent() == "70.0 ± 20.0"
    assert Summary.of([0.5]).percent() == "50.0"
    assert Summary.of([None]).percent() == "–"


def test_paired_difference_against_scipy():
    random = np.random.default_rng(0)
    a, b = random.random(6), random.random(6)
    got = paired_difference(dict(enumerate(a)), dict(enumerate(b)))
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (got.mean, got.low, got.high, got.n) == (
        pytest.approx((a - b).mean()),
        pytest.approx(low),
        pytest.approx(high),
        6,
    )


def test_only_shared_seeds_count():
    got = paired_difference({0: 1.0, 1: 2.0, 5: 9.0}, {1: 1.0, 0: 1.0, 7: 3.0})
    assert (got.mean, got.n) == (0.5, 2)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    single = paired_difference({0: 1.0}, {0: 0.25})
    assert (single.mean, single.low, single.n) == (0.75, None, 1)
    assert math.isfinite(single.mean)


def test_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        noise = random.standard_normal((2, 3))
        found = paired_difference(dict(enumerate(1 + noise[0])), dict(enumerate(noise[1])))
        covered += found.low <= 1 <= found.high
    assert 0.92 <= covered / 400 <= 0.98
