"""The layer-peeled model: theory as assertions, gradients against autograd, certificates against solutions."""

from __future__ import annotations

import functools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equiframe.cli import main
from equiframe.errors import InputError
from equiframe.frames import make_frame
from equiframe.peeled import (
    JOINT_METHODS,
    LOSSES,
    METHODS,
    PeeledModel,
    StepProblem,
    claim_c1,
    claims,
    class_counts,
    class_norms,
    collapse_threshold,
    feature_gap,
    joint_gap,
    laboratory,
    make_loss,
    minor_cosine,
    mse_optimum,
    optimal_value,
    push_over_pull,
    relu_optimum,
    solve_features,
    solve_joint,
    split_gradients,
    theorem1_value,
    track_gradients,
    vanishing_threshold,
)
from equiframe.peeled.claims import alignment, angle_curve, cosine_matrix, frame_vectors, minor_classes


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def off_diagonal(matrix):
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)]


# --- losses and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_loss_gradients_are_those_of_autograd(name):
    loss = make_loss(name, counts=class_counts(5, 20), scale=3.0, tau=1.5)
    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(40, 5, generator=generator, dtype=torch.float64)
    z.requires_grad_(True)
    y = torch.arange(40) % 5
    (expected,) = torch.autograd.grad(loss.value(z, y).sum(), z)
    assert torch.allclose(loss.gradient(z, y), expected, rtol=1e-12, atol=1e-15)


def test_losses_are_the_textbook_ones():
    counts = class_counts(4, 10)
    z = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3, 3, 0])
    plain = torch.nn.functional.cross_entropy
    value = {n: make_loss(n, counts=counts, scale=2.0, tau=1.0).value(z, y) for n in LOSSES}
    assert torch.allclose(value["ce"], plain(z, y, reduction="none"))
    assert torch.allclose(value["balanced"], plain(z + counts.log(), y, reduction="none"))
    assert torch.allclose(value["adjusted"], value["balanced"])
    assert torch.allclose(value["dr"], torch.stack([(z[i, c] - 2) ** 2 / 4 for i, c in enumerate(y)]))
    assert torch.allclose(value["mse"], 0.5 * (z - torch.eye(4, dtype=torch.float64)[y]).square().sum(1))


def test_cross_entropy_keeps_relative_accuracy_where_it_is_tiny():
    z = torch.tensor([[50.0, 0.0, 0.0]], dtype=torch.float64)
    loss = make_loss("ce", counts=class_counts(3, 1), scale=1.0)
    assert float(loss.value(z, torch.tensor([0]))[0]) == pytest.approx(2 * math.exp(-50), rel=1e-12)
    assert float(loss.gradient(z, torch.tensor([0]))[0, 0]) == pytest.approx(-2 * math.exp(-50), rel=1e-12)


@pytest.mark.parametrize("constraint", ["vector", "average", "penalty"])
@pytest.mark.parametrize("name", LOSSES)
def test_model_gradients_are_those_of_autograd(name, constraint):
    model = PeeledModel(class_counts(4, 7), 5, 2.0, 3.0, loss=name, constraint=constraint)
    w, h = model.random_vectors().requires_grad_(True), model.random_features().requires_grad_(True)
    expected = torch.autograd.grad(model.objective(w, h), (w, h))
    for found, wanted in zip(model.gradients(w.detach(), h.detach()), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-11, atol=1e-15)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 7), st.integers(1, 6), st.integers(1, 12), st.floats(0.1, 30), st.integers(0, 1000))
