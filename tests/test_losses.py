"""Each loss against a plain NumPy loop, closed-form gradients, and the meanings that the words promise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from equiframe import (
    LDAM,
    AngularRegression,
    BalancedSoftmax,
    CosineHead,
    CrossEntropy,
    DotRegression,
    FocalLoss,
    FrameHead,
    InputError,
    LinearHead,
    LogitAdjustedCrossEntropy,
    MixedTargets,
    ReleasedDotRegression,
    SquaredError,
    VectorScaling,
    adjust_logits,
    dot_regression,
    effective_number_weights,
    focal_loss,
    ldam_margins,
    released_dot_regression,
    squared_error,
    transport_cost,
    vector_scaling,
)
from equiframe.losses import (
    CLASS_WEIGHTINGS,
    batch_balanced_weights,
    class_balanced_weights,
    target_counts,
    target_shares,
)

K, D, B = 5, 8, 12
COUNTS = [100, 40, 10, 4, 2]
BETA = 0.99
TARGETS = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4])


def head_and_features(seed=0, **options):
    options = {"logit_scale": 3.0, "norm": "none", "seed": seed, **options}
    head = FrameHead(D, K, **options).double()
    x = torch.randn(B, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    return head, x


@pytest.mark.parametrize("weighting", ["none", "batch-balanced", "effective-number-mean"])
def test_a_sample_weight_is_so_many_samples(weighting):
    head, x = head_and_features(length="free")
    loss = CrossEntropy(class_weighting=weighting, class_counts=COUNTS)
    repeats = torch.tensor([1, 0, 2, 3, 1, 1, 0, 4, 1, 1, 2, 1])
    repeated = loss(head(x.repeat_interleave(repeats, 0)), TARGETS.repeat_interleave(repeats))
    weights = repeats * (len(repeats) / repeats.sum())
    for targets in (TARGETS, F.one_hot(TARGETS, K).double(), MixedTargets(TARGETS, TARGETS, 0.3)):
        torch.testing.assert_close(loss(head(x), targets, sample_weights=weights), repeated, rtol=1e-6, atol=0)
    with pytest.raises(InputError, match="sample_weights are those of one batch"):
        loss(head(x), TARGETS, TARGETS, weights)


def numpy_softmax_ce(logits, q):
    total = []
    for z, target in zip(logits, q, strict=True):
        log_norm = math.log(sum(math.exp(v - max(z)) for v in z)) + max(z)
        total.append(sum(t * (log_norm - v) for t, v in zip(target, z, strict=True)))
    return np.array(total)


def one_hot(targets):
    return F.one_hot(targets, K).double()


def soft_of(targets):
    """A target of every kind as plain probabilities (B, K)."""
    if isinstance(targets, MixedTargets):
        return targets.share * one_hot(targets.first) + (1 - targets.share) * one_hot(targets.second)
    return targets if targets.is_floating_point() else one_hot(targets)


def weights_by_loop(kind, q):
    if kind == "none":
        return np.ones(K)
    if kind == "class-balanced":
        return np.array([sum(COUNTS) / (K * n) for n in COUNTS])
    n = q.sum(0)
    if kind.startswith("effective-number"):
        inverse = [(1 - BETA) / (1 - BETA**count) for count in COUNTS]
        weights = np.array([K * v / sum(inverse) for v in inverse])
        return weights / (sum(weights * n) / len(q)) if kind == "effective-number-mean" else weights
    present = sum(v > 0 for v in n)
    return np.array([len(q) / (present * v) if v > 0 else 0.0 for v in n])


TARGET_KINDS = {
    "hard": TARGETS,
    "mixup": MixedTargets(TARGETS, TARGETS.roll(3), 0.7),
    "mixup per sample": MixedTargets(TARGETS, TARGETS.roll(3), torch.linspace(0, 1, B, dtype=torch.float64)),
    "soft": F.softmax(torch.randn(B, K, dtype=torch.float64, generator=torch.Generator().manual_seed(5)), dim=1),
}


def soft(name):
    targets = TARGET_KINDS[name]
    if name == "mixup per sample":
        share = targets.share[:, None]
        return share * one_hot(targets.first) + (1 - share) * one_hot(targets.second)
    return soft_of(targets)


def per_class_by_loop(name, head, x):
    """(B, K): the loss of sample i if its class were k, in plain loops."""
    w = head.class_vectors().numpy()
    h = head(x).features.detach().numpy()
    out = np.zeros((B, K))
    logits = head.logit_scale * h @ w.T
    prior = np.log(np.array(COUNTS) / sum(COUNTS))
    for i in range(B):
        for k in range(K):
            if name == "ce":
                out[i, k] = numpy_softmax_ce(logits[i : i + 1], np.eye(K)[k : k + 1])[0]
            elif name == "ce smoothed":
                out[i, k] = numpy_softmax_ce(logits[i : i + 1], 0.9 * np.eye(K)[k : k + 1] + 0.1 / K)[0]
            elif name == "balanced softmax":
                out[i, k] = numpy_softmax_ce(logits[i : i + 1] + prior, np.eye(K)[k : k + 1])[0]
            elif name == "logit adjusted":
                out[i, k] = numpy_softmax_ce(logits[i : i + 1] + 1.5 * prior, np.eye(K)[k : k + 1])[0]
            elif name == "vs":
                factors = np.array([(n / max(COUNTS)) ** 0.2 for n in COUNTS])
                out[i, k] = numpy_softmax_ce(logits[i : i + 1] * factors + 1.5 * prior, np.eye(K)[k : k + 1])[0]
            elif name == "focal":
                surprise = numpy_softmax_ce(logits[i : i + 1], np.eye(K)[k : k + 1])[0]
                out[i, k] = (1 - math.exp(-surprise)) ** 1.7 * surprise
            elif name == "ldam":
                cosines = w @ h[i] / np.linalg.norm(w, axis=1) / np.linalg.norm(h[i])
                margin = 0.4 * (min(COUNTS) / COUNTS[k]) ** 0.25
                scale = 3.0 * math.sqrt(head.e_w * head.e_h)
                top = math.exp(scale * (cosines[k] - margin))
                out[i, k] = -math.log(top / (top + sum(math.exp(scale * cosines[j]) for j in range(K) if j != k)))
            elif name == "mse":
                z = logits[i]
                out[i, k] = (2.5 * (z[k] - 3.0) ** 2 + sum(z[j] ** 2 for j in range(K) if j != k)) / K
            elif name == "dr":
                s = math.sqrt(head.e_w * head.e_h)
                out[i, k] = (w[k] @ h[i] - s) ** 2 / (2 * s)
            elif name == "angular":
                s = math.sqrt(head.e_w * head.e_h)
                cosine = w[k] @ h[i] / (np.linalg.norm(w[k]) * np.linalg.norm(h[i]))
                out[i, k] = 0.5 * s * math.acos(cosine) ** 2
            elif name == "dr released":
                length = math.sqrt(sum(v * v for v in h[i]))
                wk = math.sqrt(sum(v * v for v in w[k]))
                out[i, k] = 0.5 * (w[k] @ h[i] - wk * length) ** 2 / length + 0.01 * length
    return out


LOSSES = {
    "ce": lambda **kw: CrossEntropy(**kw),
    "ce smoothed": lambda **kw: CrossEntropy(label_smoothing=0.1, **kw),
    "balanced softmax": lambda **kw: BalancedSoftmax(**kw),
    "logit adjusted": lambda **kw: LogitAdjustedCrossEntropy(tau=1.5, **kw),
    "vs": lambda **kw: VectorScaling(vs_gamma=0.2, tau=1.5, **kw),
    "focal": lambda **kw: FocalLoss(focal_gamma=1.7, **kw),
    "ldam": lambda **kw: LDAM(max_margin=0.4, **kw),
    "mse": lambda **kw: SquaredError(mse_kappa=2.5, mse_target=3.0, **kw),
    "dr": lambda **kw: DotRegression(**kw),
    "dr released": lambda **kw: ReleasedDotRegression(length_penalty=0.01, **kw),
    "angular": lambda **kw: AngularRegression(**kw),
}


@pytest.mark.parametrize("weighting", CLASS_WEIGHTINGS)
@pytest.mark.parametrize("kind", TARGET_KINDS)
@pytest.mark.parametrize("name", LOSSES)
def test_value_against_loops(name, kind, weighting):
    head, x = head_and_features(e_w=2.0, e_h=3.0, length="free" if name == "dr released" else "unit")
    q = soft(kind).numpy()
    expected = (q * weights_by_loop(weighting, q) * per_class_by_loop(name, head, x)).sum(1).mean()
    counts = torch.tensor(COUNTS, dtype=torch.float64)
    loss = LOSSES[name](class_weighting=weighting, effective_beta=BETA, class_counts=counts)
    assert loss(head(x), TARGET_KINDS[kind]).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_by_finite_differences(name):
    head, x = head_and_features(length="unit" if name != "dr released" else "free")
    loss = LOSSES[name](class_weighting="batch-balanced", class_counts=COUNTS)
    if name == "dr released":  # a detached length is no function that differences could see: closed form below
        h = head(x).features
        grad = torch.autograd.grad(loss(head(x), TARGETS), x)[0]
        w = head.vectors(TARGETS)
        length = h.norm(dim=1, keepdim=True)
        weights = batch_balanced_weights(TARGETS, K)[TARGETS][:, None].double()
        inner = (w * h).sum(1, keepdim=True)
        expected = weights * (((inner - length) / length) * w + 0.01 * h / length) / B
        torch.testing.assert_close(grad, expected.detach(), rtol=1e-6, atol=1e-9)
        return
    assert torch.autograd.gradcheck(lambda z: loss(head(z), TARGETS), (x,), atol=1e-6)


def test_dr_gradient_is_the_closed_form_pull():
    """On ‖h‖ = √E_H: ∂L/∂h = −(1 − cos)·w_c — a pull toward one's own class vector and nothing else."""
    head, x = head_and_features(e_w=2.0, e_h=3.0)
    h = head(x).features.detach().requires_grad_()
    w = head.vectors(TARGETS)
    dot_regression((w * h).sum(1), e_w=2.0, e_h=3.0).sum().backward()
    cosine = F.cosine_similarity(h, w).detach()[:, None]
    torch.testing.assert_close(h.grad, -(1 - cosine) * w)


