"""The measures of collapse against the numbers of peers.md, against plain NumPy loops, and against closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equiframe import collapse
from equiframe.collapse import ClassStatistics, collapse_measures
from equiframe.errors import InputError
from equiframe.frames import OrthoplexFrame, haar_columns, simplex_vectors


@pytest.fixture(autouse=True)
def one_thread():
    """Small problems on a busy machine: two threads would wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- the fixture of peers.md: no random numbers, K=4, D=7, n=[9, 5, 3, 2] ---------------------------------------------


def fixture():
    j = torch.arange(7, dtype=torch.float64)
    pairs = [(k, i) for k, n in enumerate([9, 5, 3, 2]) for i in range(n)]
    x = torch.stack(
        [torch.sin(1.7 * (k + 1) * (j + 1)) + 0.6 * torch.cos(0.9 * (i + 1) * (j + 2) + k) for k, i in pairs]
    )
    w = torch.stack([torch.sin(1.7 * (k + 1) * (j + 1)) + 0.5 * torch.cos(0.5 * (k + 2) * (j + 1)) for k in range(4)])
    return x, torch.tensor([k for k, _ in pairs]), w


X, Y, W = fixture()
S = ClassStatistics(4, 7).update(X, Y)

FIXTURE = {
    "nc1 pinv": (0.13087192, lambda: collapse.nc1(S)),
    "nc1 svd": (0.13087192, lambda: collapse.nc1(S, method="svd")),
    "nc1 quotient": (0.30861796, lambda: collapse.nc1(S, method="quotient")),
    "cdnv": (0.11093310, lambda: collapse.cdnv(S)),
    "cdnv squared": (0.01420583, lambda: collapse.cdnv(S, dist_exp=2)),
    "etf error of means": (0.33577454, lambda: collapse.nc2_etf_error(S)),
    "etf error of vectors": (0.61900994, lambda: collapse.nc2_etf_error(W)),
    "duality error": (0.37114115, lambda: collapse.nc3_duality_error(S, W)),
    "dist": ((1.62676060, 0.00777202), lambda: collapse.uniformity(S, kernel="dist")),
    "log": ((-0.48512197, 0.00293825), lambda: collapse.uniformity(S, kernel="log")),
    "riesz": ((0.09170785, 0.00060983), lambda: collapse.uniformity(S, kernel="riesz")),
    "uniform duality": (0.04579293, lambda: collapse.nc3_uniform_duality(S, W)),
    "cosines": ([0.86855716, 0.58400668, 0.79213573, 0.78726844], lambda: collapse.nc3_cosines(S, W)),
    "distances": ([0.51272379, 0.91213302, 0.64477014, 0.65227535], lambda: collapse.nc3_distances(S, W)),
    "mean norms": ([1.51236278, 2.09999497, 1.78417887, 1.67506722], lambda: collapse.mean_norms(S)),
    "class variances": ([1.02787943, 1.10900153, 0.84621592, 0.63140979], lambda: S.within_variance),
    "trace of scatter": (0.97880999, lambda: S.within_trace),
    "trace of scatter matrix": (0.97880999, lambda: float(S.within_scatter.trace())),
    "agreement": (1.0, lambda: collapse.nc4_agreement(X, X @ W.T, S.class_means)),
    "nc5": (0.23282872, lambda: collapse.nc5_orthogonality(S, torch.ones(7) / 7)),
    "sample centre, pinv": (0.11408892, lambda: collapse.nc1(S, center="sample")),
    "sample centre, quotient": (0.28344800, lambda: collapse.nc1(S, method="quotient", center="sample")),
    "sample centre, etf": (0.50380743, lambda: collapse.nc2_etf_error(S, center="sample")),
}
FLOAT32_PEER = {"cdnv", "cdnv squared", "dist", "log", "riesz"}


@pytest.mark.parametrize("name", FIXTURE)
def test_fixture_of_the_peers(name):
    expected, measure = FIXTURE[name]
    # The values are given to 8 decimals: half a unit of the last one beside the tolerance.
    tolerance = 1e-6 if name in FLOAT32_PEER else 1e-9 + 0.5e-8
    np.testing.assert_allclose(np.asarray(measure()), expected, rtol=0, atol=tolerance)