def test_pull_and_push_add_up_to_the_gradient(num_classes, dim, batch, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(batch, dim, generator=generator, dtype=torch.float64).requires_grad_(True)
    w = torch.randn(num_classes, dim, generator=generator, dtype=torch.float64).requires_grad_(True)
    y = torch.randint(num_classes, (batch,), generator=generator)
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(scale * h @ w.T, y), (h, w))
    split = split_gradients(h, w, y, scale=scale)
    assert torch.allclose(split.feature_pull + split.feature_push, expected[0], rtol=1e-9, atol=1e-12)
    assert torch.allclose(split.vector_pull + split.vector_push, expected[1], rtol=1e-9, atol=1e-12)
    # Pull is along −w_c, and a class without a sample in the batch is only pushed.
    assert bool(((split.feature_pull * w[y]).sum(1) <= 0).all())
    absent = torch.tensor([k for k in range(num_classes) if k not in y.tolist()], dtype=torch.long)
    assert not split.vector_pull[absent].any()


def test_split_takes_logits_or_probabilities_of_the_head():
    h, w, y = torch.randn(6, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, 3, 0, 0])
    logits = 2 * h @ w.T + torch.tensor([0.1, -0.2, 0.3, 0.0])
    a = split_gradients(h, w, y, logits=logits, scale=2.0)
    b = split_gradients(h, w, y, probabilities=torch.softmax(logits, 1), scale=2.0)
    assert torch.allclose(a.vector_push, b.vector_push)
    norms = class_norms(a, y)
    assert float(norms["feature_pull"][0]) == pytest.approx(float(a.feature_pull[y == 0].norm(dim=1).sum()), rel=1e-5)
    with pytest.raises(InputError, match="not both"):
        split_gradients(h, w, y, logits=logits, probabilities=logits)
    with pytest.raises(InputError, match="one whole number"):
        split_gradients(h, w, torch.rand(6, 4))


def test_push_dominates_minor_classes_and_pull_major_ones():
    model = PeeledModel(class_counts(10, 100), 32, 2.0, 2.0)
    history = track_gradients(model, iterations=300, step=2.0)
    assert min(history["ratio_minor"]) > 5
    assert max(history["ratio_major"]) < 0.5
    assert history["cosine_minor"][-1] > 0.5
    fixed = track_gradients(model, iterations=300, step=2.0, vectors=frame_vectors(model))
    assert fixed["cosine_minor"][-1] == pytest.approx(-1 / 9, abs=1e-12)
    # On the frame at its optimum the push on a feature is 1/(K−1) of the pull, and along it.
    h = frame_vectors(model)
    split = split_gradients(h, frame_vectors(model), model.targets, weights=model.weights)
    assert push_over_pull(class_norms(split, model.targets), torch.arange(10), of="feature") == pytest.approx(1 / 9)


# --- Theorem 1 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1, 10, 100, 1000])
@pytest.mark.parametrize(("num_classes", "dim", "scale"), [(10, 64, 2.0), (4, 3, 8.0), (20, 19, 30.0)])
def test_theorem_1(num_classes, dim, scale, ratio):
    model = PeeledModel(class_counts(num_classes, ratio), dim, scale / 2, scale * 2)
    vectors = frame_vectors(model)
    for seed in range(3):
        solution = solve_features(model, vectors, seed=seed)
        assert solution.converged
        assert float((solution.features - 2 * vectors).norm(dim=1).max()) <= 1e-8  # √(E_H/E_W) = 2
        assert solution.value == pytest.approx(theorem1_value(num_classes, scale), rel=1e-10, abs=1e-16)
        assert 0 <= solution.gap <= 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_every_solver_finds_the_optimum(method):
    model = PeeledModel(class_counts(6, 5), 8, 1.0, 2.0)
    solution = solve_features(model, frame_vectors(model), method=method)
    assert solution.converged
    assert alignment(model, solution.vectors, solution.features)["error"] < 1e-8
    assert solution.history["gap"][-1] <= 1e-15 < solution.history["gap"][0]