@given(st.floats(0.1, 10), st.floats(0.1, 10), st.integers(0, 1000))
def test_dr_is_zero_only_at_the_vertex(e_w, e_h, seed):
    head = FrameHead(D, K, logit_scale=1.0, norm="none", e_w=e_w, e_h=e_h, seed=seed).double()
    w = head.class_vectors()
    h = math.sqrt(e_h / e_w) * w
    assert dot_regression((w * h).sum(1), e_w=e_w, e_h=e_h).abs().max() < 1e-10
    wrong = dot_regression((w * h.roll(1, 0)).sum(1), e_w=e_w, e_h=e_h)
    expected = 0.5 * math.sqrt(e_w * e_h) * (1 + 1 / (K - 1)) ** 2
    torch.testing.assert_close(wrong, torch.full_like(wrong, expected), rtol=1e-5, atol=0)


def test_the_released_loss_with_its_batch_lengths_is_the_macro_average():
    """The release scales class vector c by √(γ/n_c), γ = B/C. At ‖h‖ = 1 the batch mean is then exactly the average over
    the classes of ½(1 − cos)² (../shared/paper.md §1): our class_weighting="batch-balanced"."""
    head, x = head_and_features()
    h = head(x).features.detach()
    n = torch.bincount(TARGETS, minlength=K)
    gamma = B / (n > 0).sum()
    lengths = torch.sqrt(gamma / n)[TARGETS]
    inner = lengths * (head.vectors(TARGETS) * h).sum(1)
    released = (0.5 * (inner - lengths * h.norm(dim=1)) ** 2 / h.norm(dim=1)).mean()
    one_minus_cos = 0.5 * (1 - (head.vectors(TARGETS) * h).sum(1)) ** 2
    macro = torch.stack([one_minus_cos[k == TARGETS].mean() for k in range(K)]).mean()
    torch.testing.assert_close(released, macro)
    for loss in (
        DotRegression(class_weighting="batch-balanced"),
        ReleasedDotRegression(class_weighting="batch-balanced"),
    ):
        torch.testing.assert_close(loss(head(x), TARGETS).double(), macro)
    assert not math.isclose(DotRegression()(head(x), TARGETS).item(), macro.item(), rel_tol=1e-3)