def by_the_peers_formulas(center):
    """The formulas of peers.md, one NumPy line each, with all the digits that the printed values lack."""
    x, y, w = X.numpy(), Y.numpy(), W.numpy()
    n = np.bincount(y)
    m = np.array([x[y == k].mean(0) for k in range(4)])
    mc = m - (m.mean(0) if center == "class" else x.mean(0))
    scatter = (x - m[y]).T @ (x - m[y]) / len(x)
    v = ((x - m[y]) ** 2).sum(1) @ np.eye(4)[y] / n
    i, j = np.triu_indices(4, 1)
    gaps = ((m[i] - m[j]) ** 2).sum(1)
    u, wu = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (mc, w))
    apart = np.linalg.norm(u[i] - u[j], axis=1)
    ideal = (np.eye(4) - 1 / 4) / np.sqrt(3)

    def off(gram):
        return np.linalg.norm(gram / np.linalg.norm(gram) - ideal)

    return {
        "nc1": np.trace(np.linalg.pinv(mc.T @ mc / 4, rcond=1e-14) @ scatter) / 4,
        "quotient": np.trace(scatter) / ((mc**2).sum() / 4),
        "cdnv": ((v[i] + v[j]) / (2 * gaps)).mean(),
        "cdnv squared": ((v[i] + v[j]) / (2 * gaps**2)).mean(),
        "etf": off(mc @ mc.T),
        "dual": off(w @ mc.T),
        "dist": (apart.mean(), apart.var()),
        "log": (-np.log(apart).mean(), np.log(apart).var()),
        "riesz": ((apart**-5).mean(), (apart**-5).var()),
        "uniform duality": (w * mc).sum(1).var(ddof=1),
        "cosines": (u * wu).sum(1),
        "distances": np.linalg.norm(u - wu, axis=1),
        "norms": np.linalg.norm(mc, axis=1),
        "variances": v,
    }


@pytest.mark.parametrize("center", ["class", "sample"])
def test_fixture_by_formula_to_1e_9(center):
    c = {"center": center}
    got = {
        "nc1": collapse.nc1(S, **c),
        "quotient": collapse.nc1(S, method="quotient", **c),
        "cdnv": collapse.cdnv(S),
        "cdnv squared": collapse.cdnv(S, dist_exp=2),
        "etf": collapse.nc2_etf_error(S, **c),
        "dual": collapse.nc3_duality_error(S, W, **c),
        "dist": collapse.uniformity(S, kernel="dist", **c),
        "log": collapse.uniformity(S, kernel="log", **c),
        "riesz": collapse.uniformity(S, kernel="riesz", **c),
        "uniform duality": collapse.nc3_uniform_duality(S, W, **c),
        "cosines": collapse.nc3_cosines(S, W, **c),
        "distances": collapse.nc3_distances(S, W, **c),
        "norms": collapse.mean_norms(S, **c),
        "variances": S.within_variance,
    }
    for name, value in by_the_peers_formulas(center).items():
        np.testing.assert_allclose(np.asarray(got[name]), value, rtol=0, atol=1e-9, err_msg=name)


def test_fixture_can_fail():
    """A check that passes on anything is none: the other centre, or one sample moved, is far out of tolerance."""
    assert abs(collapse.nc2_etf_error(S, center="sample") - 0.33577454) > 0.1
    moved = X.clone()
    moved[0, 0] += 1e-3
    assert abs(collapse.nc1(ClassStatistics(4, 7).update(moved, Y)) - 0.13087192) > 1e-6


# --- twins: the definitions once more, as plain NumPy loops -----------------------------------------------------------


def random_case(num_classes=6, dim=9, num=80, seed=0, noise=0.7):
    g = torch.Generator().manual_seed(seed)
    y = torch.cat([torch.arange(num_classes), torch.randint(num_classes, (num - num_classes,), generator=g)])
    means = torch.randn(num_classes, dim, generator=g, dtype=torch.float64)
    x = means[y] + noise * torch.randn(num, dim, generator=g, dtype=torch.float64)
    return x, y, torch.randn(num_classes, dim, generator=g, dtype=torch.float64)