def test_all_samples_free_collapse_onto_one_feature_per_class():
    model = PeeledModel(class_counts(5, 30), 8, 2.0, 2.0, samples="all")
    solution = solve_features(model, frame_vectors(model))
    assert solution.features.shape == (3 * 30 + 2, 8)
    assert alignment(model, solution.vectors, solution.features)["error"] < 1e-8


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 8), st.floats(0.3, 12), st.floats(1, 1000), st.integers(0, 99))
def test_theorem_1_for_any_budget_and_ratio(num_classes, scale, ratio, seed):
    model = PeeledModel(class_counts(num_classes, ratio, profile="exp"), num_classes, scale, scale)
    solution = solve_features(model, frame_vectors(model), seed=seed)
    assert alignment(model, solution.vectors, solution.features)["error"] < 1e-8


def test_theorem_1_has_conditions():
    """Balanced softmax tilts the optimum, the averaged budget changes lengths, a partial orthoplex changes angles."""
    counts = class_counts(10, 100)
    tilted = PeeledModel(counts, 16, 2.0, 2.0, loss="balanced")
    found = solve_features(tilted, frame_vectors(tilted))
    assert alignment(tilted, found.vectors, found.features)["degrees"] > 10
    averaged = PeeledModel(counts, 16, 2.0, 2.0, constraint="average")
    found = solve_features(averaged, frame_vectors(averaged))
    where = alignment(averaged, found.vectors, found.features)
    assert where["degrees"] < 1e-5
    assert where["shortest"] < 0.9 < 1.1 < where["longest"]
    assert found.gap < 1e-10
    for num_classes, off in ((10, 0.0), (8, 10.6058)):
        model = PeeledModel(class_counts(num_classes, 10), 5, 2.0, 2.0)
        frame = math.sqrt(2) * make_frame(num_classes, 5, geometry="orthoplex", dtype=torch.float64).dense()
        found = solve_features(model, frame)
        assert alignment(model, frame, found.features)["degrees"] == pytest.approx(off, abs=1e-3)


def test_a_check_can_fail():
    """A wrong frame, a wrong value and a wrong feature are each seen by the checks above."""
    model = PeeledModel(class_counts(6, 10), 8, 2.0, 2.0)
    vectors = frame_vectors(model).clone()
    vectors[0] = vectors[1]
    solution = solve_features(model, vectors)
    assert alignment(model, vectors, solution.features)["error"] > 0.1
    assert abs(solution.value - theorem1_value(6, 2.0)) > 1e-3
    vectors = frame_vectors(model)
    assert feature_gap(model, vectors, vectors.roll(1, 0)) > 0.1
    assert claim_c1(6, 8, ratios=(1, 10), starts=1).verdict == "holds"


# --- certificates and minority collapse ------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["ce", "mse", "balanced"])
@pytest.mark.parametrize("constraint", ["vector", "average", "penalty"])
def test_gaps_bound_the_distance_to_the_optimum(constraint, loss):
    model = PeeledModel(
        class_counts(5, 8), 10, 1.5, 1.5, loss=loss, constraint=constraint, lambda_w=0.01, lambda_h=0.02
    )
    vectors = frame_vectors(model)
    best = solve_features(model, vectors)
    for seed in range(3):
        h = model.project_features(model.random_features(seed) * 0.8)
        excess = float(model.objective(vectors, h, fixed=True)) - best.value
        assert 0 <= excess <= feature_gap(model, vectors, h) + 1e-12
    joint = solve_joint(model)
    assert joint.gap < 1e-9
    for seed in range(3):
        w = model.project_vectors(model.random_vectors(seed))
        excess = float(model.objective(w, h)) - joint.value
        assert excess <= joint_gap(model, w, h) + 1e-12


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("constraint", ["vector", "average", "penalty"])
def test_projected_and_riemannian_gradients_meet_the_certified_optimum(constraint, loss):
    """Each loss under each limit, with the classifier learned: the gap is to the optimum over every D."""
    model = PeeledModel(class_counts(4, 9), 5, 1.5, 1.5, loss, constraint, lambda_w=0.01, lambda_h=0.02, tau=0.5)
    # Squared error has its optimum inside these budgets; on the spheres, Riemannian descent meets it too.
    methods = JOINT_METHODS if constraint != "penalty" else ("projected",)
    # Averaged over classes, the budget just allows dot regression's loss of 0: its floor is flat, the descent slow.
    steps, bound = (300, 1e-4) if (loss, constraint) == ("dr", "average") else (3000, 1e-8)
    found = [
        solve_joint(model, method=method, seed=seed, max_iterations=steps)
        for seed, method in enumerate((None, *methods))
    ]
    values = [solution.value for solution in found]
    assert max(values) - min(values) < bound
    assert all(-1e-12 < solution.gap < bound for solution in found)


