"""Theorem 2 and angular regression: orders of convergence within 10 % of theory, curvatures, safe gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equiframe.frames import simplex_vectors
from equiframe.peeled import angular_regression, cosine_regression
from equiframe.peeled.convergence import (
    CONTENDERS,
    break_even_scale,
    curvature_at_optimum,
    descend,
    largest_curvature,
    measured_contraction,
    measured_order,
    slope,
)
from equiframe.peeled.solve import great_circle

SCALES = torch.tensor([1.0, 4.0, 8.0, 16.0], dtype=torch.float64)


def dr(h, w, s):
    return s / 2 * (1 - (h * w).sum(-1)) ** 2


def loss_value(name, h, frame, target, s):
    """Losses on the unit sphere, as they are written in books."""
    if name == "ce":
        return torch.nn.functional.cross_entropy((s * h @ frame.T)[None], torch.tensor([target]))
    w = frame[target]
    return {
        "dr": dr,
        "angular": lambda h, w, s: angular_regression(h, w, scale=s),
        "cosine": lambda h, w, s: s * (1 - h @ w),
    }[name](h, w, s)


def plane(frame, away):
    """Own class vector, and the unit tangent towards (or away from) class 1."""
    other = frame[1] if len(frame) > 2 else torch.eye(frame.shape[1], dtype=frame.dtype)[0]  # K = 2: any direction
    u = other - (other @ frame[0]) * frame[0]
    return frame[0], (-1 if away else 1) * u / u.norm()


@pytest.mark.parametrize("away", [False, True])
@pytest.mark.parametrize("num_classes", [2, 3, 10])
@pytest.mark.parametrize("loss", CONTENDERS)
def test_slopes_are_those_of_autograd(loss, num_classes, away):
    frame = simplex_vectors(num_classes, 12)
    w, u = plane(frame, away)
    for scale in (1.0, 8.0):
        for angle in (1e-3, 0.4, 1.5, 2.5):
            theta = torch.tensor(angle, dtype=torch.float64, requires_grad=True)
            value = loss_value(loss, torch.cos(theta) * w + torch.sin(theta) * u, frame, 0, scale)
            (expected,) = torch.autograd.grad(value, theta)
            found = slope(loss, theta.detach(), scale, num_classes, away=away)
            assert float(found) == pytest.approx(float(expected), rel=1e-8, abs=1e-13)


@pytest.mark.parametrize("loss", CONTENDERS)
@pytest.mark.parametrize("scale", [1.0, 4.0, 8.0, 16.0])
def test_riemannian_hessian_at_the_optimum(loss, scale):
    """From autograd along geodesics: K q s(1 + s/(K−1)) in the span of the frame, K q s outside of it, 0 for DR."""
    frame = simplex_vectors(10, 12)
    w, u = plane(frame, False)
    outside = torch.linalg.svd(frame)[2][-1]
    q = 1 / (math.exp(scale * 10 / 9) + 9)
    for direction, expected in ((u, curvature_at_optimum(loss, scale, 10)), (outside, 10 * q * scale)):
        if direction is outside and loss != "ce":
            expected = curvature_at_optimum(loss, scale, 10)
        theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
        value = loss_value(loss, torch.cos(theta) * w + torch.sin(theta) * direction, frame, 0, scale)
        (first,) = torch.autograd.grad(value, theta, create_graph=True)
        (second,) = torch.autograd.grad(first, theta)
        assert float(second) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("start", [0.3, 0.8, 1.68])
@pytest.mark.parametrize("step", [0.02, 0.05])
def test_dot_regression_is_sublinear_of_order_one_half(start, step):
    marks, theta = descend(
        "dr", SCALES, num_classes=10, step=step, start=start, iterations=8000 if step < 0.05 else 4000
    )
    for i, scale in enumerate(SCALES.tolist()):
        if step * scale * int(marks[-1]) * start**2 < 200:
            continue  # not yet in the tail
        assert measured_order(marks, theta[:, i]) == pytest.approx(-0.5, rel=0.1)
        assert float(theta[-1, i]) == pytest.approx((step * scale * int(marks[-1])) ** -0.5, rel=0.1)


@pytest.mark.parametrize("loss", ["ce", "angular", "cosine"])
@pytest.mark.parametrize("step", [0.01, 0.1])
def test_the_others_are_linear_at_the_rate_of_their_hessian(loss, step):
    """Each loss is run where it is small enough to be local; the measured contraction is within 10 % of η·Hessian."""
    marks, theta = descend(loss, SCALES, num_classes=10, step=step / SCALES, start=0.004, iterations=400)
    for i, scale in enumerate(SCALES.tolist()):
        expected = -math.log1p(-step / scale * curvature_at_optimum(loss, scale, 10))
        measured = float(torch.log(theta[0, i] / theta[-1, i])) / int(marks[-1])
        assert measured == pytest.approx(expected, rel=0.1)
        assert measured_contraction(loss, scale=scale, num_classes=10, step=step) == pytest.approx(
            step * curvature_at_optimum(loss, scale, 10), rel=0.01
        )


def test_the_order_check_can_fail():
    """A linear method does not pass for one of order one half."""
    marks, theta = descend("angular", SCALES, num_classes=10, step=0.01 / SCALES, start=0.8, iterations=1000)
    assert abs(measured_order(marks, theta[:, 0]) + 0.5) > 0.5


@pytest.mark.parametrize("loss", ["ce", "dr"])
def test_the_plane_map_is_riemannian_gradient_descent_in_full(loss):
    frame = simplex_vectors(6, 9)
    w, u = plane(frame, False)
    h = (math.cos(1.2) * w + math.sin(1.2) * u)[None]
    for _ in range(50):
        x = h[0].clone().requires_grad_(True)
        (g,) = torch.autograd.grad(loss_value(loss, x, frame, 0, 3.0), x)
        h = great_circle(h, -0.1 * (g - (g @ h[0]) * h[0])[None])
    marks, theta = descend(loss, torch.tensor([3.0]), num_classes=6, step=0.1, start=1.2, iterations=50)
    assert int(marks[-1]) == 50
    assert float(2 * torch.asin((h[0] - w).norm() / 2)) == pytest.approx(float(theta[-1, 0]), rel=1e-9)


def test_known_curvatures_and_the_break_even_scale():
    assert largest_curvature("dr", 3.0, 10, 1.6) == pytest.approx(9 / 8 * 3.0, rel=1e-4)
    assert largest_curvature("angular", 3.0, 10, 1.6) == pytest.approx(3.0, rel=1e-6)
    start = math.acos(-1 / 9)
    even = [break_even_scale(t, num_classes=10, start=start) for t in (0.1, 0.05)]
    assert even == sorted(even)  # the finer the target, the larger s must be for dot regression to win
    for scale, winner in ((even[1] * 1.3, "dr"), (even[1] / 1.3, "ce")):
        steps = {}
        for loss in ("ce", "dr"):
            marks, theta = descend(loss, torch.tensor([scale]), num_classes=10, step=0.03, start=start, iterations=2000)
            below = (theta[:, 0] <= 0.05).nonzero()
            steps[loss] = int(marks[below[0]]) if len(below) else math.inf
        assert min(steps, key=steps.get) == winner


def test_polyak_steps_make_dot_regression_linear():
    """Step L/‖∇L‖² (the optimum is known to be 0): θ ← ¾θ near it."""
    theta = torch.tensor(0.05, dtype=torch.float64)
    value = 0.5 * (2 * torch.sin(theta / 2) ** 2) ** 2
    later = theta - value / slope("dr", theta, 1.0, 10)
    assert float(later / theta) == pytest.approx(0.75, rel=1e-2)


# --- angular regression ----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-9, math.pi - 1e-6), st.floats(0.1, 20), st.floats(1e-3, 1e3), st.integers(2, 9), st.integers(0, 99))
def test_angular_regression_value_and_gradient(angle, scale, length, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]
    w, u = basis[:, 0], basis[:, 1]
    unit = math.cos(angle) * w + math.sin(angle) * u
    h = (length * unit).requires_grad_(True)
    value = angular_regression(h[None], 3 * w[None], scale=scale)
    assert value.shape == (1,)
    assert float(value.detach()[0]) == pytest.approx(scale * angle**2 / 2, rel=1e-6)
    (g,) = torch.autograd.grad(value.sum(), h)
    across = -math.sin(angle) * w + math.cos(angle) * u  # away from w, along the sphere
    assert torch.allclose(g, scale * angle / length * across, rtol=1e-5, atol=1e-6 * scale / length)
    # Pull only: −∇ is the tangent part of +w_c, nothing else.
    tangent = w - (w @ unit) * unit
    assert float(g @ tangent) <= 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_angular_gradients_are_finite_at_both_poles_and_at_zero(dtype):
    w = torch.eye(4, dtype=dtype)[:1]
    for feature in (w, -w, 0 * w, w + 1e-6, -w + 1e-6):
        h = feature.to(dtype).requires_grad_(True)
        for loss in (angular_regression, cosine_regression):
            value = loss(h, w)
            (g,) = torch.autograd.grad(value.sum(), h)
            assert bool(torch.isfinite(value).all())
            assert bool(torch.isfinite(g).all())
            assert float(value.detach()[0]) <= math.pi**2 / 2 + 1e-3
    h = w.clone().requires_grad_(True)
    assert not torch.autograd.grad(angular_regression(h, w).sum(), h)[0].any()


def test_angular_series_meets_the_exact_branch_and_gradcheck_passes():
    w = torch.eye(3, dtype=torch.float64)[:1]
    for chord in (0.0316227, 0.0316229):  # the switch is at a squared chord of 1e-3
        angle = 2 * math.asin(chord / 2)
        h = torch.tensor([[math.cos(angle), math.sin(angle), 0.0]], dtype=torch.float64, requires_grad=True)
        assert float(angular_regression(h, w).detach()[0]) == pytest.approx(angle**2 / 2, rel=1e-12)
        assert torch.autograd.gradcheck(lambda x: angular_regression(x, w, scale=2.0), h)
    far = torch.tensor([[0.3, -0.4, 1.2], [-0.9, 0.1, 0.1]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: angular_regression(x, w.expand(2, 3)), far)
    assert torch.autograd.gradgradcheck(lambda x: angular_regression(x, w.expand(2, 3)), far)


@pytest.mark.parametrize("scale", [1.0, 4.0, 8.0, 16.0])
def test_angular_regression_contracts_exactly_from_anywhere(scale):
    """A step η on the unit sphere turns θ into (1 − ηs)θ, up to next to the antipode, in every dimension."""
    frame = simplex_vectors(5, 8)
    generator = torch.Generator().manual_seed(3)
    h = torch.nn.functional.normalize(torch.randn(200, 8, generator=generator, dtype=torch.float64), dim=1)
    h[0] = torch.nn.functional.normalize(-frame[0] + 1e-4 * frame[1], dim=0)
    w = frame[torch.arange(200) % 5]
    angle = 2 * torch.atan2((h - w).norm(dim=1), (h + w).norm(dim=1))
    for _ in range(20):
        x = h.clone().requires_grad_(True)
        (g,) = torch.autograd.grad(angular_regression(x, w, scale=scale).sum(), x)
        h = great_circle(h, -(0.3 / scale) * (g - (g * h).sum(1, keepdim=True) * h))
    later = 2 * torch.atan2((h - w).norm(dim=1), (h + w).norm(dim=1))
    assert torch.allclose(later, 0.7**20 * angle, rtol=1e-6)


def test_float32_dot_regression_goes_blind_where_angular_regression_still_sees():
    """At θ = 1e-4 the cosine rounds to 1 in float32: DR's gradient is 0 there, the angular one is θ to 1 %."""
    theta = 1e-4
    w = torch.tensor([[1.0, 0.0]])
    h = torch.tensor([[math.cos(theta), math.sin(theta)]])
    grads = {}
    for name, loss in (("dr", lambda x: dr(x, w, 1.0)), ("angular", lambda x: angular_regression(x, w))):
        x = h.clone().requires_grad_(True)
        (grads[name],) = torch.autograd.grad(loss(x).sum(), x)
    assert float(grads["dr"].norm()) == 0.0
    assert float(grads["angular"].norm()) == pytest.approx(theta, rel=0.01)