class Twin:
    """Two passes and loops."""

    def __init__(self, x, y, num_classes):
        x, y = x.double().numpy(), y.numpy()
        self.classes = [k for k in range(num_classes) if (y == k).any()]
        self.means = np.array([x[y == k].mean(0) for k in self.classes])
        self.scatter = sum(np.outer(d, d) for k, m in zip(self.classes, self.means, strict=True) for d in x[y == k] - m)
        self.scatter = self.scatter / len(x)
        self.v = [((x[y == k] - m) ** 2).sum(1).mean() for k, m in zip(self.classes, self.means, strict=True)]
        self.centre = {"class": self.means.mean(0), "sample": x.mean(0)}
        self.norms = np.linalg.norm(x, axis=1)
        self.class_norms = np.array([self.norms[y == k].mean() for k in self.classes])

    def centred(self, center):
        return self.means - self.centre[center]

    def nc1(self, center):
        m = self.centred(center)
        between = m.T @ m / len(m)
        rcond = between.shape[0] * np.finfo(float).eps
        return np.trace(np.linalg.pinv(between, rcond=rcond) @ self.scatter) / len(m)

    def cdnv(self):
        values = [
            (self.v[i] + self.v[j]) / (2 * ((self.means[i] - self.means[j]) ** 2).sum())
            for i in range(len(self.v))
            for j in range(i + 1, len(self.v))
        ]
        return np.mean(values)

    @staticmethod
    def cos(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    def paper(self, w, center):
        h, w = self.centred(center), w.numpy()[self.classes]
        num = range(len(h))
        off = [(i, j) for i in num for j in num if i != j]
        hh, ww = ([self.cos(a[i], a[j]) for i, j in off if i < j] for a in (h, w))
        hw, diag = [self.cos(h[i], w[j]) for i, j in off], [self.cos(h[i], w[i]) for i in num]
        distance = ((h / np.linalg.norm(h) - w / np.linalg.norm(w)) ** 2).sum()
        named = {"cos_hh": hh, "cos_ww": ww, "cos_hw": hw, "diag_hw": diag}
        values = {f"{k}_mean": np.mean(v) for k, v in named.items()}
        return values | {f"{k}_sd": np.std(v, ddof=1) for k, v in named.items()} | {"hm_distance": distance}

    def angle(self, vectors):
        num = range(len(vectors))
        return np.mean([np.degrees(np.arccos(self.cos(vectors[i], vectors[j]))) for i in num for j in num if i < j])


@pytest.mark.parametrize("center", ["class", "sample"])
@pytest.mark.parametrize("gone", [None, 2])
@pytest.mark.parametrize(("num_classes", "dim"), [(6, 9), (6, 5), (7, 3)])
def test_numpy_loops_agree(center, gone, num_classes, dim):
    x, y, w = random_case(num_classes, dim)
    if gone is not None:
        x, y = x[y != gone], y[y != gone]
    s, twin = ClassStatistics(num_classes, dim).update(x, y), Twin(x, y, num_classes)
    few = torch.arange(num_classes) % 2 == 0
    got = collapse_measures(s, w, few=few, center=center, full=True)
    h = twin.centred(center)
    norms = np.linalg.norm(h, axis=1)
    cosines = [twin.cos(a, b) for i, a in enumerate(h) for j, b in enumerate(h) if i != j]
    rows = [i for i, k in enumerate(twin.classes) if k % 2 == 0]
    expected = {
        "nc1": twin.nc1(center),
        "nc1_quotient": np.trace(twin.scatter) / (norms**2).mean(),
        "nc2_angle": np.abs(np.array(cosines) + 1 / (len(h) - 1)).mean(),
        "nc2_norm": norms.std() / norms.mean(),
        "cdnv": twin.cdnv(),
        "feature_norm_spread": twin.class_norms.std() / twin.class_norms.mean(),
        "feature_norm_spread_samples": twin.norms.std() / twin.norms.mean(),
        "few_angle_means": twin.angle(h[rows]),
        "few_angle_vectors": twin.angle(w.numpy()[few.numpy()]),
        "num_present": len(h),
        **twin.paper(w, center),
    }
    expected["nc3"] = expected["hm_distance"]
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-10, abs=1e-12), name