def test_learned_classifiers_refuse_what_they_cannot_do():
    penalty = PeeledModel(class_counts(4, 9), 5, constraint="penalty")
    with pytest.raises(InputError, match="moves on spheres"):
        solve_joint(penalty, method="riemannian")
    with pytest.raises(InputError, match="did you mean 'projected'"):
        solve_joint(penalty, method="project")
    with pytest.raises(InputError, match="penalty"):
        PeeledModel(class_counts(4, 9), 5, nonnegative=True)
    relu = PeeledModel(class_counts(4, 9), 5, constraint="penalty", nonnegative=True)
    with pytest.raises(InputError, match="solve_joint"):
        solve_features(relu, frame_vectors(relu))


@pytest.mark.parametrize("constraint", ["vector", "average", "penalty"])
def test_reduced_and_full_problem_agree_on_both_sides_of_the_threshold(constraint):
    problem = StepProblem(4, 3, constraint, scale=1.5, penalty=1 / 60)
    threshold = collapse_threshold(problem)
    assert minor_cosine(problem, 1.0) == pytest.approx(-1 / 6, abs=1e-6)
    for factor in (0.6, 1.4):
        ratio = factor * threshold
        model = PeeledModel(
            class_counts(7, ratio, num_minor=3),
            8,
            1.5,
            1.5,
            constraint=constraint,
            lambda_w=problem.penalty,
            lambda_h=problem.penalty,
        )
        solution = solve_joint(model)
        assert solution.gap < 1e-7
        assert solution.value == pytest.approx(optimal_value(problem, ratio), abs=1e-7)
        cosines = off_diagonal(cosine_matrix(solution.vectors[4:]))
        assert float(cosines.mean()) == pytest.approx(minor_cosine(problem, ratio), abs=1e-4)
        if factor < 1:
            assert float(cosines.max()) < 0.999
        else:
            assert float(cosines.min()) > 1 - 1e-6


@pytest.mark.parametrize("loss", ["ce", "balanced", "adjusted", "mse"])
def test_under_a_penalty_the_threshold_is_the_same_for_four_losses(loss):
    """√n_B = N·μ, whatever the logits' adjustment: R* = 30 for K_A = K_B = 5 and μ = 1/155."""
    spread = {}
    for ratio in (24, 36):
        model = PeeledModel(
            class_counts(10, ratio), 12, loss=loss, constraint="penalty", lambda_w=1 / 155, lambda_h=1 / 155, tau=2.0
        )
        found = solve_joint(model)
        spread[ratio] = float(torch.pdist(found.vectors[5:]).max() / found.vectors.norm(dim=1).max())
        assert found.gap < 1e-7
    assert spread[36] < 1e-6
    assert spread[24] > 0.1


COUNTS = torch.tensor([40.0, 20.0, 9.0, 4.0, 1.0], dtype=torch.float64)


def distance(solution, optimum):
    """The largest difference of logits and of the Gram matrices of class vectors and of features."""
    w, h = solution.vectors, solution.features
    pairs = (w @ h.T, optimum.logits), (w @ w.T, optimum.vector_gram), (h @ h.T, optimum.feature_gram)
    return max(float((found - wanted).abs().max()) for found, wanted in pairs)