def test_released_equals_paper_at_unit_length_only():
    products = torch.linspace(-1, 1, 7)
    torch.testing.assert_close(released_dot_regression(products, torch.ones(7)), dot_regression(products))
    assert not torch.allclose(released_dot_regression(products, torch.full((7,), 2.0)), dot_regression(products))


def test_released_radial_gradient_pushes_outward():
    """With the length detached the gradient along h is (cos − 1)·cos < 0 for 0 < cos < 1: descent lengthens h."""
    w = F.normalize(torch.tensor([[1.0, 0.4, 0.0]]), dim=1)
    h = torch.tensor([[2.0, 0.0, 0.0]], requires_grad=True)
    released_dot_regression((w * h).sum(1), h.norm(dim=1)).sum().backward()
    assert h.grad[0, 0] < 0


def test_balanced_softmax_is_logit_adjustment_at_tau_1():
    head, x = head_and_features()
    a = BalancedSoftmax(class_counts=COUNTS)(head(x), TARGETS)
    b = LogitAdjustedCrossEntropy(tau=1.0, class_counts=COUNTS)(head(x), TARGETS)
    c = CrossEntropy()(head(x), TARGETS)
    torch.testing.assert_close(a, b)
    assert abs(a.item() - c.item()) > 1e-3
    zero = LogitAdjustedCrossEntropy(tau=0.0, class_counts=COUNTS)(head(x), TARGETS)
    torch.testing.assert_close(zero, c)