@pytest.mark.parametrize("tile", [1, 3, 5, 64])
def test_any_tile_gives_the_same(tile):
    """K = 10 and 65 with tiles of 3 and 64, K mod tile = 1, is where the usual package raises."""
    for num_classes, dim in ((10, 4), (65, 12))[: 1 + (tile > 8)]:
        x, y, w = random_case(num_classes, dim, 200)
        s = ClassStatistics(num_classes, dim).update(x, y)
        pairs = torch.pdist(collapse.centred_means(s)).square()
        i, j, gaps = (
            torch.cat(p) for p in zip(*collapse.pair_distances(collapse.centred_means(s), tile=tile), strict=True)
        )
        order = torch.argsort(i * num_classes + j)
        torch.testing.assert_close(gaps[order], pairs, rtol=1e-12, atol=0)
        for measure in (collapse.cdnv, collapse.nc2_equiangle, collapse.nc2_etf_error, collapse.log_riesz_energy):
            assert measure(s, tile=tile) == pytest.approx(measure(s), rel=1e-12), measure
        for kernel in collapse.KERNELS:
            assert collapse.uniformity(s, kernel=kernel, tile=tile) == pytest.approx(
                collapse.uniformity(s, kernel=kernel), rel=1e-11
            )
        assert collapse.nc3_duality_error(s, w, tile=tile) == pytest.approx(collapse.nc3_duality_error(s, w), rel=1e-12)
        assert collapse.paper_cosines(s, w, tile=tile) == pytest.approx(collapse.paper_cosines(s, w), rel=1e-11)


def test_many_classes_need_no_cube():
    """Mean distance of two uniform points on the sphere S³: 64/(15π)."""
    s = ClassStatistics(1500, 4).update(torch.randn(1500, 4, dtype=torch.float64), torch.arange(1500))
    mean, variance = collapse.uniformity(s, kernel="dist")
    assert mean == pytest.approx(64 / (15 * math.pi), rel=0.01)
    assert variance == pytest.approx(2 - (64 / (15 * math.pi)) ** 2, rel=0.05)


# --- closed forms -----------------------------------------------------------------------------------------------------