@pytest.mark.parametrize(("dim", "alive"), [(6, 3), (5, 3), (2, 2), (1, 1)])
def test_squared_error_has_dang_s_optimum(dim, alive):
    """Z = diag(1 − Nμ/√n_k)₊: each class vanishes on its own at n_k = N²λ_Wλ_H, and with D < K the largest D stay."""
    mu = 2.5 / 74  # 74 samples: classes with √n ≤ 2.5 vanish
    model = PeeledModel(COUNTS, dim, loss="mse", constraint="penalty", lambda_w=mu / 2, lambda_h=2 * mu)
    best = mse_optimum(COUNTS, mu / 2, 2 * mu, dim=dim)
    assert int((best.logits.diagonal() > 0).sum()) == alive
    found = min((solve_joint(model, seed=seed) for seed in range(3)), key=lambda solution: solution.value)
    assert found.value == pytest.approx(best.value, abs=1e-12)
    assert distance(found, best) < 1e-7


@pytest.mark.parametrize("lambdas", [(0.02, 0.002), (0.001, 0.03)])
def test_squared_error_agrees_with_dang_s_formulas_for_one_linear_layer(lambdas):
    """As their script has them (M = 1): b/n = 1/(x + 1)², s² = Nλ_H x; WWᵀ = s², HᵀH = s²/(s² + Nλ_H)², WH = s²/(s² + Nλ_H).

    The script scales each by its own norm, so HᵀH is held against it up to a factor.
    """
    lambda_w, lambda_h = lambdas
    total = float(COUNTS.sum())
    b = total * (total * lambda_w * lambda_h)
    s2 = total * lambda_h * ((COUNTS / b).sqrt() - 1).clamp(min=0)
    best = mse_optimum(COUNTS, lambda_w, lambda_h)
    assert torch.allclose(best.vector_gram.diagonal(), s2, rtol=1e-12)
    assert torch.allclose(best.logits.diagonal(), s2 / (s2 + total * lambda_h), rtol=1e-12)
    assert torch.allclose(best.feature_gram.diagonal(), s2 / (s2 + total * lambda_h) ** 2, rtol=1e-12)


def test_features_of_a_relu_have_dang_s_optimum():
    """Orthogonal class means, centred class vectors, and each class gone on its own at n_k = N²λ_Wλ_H K/(K−1)."""
    for smallest_alive, mu in ((9, 2.0 / 74), (4, 1.2 / 74)):
        model = PeeledModel(COUNTS, 12, constraint="penalty", lambda_w=mu / 2, lambda_h=2 * mu, nonnegative=True)
        best = relu_optimum(COUNTS, mu / 2, 2 * mu)
        alive = COUNTS.sqrt() > 74 * mu * math.sqrt(5 / 4)
        assert int(COUNTS[alive].min()) == smallest_alive
        assert torch.equal(best.feature_gram.diagonal() > 0, alive)
        # Unlike without the ReLU there are local minima: two classes on one axis. The best of three starts.
        found = min((solve_joint(model, seed=seed) for seed in range(3)), key=lambda solution: solution.value)
        assert found.value == pytest.approx(best.value, abs=1e-10)
        assert found.gap < 1e-7
        assert distance(found, best) < 1e-6
        # NC3 as their script has it: w_k ∝ K√n_k h_k − Σ_l √n_l h_l.
        scaled = COUNTS.sqrt()[:, None] * found.features
        aligned = torch.nn.functional.cosine_similarity(
            (5 * scaled - scaled.sum(0)).reshape(-1), found.vectors.reshape(-1), 0
        )
        assert float(aligned) == pytest.approx(1.0, abs=1e-8)