def test_balanced_softmax_formula():
    """exp(z_c) n_c / Σ exp(z_k) n_k, as in Ren et al. (2020), eq. 3."""
    z = torch.randn(4, K, dtype=torch.float64)
    n = torch.tensor(COUNTS, dtype=torch.float64)
    expected = -torch.log(z.exp() * n / (z.exp() * n).sum(1, keepdim=True))
    torch.testing.assert_close(-F.log_softmax(adjust_logits(z, n), dim=1), expected)


def test_losses_work_on_any_head():
    linear = LinearHead(D, K).double()
    _, x = head_and_features()
    for name in ("ce", "balanced softmax", "logit adjusted", "vs", "focal", "mse"):
        assert LOSSES[name](class_counts=COUNTS)(linear(x), TARGETS).isfinite()
    with pytest.raises(InputError, match="LDAM sets margins of cosines and needs a cosine or frame head"):
        LDAM(class_counts=COUNTS)(linear(x), TARGETS)
    with pytest.raises(InputError, match="DotRegression needs a frame head, got LinearHead"):
        DotRegression()(linear(x), TARGETS)


@given(st.lists(st.integers(0, K - 1), min_size=1, max_size=30))
def test_batch_balanced_weights_average_over_classes(labels):
    targets = torch.tensor(labels)
    weights = batch_balanced_weights(targets, K)
    values = torch.rand(len(labels))
    weighted = (values * weights[targets]).mean()
    macro = torch.stack([values[targets == k].mean() for k in sorted(set(labels))]).mean()
    torch.testing.assert_close(weighted, macro)