def spread(means, counts, noise=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.repeat_interleave(torch.arange(len(means)), torch.as_tensor(counts))
    return means[y] + noise * torch.randn(len(y), means.shape[1], generator=g, dtype=torch.float64), y


@pytest.mark.parametrize(("num_classes", "dim"), [(2, 1), (4, 3), (10, 64), (100, 99)])
@pytest.mark.parametrize("offset", [0.0, 1.0, 1e4])
def test_1_exact_simplex_has_collapsed(num_classes, dim, offset):
    frame = simplex_vectors(num_classes, dim, seed=1)
    x, y = spread(3 * frame + offset, [2 + k % 5 for k in range(num_classes)])
    few = torch.arange(num_classes) >= num_classes // 2
    got = collapse_measures(ClassStatistics(num_classes, dim).update(x, y), 7 * frame, few=few, full=True)
    rounding = 1e-13 * max(1.0, offset) * num_classes
    zeros = ["nc1", "nc2_angle", "nc2_norm", "nc3", "nc1_quotient", "cdnv", "nc2_etf_error", "nc3_duality_error"]
    zeros += ["nc3_uniform_duality", "hm_distance", "uniformity_dist_var", "uniformity_log_var"]
    for name in zeros:
        assert got[name] == pytest.approx(0, abs=rounding), name
    assert got["cos_hh_mean"] == pytest.approx(-1 / (num_classes - 1), abs=rounding)
    assert got["cos_hw_mean"] == pytest.approx(-1 / (num_classes - 1), abs=rounding)
    assert got["diag_hw_mean"] == pytest.approx(1, abs=rounding)
    assert got["mean_decisions"] == 1 or offset
    distance = math.sqrt(2 * num_classes / (num_classes - 1))
    assert got["uniformity_dist_mean"] == pytest.approx(distance, abs=rounding)
    assert got["uniformity_riesz_log_energy"] == pytest.approx(-(dim - 2) * math.log(distance), abs=dim * rounding)
    if num_classes >= 4:
        angle = math.degrees(math.acos(-1 / (num_classes - 1)))
        assert got["few_angle_vectors"] == pytest.approx(angle, abs=1e-9)
        assert got["few_angle_means"] == pytest.approx(angle, abs=100 * rounding)


@pytest.mark.parametrize(("num_classes", "dim"), [(5, 12), (12, 5)])
@pytest.mark.parametrize("within", ["full", "sketch"])
def test_2_isotropic_gaussians_give_the_known_nc1(num_classes, dim, within):
    r"""N·S_W is Wishart(N−K, σ²) and independent of the means: mean and variance of NC1 given S_B are exact."""
    sigma, counts = 0.5, [40 * (k + 1) for k in range(num_classes)]
    scores = []
    for seed in range(20):
        means = torch.randn(num_classes, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        s = ClassStatistics(num_classes, dim, within=within).update(*spread(means, counts, sigma, seed))
        m = collapse.centred_means(s)
        inverse = torch.linalg.pinv(m.T @ m / num_classes)
        num, free = sum(counts), sum(counts) - num_classes
        expected = sigma**2 * free / num * inverse.trace() / num_classes
        sd = math.sqrt(2 * free * inverse.square().sum()) * sigma**2 / num / num_classes
        if within == "sketch":
            sd = math.hypot(sd, collapse.nc1_standard_error(s))
        scores.append(float(collapse.nc1(s) - expected) / sd)
    assert max(map(abs, scores)) < 4.5
    assert abs(np.mean(scores)) < 0.9  # the sd of the mean of 20 scores is 0.22
    assert 0.5 < np.std(scores) < 1.6  # and the sampling error is of the size that the formula says


def test_3_orthoplex():
    dim, num_classes = 6, 12
    frame = OrthoplexFrame(num_classes, dim, dtype=torch.float64).dense()
    got = collapse_measures(ClassStatistics(num_classes, dim).update(frame, torch.arange(12)), frame, full=True)
    pairs = num_classes * (num_classes - 1)  # ordered; K of them are antipodal, the rest orthogonal
    angle = (num_classes * (1 - 1 / 11) + (pairs - num_classes) / 11) / pairs
    assert got["nc2_angle"] == pytest.approx(angle, abs=1e-14)
    assert got["nc1"] == pytest.approx(0, abs=1e-14)
    assert got["nc2_norm"] == pytest.approx(0, abs=1e-14)
    assert got["uniformity_dist_mean"] == pytest.approx(
        (2 * num_classes + math.sqrt(2) * (pairs - num_classes)) / pairs
    )
    assert got["gnc2_means_min"] == pytest.approx(1, abs=1e-12)
    assert got["gnc2_vectors_mean"] == pytest.approx(1, abs=1e-12)


def test_4_two_classes():
    """S_B = δδᵀ/4: NC1 = ½·4·δᵀS_Wδ/‖δ‖⁴; the centred means are always opposite."""
    x, y, w = random_case(2, 5)
    s, twin = ClassStatistics(2, 5).update(x, y), Twin(x, y, 2)
    delta = twin.means[0] - twin.means[1]
    assert collapse.nc1(s) == pytest.approx(2 * delta @ twin.scatter @ delta / (delta @ delta) ** 2, rel=1e-12)
    for measure in (collapse.nc2_equiangle, collapse.nc2_equinorm, collapse.nc2_etf_error):
        assert measure(s) == pytest.approx(0, abs=1e-14)
    assert collapse.nc2_equinorm(s, center="sample") > 0
    assert collapse.uniformity(s) == pytest.approx((2, 0))
    assert collapse.nc3_duality_error(s, w) < 2


def test_5_one_sample_a_class_has_no_scatter():
    x, _, _ = random_case(7, 4)
    s = ClassStatistics(7, 4).update(x[:7] + 1e6, torch.arange(7))
    assert collapse.nc1(s) == collapse.nc1(s, method="quotient") == collapse.cdnv(s) == 0.0
    assert collapse.nc4_agreement(x[:7] + 1e6, torch.arange(7), s.class_means) == 1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3), size=st.floats(0, 1e3))
def test_6_invariant_under_rotation_scale_and_translation(seed, scale, size):
    x, y, w = random_case(5, 8, 40, seed)
    rotation = haar_columns(8, 8, seed=seed)
    step = size * haar_columns(8, 1, seed=seed + 1)[:, 0]
    before = collapse_measures(ClassStatistics(5, 8).update(x, y), w, full=True, few=[True] * 3 + [False] * 2)
    moved = scale * (x @ rotation + step)
    after = collapse_measures(
        ClassStatistics(5, 8).update(moved, y), 2 * w @ rotation, full=True, few=[True] * 3 + [False] * 2
    )
    changes = {"feature_norm_spread", "feature_norm_spread_samples", "nc3_uniform_duality", "mean_decisions"}
    for name in before.keys() - changes:
        assert after[name] == pytest.approx(before[name], rel=1e-8, abs=1e-9), name