@pytest.mark.parametrize(("num_major", "last_open"), [(5, 300), (3, 400)])
def test_hong_and_ling_s_figures_lie_on_both_sides_of_the_threshold(num_major, last_open):
    """K = 10, n_B = 100, l = 0.005: √n_B = N·l puts the threshold at n_A = 300 and 433 (their Figures 7 and 8)."""
    problem = StepProblem(num_major, 10 - num_major, "penalty", penalty=0.005, unit=100.0)
    assert collapse_threshold(problem) == pytest.approx((2000 - 100 * (10 - num_major)) / num_major / 100)
    for n_major in (last_open - 40, last_open + 50):
        counts = torch.tensor([n_major] * num_major + [100] * (10 - num_major), dtype=torch.float64)
        model = PeeledModel(counts, 10, constraint="penalty", lambda_w=0.05, lambda_h=0.0005)
        found = solve_joint(model)
        block = (found.vectors @ found.features.T)[num_major:, num_major:]
        together = float(block.max() - block.min()) < 1e-6 * float((found.vectors @ found.features.T).max())
        assert together == (n_major / 100 >= collapse_threshold(problem))
        assert found.gap < 1e-8


@pytest.mark.parametrize("groups", [(2, 2), (2, 4), (4, 2)])
@pytest.mark.parametrize(
    ("constraint", "size"), [("vector", 0.8), ("vector", 1.6), ("average", 1.2), ("penalty", 0.01), ("penalty", 0.03)]
)
def test_angles_and_thresholds_over_a_grid(groups, constraint, size):
    """The solver knows nothing of groups and thresholds; the theory has four numbers and one root."""
    sizes = {"penalty": size} if constraint == "penalty" else {"scale": size}
    problem = StepProblem(*groups, constraint, **sizes)
    threshold = collapse_threshold(problem)
    k, s, mu = problem.num_classes, problem.scale, problem.penalty
    for factor in (0.8, 1.25):
        counts = class_counts(k, factor * threshold, num_minor=groups[1])
        model = PeeledModel(counts, k, s, s, constraint=constraint, lambda_w=mu, lambda_h=mu)
        found = solve_joint(model, max_iterations=20_000)
        spread = float(torch.pdist(found.vectors[groups[0] :]).max() / found.vectors.norm(dim=1).max())
        assert (spread < 1e-5) == (factor > 1)
        assert found.gap < 1e-8
        expected = minor_cosine(problem, factor * threshold)
        if math.isfinite(expected):
            cosines = off_diagonal(cosine_matrix(found.vectors[groups[0] :]))
            assert torch.allclose(cosines, torch.full_like(cosines, expected), atol=1e-5)


@pytest.mark.parametrize(
    ("groups", "constraint", "size"),
    [((4, 2), "penalty", 0.05), ((2, 2), "penalty", 0.05), ((4, 2), "average", 1.5)],
)
def test_minor_class_vectors_vanish(groups, constraint, size):
    """From `vanishing_threshold` on they are not only equal but zero, and the curve of the angle ends."""
    sizes = {"penalty": size} if constraint == "penalty" else {"scale": size}
    problem = StepProblem(*groups, constraint, **sizes)
    collapse, vanishing = collapse_threshold(problem), vanishing_threshold(problem)
    assert 1 < collapse < vanishing < 100
    for factor in (0.95, 1.05):
        k, s, mu = problem.num_classes, problem.scale, problem.penalty
        counts = class_counts(k, factor * vanishing, num_minor=groups[1])
        model = PeeledModel(counts, k, s, s, constraint=constraint, lambda_w=mu, lambda_h=mu)
        found = solve_joint(model, max_iterations=10_000)
        longest = float(found.vectors[groups[0] :].norm(dim=1).max() / found.vectors.norm(dim=1).max())
        assert (longest < 1e-6) == (factor > 1)
        assert longest > 0.05 or factor > 1
        assert math.isnan(minor_cosine(problem, factor * vanishing)) == (factor > 1)
        assert found.value == pytest.approx(optimal_value(problem, factor * vanishing), abs=1e-9)
    curve = angle_curve(problem, collapse, 3 * vanishing)
    assert curve["ratio"][-1] == vanishing  # nothing is drawn where there is no angle
    assert curve["degrees"][-2:] == [0.0, 0.0]
    assert curve["degrees"] == sorted(curve["degrees"], reverse=True)


