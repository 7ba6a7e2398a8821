"""The layer-peeled model: theory as assertions, gradients against autograd, certificates against solutions."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equiframe.errors import InputError
from equiframe.frames import make_frame
from equiframe.peeled import (
    LOSSES,
    METHODS,
    PeeledModel,
    StepProblem,
    claim_c1,
    class_counts,
    class_norms,
    collapse_threshold,
    feature_gap,
    joint_gap,
    make_loss,
    minor_cosine,
    optimal_value,
    push_over_pull,
    run,
    solve_features,
    solve_joint,
    split_gradients,
    theorem1_value,
    track_gradients,
)
from equiframe.peeled.claims import alignment, cosine_matrix, frame_vectors


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
    if loss != "mse":  # mse may end inside the budget, where the solver does not look
        assert joint.gap < 1e-7
    for seed in range(3):
        w = model.project_vectors(model.random_vectors(seed))
        excess = float(model.objective(w, h)) - joint.value
        assert excess <= joint_gap(model, w, h) + 1e-12


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


def test_mse_under_a_penalty_has_a_closed_form():
    """Z = diag(1 − Nμ/√n_k)₊: each class vanishes on its own at n_k = N²λ_Wλ_H."""
    counts = torch.tensor([40.0, 20.0, 9.0, 4.0, 1.0])
    mu = 2.5 / 74  # 74 samples: classes with √n ≤ 2.5 vanish
    model = PeeledModel(counts, 6, loss="mse", constraint="penalty", lambda_w=mu / 2, lambda_h=2 * mu)
    found = solve_joint(model)
    expected = (1 - 2.5 / model.counts.sqrt()).clamp(min=0).diag()
    assert torch.allclose(found.vectors @ found.features.T, expected, atol=1e-7)


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


def test_run_prints_json(capsys):
    result = run(["--classes", "6", "--dim", "8", "--ratio", "10", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["rows"][0]["classifier"] == "learned"
    assert result["rows"][1]["minor_degrees"] == pytest.approx(math.degrees(math.acos(-1 / 5)), abs=1e-6)


def test_run_judges_a_claim_and_draws(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    result = run(["--classes", "6", "--dim", "6", "--claim", "c3", "--out", str(tmp_path)])
    assert result["verdict"].startswith("holds only when s >")
    assert [p.rsplit("/", 1)[1] for p in result["figures"]] == ["convergence.png", "race.png"]
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("convergence.png", "race.png"))
    assert "verdict" in capsys.readouterr().out


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
        (["--minor", "10"], "minor classes must lie in"),
        (["--dim", "0"], "dim must be at least 1"),
        (["--claim", "C2", "--classes", "4", "--minor", "1"], "at least 2 major and 2 minor"),
        (["--nonsense"], "unrecognized arguments"),
    ],
)
def test_bad_input_is_one_clear_line(words, message):
    with pytest.raises(InputError, match=message) as caught:
        run(words)
    assert "\n" not in str(caught.value)