def test_7_an_empty_class_changes_nothing():
    x, y, w = random_case(5, 9)
    few = torch.tensor([True, False, True, True, False])
    without = collapse_measures(ClassStatistics(5, 9).update(x, y), w, full=True, few=few)
    where = torch.tensor([0, 2, 3, 5, 6])  # classes 1 and 4 of seven stay empty
    wider, mask = torch.full((7, 9), 1e9, dtype=torch.float64), torch.ones(7, dtype=torch.bool)
    wider[where], mask[where] = w, few
    s = ClassStatistics(7, 9).update(x, where[y])
    assert s.present.tolist() == [True, False, True, True, False, True, True]
    assert s.class_means[[1, 4]].isnan().all()
    got = collapse_measures(s, wider, full=True, few=mask)
    skip = {"few_angle_vectors", "mean_decisions"}  # these may look at vectors of classes without samples
    for name in without.keys() - skip:
        assert got[name] == pytest.approx(without[name], rel=1e-11, abs=1e-13), name
    logits = x @ w.T
    agree = collapse.nc4_agreement(x, logits.argmax(1), ClassStatistics(5, 9).update(x, y).class_means)
    assert collapse.nc4_agreement(x, where[logits.argmax(1)], s.class_means) == agree
    assert collapse.nc4_agreement(x, torch.ones(len(x), dtype=torch.long), s.class_means) == 0


def test_8_points_on_a_circle():
    """K > D+1, no simplex: K = 7 points of a regular polygon."""
    turns = 2 * math.pi * torch.arange(7, dtype=torch.float64) / 7
    polygon = torch.stack([turns.cos(), turns.sin()], 1)
    got = collapse_measures(ClassStatistics(7, 2).update(polygon, torch.arange(7)), polygon, full=True)
    assert got["gnc2_vectors_min"] == pytest.approx(1 - math.cos(2 * math.pi / 7), abs=1e-12)
    assert got["gnc2_means_mean"] == pytest.approx(1 - math.cos(2 * math.pi / 7), abs=1e-12)
    assert got["nc2_etf_error"] > 0.5
    assert got["nc2_norm"] == pytest.approx(0, abs=1e-14)
    assert collapse.uniformity(polygon, kernel="riesz") == (0.0, 0.0)  # D = 2: the kernel is 0


@pytest.mark.parametrize("noise", [1.0, 1e-3])
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_9_a_large_offset_costs_no_digits(noise, offset):
    """Raw moments would lose 8 digits of NC1 here at noise 1 and all of them at 1e-3; only x's own rounding is left."""
    x, y, _ = random_case(6, 9, 300, noise=noise)
    there = x + offset
    plain = ClassStatistics(6, 9).update(there - offset, y)  # the same rounded numbers, moved back exactly
    far = ClassStatistics(6, 9).update(there, y)
    assert collapse.nc1(far) == pytest.approx(collapse.nc1(plain), rel=1e-10)
    raw = there.T @ there / len(there) - sum(
        (y == k).sum() / len(y) * torch.outer(m, m) for k, m in enumerate(far.class_means)
    )
    exact = plain.within_scatter
    assert (far.within_scatter - exact).norm() < 1e-12 * exact.norm()
    assert (raw - exact).norm() > 1e-9 * exact.norm()  # that the check can fail