def test_vectors_never_vanish_under_large_or_single_budgets():
    assert vanishing_threshold(StepProblem(5, 5, "average", 2.0)) == math.inf
    assert vanishing_threshold(StepProblem(3, 4, "vector")) == math.inf


def test_only_the_penalty_per_root_of_samples_matters():
    """A unit of n_B samples and μ is a unit of one and μ√n_B: in the theory, and for the solver's optimum."""
    one, many = (StepProblem(5, 5, "penalty", penalty=m, unit=u) for m, u in ((0.027, 1.0), (0.0027, 100.0)))
    assert collapse_threshold(one) == pytest.approx(collapse_threshold(many))
    assert vanishing_threshold(one) == pytest.approx(vanishing_threshold(many))
    assert minor_cosine(one, 5.0) == pytest.approx(minor_cosine(many, 5.0), abs=1e-9)
    counts = torch.tensor([500.0] * 5 + [100.0] * 5)
    found = solve_joint(PeeledModel(counts, 10, constraint="penalty", lambda_w=0.027, lambda_h=0.00027))
    assert found.value == pytest.approx(optimal_value(many, 5.0), abs=1e-9)


@pytest.mark.parametrize("constraint", ["vector", "average", "penalty"])
def test_the_reduced_problem_is_well_scaled_for_many_classes(constraint):
    problem = StepProblem(30, 30, constraint, scale=3.0, penalty=1 / 600)
    found = solve_joint(
        PeeledModel(class_counts(60, 5), 60, 3, 3, constraint=constraint, lambda_w=1 / 600, lambda_h=1 / 600)
    )
    assert found.gap < 1e-7
    assert optimal_value(problem, 5.0) == pytest.approx(found.value, abs=1e-8)


def test_minority_collapse_in_the_limit_of_fang():
    """R → ∞ merges the minor class vectors under the class-averaged budget; here from a finite R* on."""
    problem = StepProblem(5, 5, "average", scale=math.sqrt(5))  # E_W = 1, E_H = 5, as their Figure 3
    threshold = collapse_threshold(problem)
    assert minor_cosine(problem, 1.0) == pytest.approx(-1 / 9, abs=1e-8)
    assert [round(minor_cosine(problem, factor * threshold), 6) for factor in (1.01, 10, 1000)] == [1.0] * 3
    assert minor_cosine(problem, 0.99 * threshold) < 0.999


def test_dot_regression_needs_the_frame():
    """With a learned classifier it has no push: equal class vectors and equal features are as good as any."""
    model = PeeledModel(class_counts(5, 10), 6, 2.0, 2.0, loss="dr")
    same = math.sqrt(2) * torch.eye(6, dtype=torch.float64)[:1].expand(5, 6)
    assert float(model.objective(same, same)) == pytest.approx(0.0, abs=1e-30)


def test_thresholds_grow_with_s_and_fall_with_k():
    for constraint in ("vector", "average"):
        by_scale = [collapse_threshold(StepProblem(5, 5, constraint, scale=s)) for s in (1.0, 3.0)]
        assert by_scale == sorted(by_scale)
        by_size = [collapse_threshold(StepProblem(k, k, constraint, scale=2.0)) for k in (50, 5)]
        assert by_size == sorted(by_size)
    assert collapse_threshold(StepProblem(5, 5, "penalty", penalty=0.01)) == pytest.approx(19.0)


# --- the verb --------------------------------------------------------------------------------------------------------


