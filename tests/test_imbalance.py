import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equiframe import InputError, class_groups, class_profile, long_tail_indices, stratified_split, subset_indices

CIFAR10_LT_100 = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


def published_protocol(targets, num_classes, imb_factor, kind="exp", seed=0):
    """The generator of LDAM, MiSLAS and the paper's release, retold: global seed, classes in order, shuffle, cut."""
    img_max = len(targets) / num_classes
    per_class = []
    if kind == "exp":
        for k in range(num_classes):
            per_class.append(int(img_max * (imb_factor ** (k / (num_classes - 1.0)))))
    else:
        per_class = [int(img_max)] * (num_classes // 2) + [int(img_max * imb_factor)] * (num_classes // 2)
    np.random.seed(seed)  # noqa: NPY002
    chosen = []
    for k, n in zip(np.unique(targets), per_class, strict=True):
        idx = np.where(np.asarray(targets, dtype=np.int64) == k)[0]
        np.random.shuffle(idx)  # noqa: NPY002
        chosen.extend(idx[:n].tolist())
    return chosen


@pytest.mark.parametrize("kind", ["exp", "step"])
@pytest.mark.parametrize("ratio", [10, 50, 100, 200])
def test_index_for_index_the_published_protocol(ratio, kind):
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(10), 500))
    ours = long_tail_indices(labels, 10, ratio, kind="exponential" if kind == "exp" else "step")
    assert ours.tolist() == published_protocol(labels, 10, 1 / ratio, kind)


def test_cifar10_counts_are_the_known_ones():
    assert class_profile(10, 5000, 100) == CIFAR10_LT_100
    assert sum(CIFAR10_LT_100) == 12_406
    assert sum(class_profile(100, 500, 100)) == 10_847
    assert [class_profile(10, 5000, r)[-1] for r in (50, 200)] == [100, 25]


def test_global_random_state_is_left_alone():
    np.random.seed(3)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    long_tail_indices(np.repeat(np.arange(4), 50), 4, 10)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_never_more_labels_than_images():
    """SVHN: N/K = 7,325 but digit 0 has 4,948 images. The release emits 7,325 labels for it and shifts all the rest."""
    counts = [4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659]
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), counts))
    chosen = long_tail_indices(labels, 10, 100)
    got = np.bincount(labels[chosen], minlength=10)
    wanted = class_profile(10, 73257 / 10, 100)
    assert got.tolist() == [min(w, c) for w, c in zip(wanted, counts, strict=True)]
    assert got[0] == 4948
    assert len(set(chosen.tolist())) == len(chosen)


@given(st.integers(2, 30), st.floats(1, 200), st.sampled_from(["exponential", "step", "pareto"]))
def test_profiles_fall_from_n_max_to_n_max_over_r(k, ratio, kind):
    counts = class_profile(k, 1000, ratio, kind=kind)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 1000
    assert abs(counts[-1] - 1000 / ratio) <= 1 + 1e-6


def test_profile_by_loops():
    assert class_profile(4, 100, 10, kind="step") == [100, 100, 10, 10]
    assert class_profile(5, 100, 10, kind="step") == [100, 100, 10, 10, 10]
    pareto = class_profile(6, 1200, 60, kind="pareto")
    x = 5 / (60 ** (1 / 6) - 1)
    assert pareto == [int(round(1200 * (1 + k / x) ** -6, 6)) for k in range(6)]
    assert pareto[-1] == 20


def test_given_counts():
    labels = np.repeat(np.arange(3), 20)
    chosen = long_tail_indices(labels, 3, 1, counts=[5, 30, 1])
    assert np.bincount(labels[chosen]).tolist() == [5, 20, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 100, 0.5), "must be >= 1, got 0.5"),
        ((10, 100, 1000), r"leaves class \d without images; use a ratio of at most 100"),
        ((1, 100, 10), "at least 2 classes"),
    ],
)
def test_impossible_profiles(arguments, message):
    with pytest.raises(InputError, match=message):
        class_profile(*arguments)


def test_unknown_profile_and_wrong_counts():
    with pytest.raises(InputError, match="did you mean 'exponential'"):
        class_profile(3, 10, 2, kind="exponetial")
    labels = np.repeat(np.arange(3), 5)
    with pytest.raises(InputError, match="2 class counts were given for 3 classes"):
        long_tail_indices(labels, 3, 1, counts=[1, 2])
    with pytest.raises(InputError, match="at least one image"):
        long_tail_indices(labels, 3, 1, counts=[1, 2, 0])


@given(st.lists(st.integers(1, 40), min_size=2, max_size=8), st.floats(0.05, 0.6), st.integers(0, 99))
def test_stratified_split(counts, fraction, seed):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    train, held, singles = stratified_split(labels, fraction, seed=seed)
    assert sorted([*train, *held]) == list(range(len(labels)))
    kept = np.bincount(labels[train], minlength=len(counts))
    given_away = np.bincount(labels[held], minlength=len(counts))
    assert kept.min() >= 1
    assert singles == [k for k, n in enumerate(counts) if n == 1]
    for n, away in zip(counts, given_away, strict=True):
        assert away == (0 if n == 1 else min(max(1, round(fraction * n)), n - 1))


def test_subset_is_reproducible_and_seeded():
    labels = np.repeat(np.arange(3), 50)
    first = subset_indices(labels, [10, 5, 2], seed=0)
    assert first.tolist() == subset_indices(labels, [10, 5, 2], seed=0).tolist()
    assert first.tolist() != subset_indices(labels, [10, 5, 2], seed=1).tolist()


def test_class_groups_come_from_training_counts():
    groups = class_groups([500, 101, 100, 20, 19, 1])
    assert groups["many"].tolist() == [True, True, False, False, False, False]
    assert groups["medium"].tolist() == [False, False, True, True, False, False]
    assert groups["few"].tolist() == [False, False, False, False, True, True]
    unordered = class_groups([1, 9, 5, 7, 3, 2])
    assert unordered["head"].tolist() == [False, True, False, True, False, False]
    assert unordered["tail"].tolist() == [True, False, False, False, False, True]
    ten = class_groups(CIFAR10_LT_100)
    assert [int(ten[g].sum()) for g in ("head", "middle", "tail")] == [4, 3, 3]