def test_10_coinciding_means_are_not_a_collapse():
    x = torch.randn(20, 4, dtype=torch.float64)
    x = torch.cat([x, x])
    s = ClassStatistics(2, 4).update(x, torch.arange(40) // 20)
    for method in collapse.NC1_METHODS:
        value = collapse.nc1(s, method=method)
        assert math.isnan(value) or value > 1e10
    assert collapse.cdnv(s) > 1e10
    one = collapse_measures(
        ClassStatistics(3, 4).update(x, torch.ones(40, dtype=torch.long)), torch.eye(3, 4), full=True
    )
    for name in ("nc1", "nc2_angle", "nc2_etf_error", "cdnv", "uniformity_dist_mean", "cos_hh_mean"):
        assert math.isnan(one[name]), name
    none = collapse_measures(ClassStatistics(3, 4), torch.eye(3, 4))
    assert all(math.isnan(v) for v in none.values())


def test_11_means_of_low_rank():
    """Three means on a line: S_B has rank 1, and only scatter along the line counts."""
    line = torch.zeros(3, 4, dtype=torch.float64)
    line[:, 0] = torch.tensor([-1.0, 0.0, 1.0])
    x = torch.cat([line + step for step in torch.eye(4, dtype=torch.float64)] + [line - s for s in torch.eye(4)])
    s = ClassStatistics(3, 4).update(x, torch.arange(3).repeat(8))
    # S_W = I/4, S_B = (2/3) e₁e₁ᵀ: NC1 = (1/4)/(2/3)/3
    assert collapse.nc1(s) == pytest.approx(1 / 8, rel=1e-12)
    assert collapse.nc1(s, method="svd") == pytest.approx(1 / 8, rel=1e-12)
    assert collapse.nc1(s, method="quotient") == pytest.approx(3 / 2, rel=1e-12)


@pytest.mark.parametrize("thin", [1.0, 1e-3, 1e-5])
@pytest.mark.parametrize(("num_classes", "dim"), [(6, 9), (9, 6)])
def test_11_nearly_flat_means_keep_their_digits(thin, num_classes, dim):
    """pinv(S_B) = K·Mc⁺Mc⁺ᵀ, so that NC1 = mean ‖Mc⁺ᵀ(x − x̄)‖², whose pseudo-inverse has the root of the condition."""
    x, y, _ = random_case(num_classes, dim)
    x[:, 0] *= thin
    s, twin = ClassStatistics(num_classes, dim).update(x, y), Twin(x, y, num_classes)
    residuals = x.numpy() - twin.means[y.numpy()]
    expected = ((residuals @ np.linalg.pinv(twin.centred("class"))) ** 2).sum() / len(x)
    assert collapse.nc1(s) == pytest.approx(expected, rel=1e-9)


def test_12_minority_collapse_shows_in_the_angle():
    vectors = simplex_vectors(6, 8, seed=0)
    few = torch.arange(6) >= 3
    g = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-7, 1e-11):
        merged = vectors.clone()
        steps = torch.randn(3, 8, generator=g, dtype=torch.float64)
        merged[3:] = merged[3] + size * steps
        across = steps - torch.outer(steps @ merged[3], merged[3]) / merged[3].square().sum()
        expected = math.degrees(size * torch.pdist(across).mean() / merged[3].norm())
        assert collapse.minority_angle(merged, few) == pytest.approx(expected, rel=max(10 * size, 1e-4))
    assert math.isnan(collapse.minority_angle(vectors, torch.arange(6) == 0))


def test_riesz_is_finite_where_it_can_be_and_says_where_not():
    frame = simplex_vectors(4, 4096, seed=0)
    with pytest.warns(RuntimeWarning, match="log_riesz_energy"):
        assert collapse.uniformity(frame, kernel="riesz") == (0.0, 0.0)
    assert collapse.log_riesz_energy(frame) == pytest.approx(-4094 / 2 * math.log(8 / 3))
    assert collapse.uniformity(X[:4], kernel="riesz")[0] == pytest.approx(math.exp(collapse.log_riesz_energy(X[:4])))


def test_names_and_shapes_are_checked():
    for call, words in (
        (lambda: collapse.nc1(S, method="pinvv"), "pinv"),
        (lambda: collapse.nc1(S, center="global"), "class, sample"),
        (lambda: collapse.uniformity(S, kernel="rietz"), "riesz"),
        (lambda: collapse.nc3_distance(S, W[:3]), "4, 7"),
        (lambda: collapse.minority_angle(S, [True, False]), "4 booleans"),
        (lambda: collapse.feature_norm_spread(S, over="class"), "classes"),
    ):
        with pytest.raises(InputError, match=words):
            call()


def test_summary_is_cheap_by_default_and_flat():
    assert list(collapse_measures(S)) == ["nc1", "nc2_angle", "nc2_norm"]
    assert list(collapse_measures(S, W, torch.zeros(4))) == ["nc1", "nc2_angle", "nc2_norm", "nc3"]
    assert "nc1" not in collapse_measures(ClassStatistics(4, 7, within="none").update(X, Y), W)
    full = collapse_measures(S, W, torch.zeros(4), few=[False, False, True, True], full=True)
    assert all(type(v) is float for v in full.values())
    assert not any(math.isnan(v) for v in full.values())
    counted = ClassStatistics(4, 7, class_means=S.class_means).update(X, Y, (X @ W.T).argmax(1))
    assert collapse_measures(counted, W)["nc4"] == 1.0


def test_bias_moves_the_decisions_at_the_means():
    assert collapse.mean_decisions(S, W) == 1
    assert collapse.mean_decisions(S, W, torch.tensor([100.0, 0, 0, 0])) == 1 / 4