def test_class_balanced_weights_have_mean_1_over_the_data_set():
    n = torch.tensor(COUNTS, dtype=torch.float64)
    weights = class_balanced_weights(n)
    assert (weights * n).sum() / n.sum() == pytest.approx(1)
    assert (weights * n).std() < 1e-9


@pytest.mark.parametrize("kind", TARGET_KINDS)
def test_target_counts(kind):
    torch.testing.assert_close(target_shares(TARGET_KINDS[kind], K).double(), soft(kind), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(target_counts(TARGET_KINDS[kind], K).double(), soft(kind).sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CrossEntropy(class_weighting="balanced"), "unknown class weighting 'balanced'"),
        (lambda: CrossEntropy(class_weighting="class-balanced"), "needs class_counts"),
        (lambda: BalancedSoftmax(), "needs class_counts"),
        (lambda: BalancedSoftmax(class_counts=[3, 0, 2]), "class 1 has no training image"),
        (lambda: CrossEntropy(label_smoothing=1.0), r"label_smoothing must be in \[0, 1\)"),
        (lambda: CrossEntropy(class_weighting="effective-number"), "needs class_counts"),
        (lambda: CrossEntropy(effective_beta=1.0), r"effective_beta must be in \[0, 1\), got 1.0"),
        (lambda: CrossEntropy(reweight_from=1.0), r"reweight_from must be in \[0, 1\), got 1.0"),
        (lambda: CrossEntropy(alignment=-0.1), "alignment must be at least 0 and finite, got -0.1"),
        (lambda: FocalLoss(focal_gamma=-1.0), "focal_gamma must be at least 0"),
        (lambda: LDAM(), "LDAM needs class_counts"),
        (lambda: LDAM(max_margin=2.0, class_counts=COUNTS), r"max_margin must be in \[0, 2\)"),
        (lambda: VectorScaling(class_counts=COUNTS, vs_gamma=float("nan")), "vs_gamma must be at least 0"),
        (lambda: SquaredError(mse_kappa=0.0), "mse_kappa must be a positive number"),
        (lambda: transport_cost(torch.eye(3), torch.eye(3), epsilon=0.01), "epsilon must be at least 0.1"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_ce_floor_of_raw_cosines():
    """Softmax of unscaled cosines cannot go below log(1 + (K−1)e^{−K/(K−1)}): 1.377 at K = 10, 3.612 at K = 100."""
    for k, floor in ((10, 1.377), (100, 3.612)):
        head = FrameHead(128, k, logit_scale=1.0, norm="none").double()
        best = CrossEntropy()(head(head.class_vectors()), torch.arange(k)).item()
        assert best == pytest.approx(math.log(1 + (k - 1) * math.exp(-k / (k - 1))), rel=1e-6)
        assert best == pytest.approx(floor, abs=6e-4)


# --- focal, LDAM, VS, squared error: limits and closed-form gradients -------------------------------------------------


def random_logits(rows=20, scale=4.0, seed=1):
    z = scale * torch.randn(rows, K, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return z.requires_grad_(), torch.arange(rows) % K


def test_focal_loss_is_cross_entropy_at_gamma_0_and_below_it_else():
    z, y = random_logits()
    ce = F.cross_entropy(z, y, reduction="none")
    assert torch.equal(focal_loss(z, y, gamma=0.0), ce)
    values = torch.stack([focal_loss(z, y, gamma=g) for g in (0.0, 0.5, 1.0, 2.0, 5.0)])
    assert bool((values.diff(dim=0) < 0).all())


def test_focal_gradient_is_the_papers():
    """dFL/dz_c = (1−p)^γ (γ p log p + p − 1), Lin et al. (2017), appendix B; the others share its opposite by p_j."""
    z, y = random_logits()
    focal_loss(z, y, gamma=2.0).sum().backward()
    probabilities = z.detach().softmax(1)
    p = probabilities.gather(1, y[:, None])
    own = (1 - p) ** 2 * (2 * p * p.log() + p - 1)
    expected = (-own * probabilities / (1 - p)).scatter(1, y[:, None], own)
    torch.testing.assert_close(z.grad, expected)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_gradient_is_finite_where_p_is_1(gamma):
    z = torch.tensor([[200.0, 0.0, 0.0], [0.0, 200.0, 0.0]], requires_grad=True)
    focal_loss(z, torch.tensor([0, 0]), gamma=gamma).sum().backward()
    assert bool(z.grad.isfinite().all())
    assert z.grad[0].abs().max() == 0


def test_ldam_margins():
    """Cao et al.: Δ ∝ n^(−1/4), the rarest class has the largest; equal counts have equal margins."""
    margins = ldam_margins(torch.tensor([10_000.0, 16.0]), max_margin=0.5)
    torch.testing.assert_close(margins, torch.tensor([0.5 * 2 / 10, 0.5]))
    assert ldam_margins(torch.full((4,), 7.0)).tolist() == [0.5] * 4


def test_ldam_gradient_and_limits():
    head = CosineHead(D, K, logit_scale=30.0, norm="none").double()
    x = head_and_features()[1]
    plain = CrossEntropy()(head(x), TARGETS)
    torch.testing.assert_close(LDAM(class_counts=COUNTS, max_margin=0.0)(head(x), TARGETS), plain)
    assert LDAM(class_counts=COUNTS)(head(x), TARGETS) > plain
    output = head(x)
    output.logits.retain_grad()
    LDAM(class_counts=COUNTS)(output, TARGETS).backward()
    margins = 30 * ldam_margins(torch.tensor(COUNTS, dtype=torch.float32)).double()[TARGETS]
    shifted = output.logits.detach() - margins[:, None] * one_hot(TARGETS)
    torch.testing.assert_close(output.logits.grad, (shifted.softmax(1) - one_hot(TARGETS)) / B, rtol=1e-6, atol=1e-9)


def test_vector_scaling_limits():
    """γ = 0 is logit adjustment, τ = 0 is the multiplicative loss alone, equal counts change no probability."""
    z, _ = random_logits()
    n = torch.tensor(COUNTS, dtype=torch.float64)
    torch.testing.assert_close(vector_scaling(z, n, gamma=0.0, tau=1.3), adjust_logits(z, n, tau=1.3))
    torch.testing.assert_close(vector_scaling(z, n, gamma=0.5, tau=0.0)[:, 3], z[:, 3] * math.sqrt(4 / 100))
    equal = vector_scaling(z, torch.full((K,), 9.0), gamma=0.5, tau=1.0)
    torch.testing.assert_close(equal.softmax(1), z.softmax(1))


def test_squared_error_gradient_and_soft_targets():
    z, y = random_logits()
    squared_error(z, kappa=15.0, target=30.0).gather(1, y[:, None]).sum().backward()
    expected = 2 / K * torch.where(one_hot(y) == 1, 15 * (z - 30), z)
    torch.testing.assert_close(z.grad, expected.detach())
    q = torch.rand(len(z), K, dtype=torch.float64).softmax(1)
    averaged = (q * squared_error(z)).sum(1)
    torch.testing.assert_close(averaged, ((z - q) ** 2).mean(1) + (1 - q.square().sum(1)) / K)
    assert squared_error(one_hot(y)).gather(1, y[:, None]).abs().max() == 0


# --- class weights and when they begin --------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 10_000), min_size=2, max_size=20), st.floats(0, 0.99999))
def test_effective_number_weights_between_ones_and_inverse_frequency(counts, beta):
    n = torch.tensor(counts, dtype=torch.float64)
    weights = effective_number_weights(n, beta=beta)
    assert weights.sum().item() == pytest.approx(len(counts))
    order = torch.argsort(n, stable=True)
    assert bool((weights[order].diff() <= 1e-9).all())  # more images never weigh more
    torch.testing.assert_close(effective_number_weights(n, beta=0.0), torch.ones_like(n))
    near_1 = effective_number_weights(n, beta=1 - 1e-12)
    torch.testing.assert_close(near_1, len(n) / n / (1 / n).sum(), rtol=1e-3, atol=0)


def test_effective_number_mean_is_pytorchs_weighted_cross_entropy():
    head, x = head_and_features()
    output = head(x)
    weights = effective_number_weights(torch.tensor(COUNTS, dtype=torch.float64), beta=BETA)
    loss = CrossEntropy(class_weighting="effective-number-mean", effective_beta=BETA, class_counts=COUNTS)
    expected = F.cross_entropy(output.logits.double(), TARGETS, weight=weights)
    torch.testing.assert_close(loss(output, TARGETS).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weighting", CLASS_WEIGHTINGS[1:])
def test_weighting_begins_at_its_share_of_the_run(weighting):
    head, x = head_and_features()
    options = {"class_weighting": weighting, "class_counts": COUNTS}
    plain = CrossEntropy()(head(x), TARGETS)
    weighted = CrossEntropy(**options)(head(x), TARGETS)
    assert abs(weighted - plain) > 1e-3
    late = CrossEntropy(**options, reweight_from=0.8)
    for done, expected in ((None, plain), (159 / 200, plain), (160 / 200, weighted), (1.0, weighted), (0.1, plain)):
        if done is not None:
            late.at(done)
        assert torch.equal(late(head(x), TARGETS), expected), done


# --- alignment by transport -------------------------------------------------------------------------------------------


def transport_by_loop(h, w, epsilon, rounds=2000):
    cost = np.array([[1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in w] for a in h])
    plan = np.exp(-cost / epsilon)
    for _ in range(rounds):
        for i in range(len(h)):
            plan[i] *= 1 / len(h) / plan[i].sum()
        for k in range(len(w)):
            plan[:, k] *= 1 / len(w) / plan[:, k].sum()
    return (plan * cost).sum(), plan


@pytest.mark.parametrize("epsilon", [1.0, 0.3])
def test_transport_cost_against_loops(epsilon):
    head, x = head_and_features(e_w=2.0)
    h, w = x.detach(), head.class_vectors()
    expected, plan = transport_by_loop(h.numpy(), w.numpy(), epsilon)
    np.testing.assert_allclose(plan.sum(0), 1 / K)
    assert transport_cost(h, w, epsilon=epsilon, iterations=200).item() == pytest.approx(expected, rel=1e-7)
    assert transport_cost(7 * h, w, epsilon=epsilon).item() == pytest.approx(expected, rel=2e-3)


def test_transport_cost_has_a_gradient_and_its_fixed_points():
    head, x = head_and_features()
    w = head.class_vectors()
    assert torch.autograd.gradcheck(lambda z: transport_cost(z, w), (x,))
    same = w[:1].expand(K, D)
    expected = (1 - F.cosine_similarity(x, w[:1])).mean()
    torch.testing.assert_close(transport_cost(x, same), expected)
    balanced, one_sided = w.repeat(2, 1), w[:1].repeat(10, 1)
    assert transport_cost(balanced, w, epsilon=0.1) < 0.01 < transport_cost(one_sided, w, epsilon=0.1)


def test_alignment_adds_the_transport_cost_of_the_normalised_features():
    head, x = head_and_features(length="free")
    cost = transport_cost(x, head.class_vectors())
    difference = CrossEntropy(alignment=0.3)(head(x), TARGETS) - CrossEntropy()(head(x), TARGETS)
    torch.testing.assert_close(difference, 0.3 * cost)
    linear = LinearHead(D, K).double()
    with pytest.raises(InputError, match="alignment needs a frame"):
        CrossEntropy(alignment=0.3)(linear(x), TARGETS)
    linear.aligner = FrameHead(D, K, logit_scale=1.0, seed=4).double()
    normalised = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
    cost = transport_cost(normalised, linear.aligner.class_vectors())
    difference = CrossEntropy(alignment=0.3)(linear(x), TARGETS) - CrossEntropy()(linear(x), TARGETS)
    torch.testing.assert_close(difference, 0.3 * cost, rtol=1e-6, atol=1e-9)