def test_the_verb_prints_json_on_stdout_and_progress_on_stderr(capsys):
    assert main(["peeled", "--classes", "6", "--dim", "8", "--imbalance", "10", "--json"]) == 0
    out, err = capsys.readouterr()
    printed = json.loads(out)
    assert printed["rows"][0]["classifier"] == "learned"
    assert printed["rows"][1]["minor_degrees"] == pytest.approx(math.degrees(math.acos(-1 / 5)), abs=1e-6)
    assert printed["verdict"] is None
    assert "solving" in err
    assert main(["peeled", "--class-counts", "40,9,9,1", "--dim", "2", "--quiet", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out)["rows"][0]["ratio"] == 40
    assert "no simplex frame exists" in json.loads(out)["notes"][1]


def test_the_verb_judges_a_claim_and_draws(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    short = functools.partial(claims.claim_c3, scales=(1.0, 8.0), iterations=500)
    monkeypatch.setattr(claims, "claim_c3", short)
    assert main(["peeled", "--classes", "6", "--dim", "6", "--claim", "c3", "--figures", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "verdict: holds only when s >" in out
    assert "convergence.png" in out
    for name in ("convergence", "race"):
        assert all((tmp_path / f"{name}.{ending}").stat().st_size > 5000 for ending in ("png", "svg", "pdf"))


def test_the_laboratory_draws_a_problem(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from equiframe.peeled import figures

    monkeypatch.setattr(figures, "FORMATS", ("png",))
    monkeypatch.setattr(figures, "features_gif", lambda path, *, loss: path)  # its own test is below
    result = laboratory(num_classes=4, dim=3, ratio=5, figures=tmp_path)
    names = [path.rsplit("/", 1)[1] for path in result["figures"]]
    assert names == ["cosines.png", "angle_ratio.png", "gap.png", "features.gif"]
    assert all((tmp_path / name).stat().st_size > 5000 for name in names[:-1])


def test_closed_forms_are_told(capsys):
    result = laboratory(num_classes=5, dim=6, ratio=20, loss="mse", constraint="penalty")
    assert f"value {result['rows'][0]['value']:.10g}" in result["notes"][1]
    assert "class vectors are zero from R =" in laboratory(num_classes=4, dim=4, constraint="penalty")["notes"][1]
    assert capsys.readouterr().out == ""


def test_minor_classes_of_any_profile():
    assert minor_classes(class_counts(6, 10, num_minor=2)).nonzero()[:, 0].tolist() == [4, 5]
    assert minor_classes(class_counts(9, 10, profile="exp")).nonzero()[:, 0].tolist() == [6, 7, 8]
    assert minor_classes(torch.tensor([5.0, 1.0, 3.0])).nonzero()[:, 0].tolist() == [1, 2]


def test_animation_moves(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    from equiframe.peeled.figures import features_gif

    with image.open(features_gif(tmp_path / "a.gif", frames=3)) as gif:
        assert gif.n_frames == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ratio", "0.5"], "ratio must be a number >= 1"),
        (["--classes", "1"], "at least 2 classes"),
        (["--classes", "ten"], "invalid int value"),
        (["--energy-w", "-1"], "energy_w must be a positive number"),
        (["--loss", "crossentropy"], "unknown loss"),
        (["--constraint", "vektor"], "did you mean 'vector'"),
        (["--profile", "steps"], "did you mean 'step'"),
        (["--claim", "C9"], "unknown claim"),
        (["--claim", "C1", "--dim", "4"], "needs D >= 9"),
        (["--claim", "C1", "--class-counts", "9,9,1,1"], "leave out the class counts"),
        (["--class-counts", "9,many"], "not a list of whole numbers"),
        (["--num-minor", "10"], "minor classes must lie in"),
        (["--dim", "0"], "dim must be at least 1"),
        (["--claim", "C2", "--classes", "4", "--num-minor", "1"], "at least 2 major and 2 minor"),
        (["--ration", "10"], "did you mean '--ratio'"),
    ],
)
def test_bad_input_is_one_clear_line(words, message, capsys):
    assert main(["peeled", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("equiframe: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in err
