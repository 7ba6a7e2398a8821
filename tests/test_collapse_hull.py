"""One-vs-rest distances against closed forms and against SciPy's non-negative least squares."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from equiframe.collapse import min_norm_point, one_vs_rest_distances
from equiframe.errors import InputError
from equiframe.frames import OrthoplexFrame, simplex_vectors


def by_nnls(points):
    """Least norm in a hull: NNLS of [Pᵀ; 1ᵀ] α = [0; 1], then α / Σα (Lawson & Hanson, least distance)."""
    scale = np.linalg.norm(points, axis=1).max()
    weights, _ = nnls(np.vstack([points.T / scale, np.ones(len(points))]), np.append(np.zeros(points.shape[1]), 1.0))
    return np.linalg.norm((weights / weights.sum()) @ points)


@pytest.mark.parametrize(("num", "dim"), [(6, 2), (12, 3), (40, 8), (30, 29), (10, 20)])
@pytest.mark.parametrize("unit", [True, False])
def test_as_nnls(num, dim, unit):
    w = np.random.default_rng(num).normal(size=(num, dim))
    w = w / np.linalg.norm(w, axis=1, keepdims=True) if unit else w
    expected = [by_nnls(np.delete(w, k, axis=0) - w[k]) for k in range(num)]
    np.testing.assert_allclose(one_vs_rest_distances(torch.from_numpy(w)), expected, rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize(("num_classes", "dim"), [(2, 1), (3, 2), (10, 16), (50, 49)])
def test_simplex(num_classes, dim):
    distances = one_vs_rest_distances(simplex_vectors(num_classes, dim))
    np.testing.assert_allclose(distances, num_classes / (num_classes - 1), rtol=1e-12)
    points = simplex_vectors(num_classes, dim).numpy()  # the programme itself, without the closed form
    assert np.linalg.norm(min_norm_point(points[1:] - points[0])) == pytest.approx(num_classes / (num_classes - 1))


@pytest.mark.parametrize("dim", [2, 3, 16])
def test_orthoplex(dim):
    frame = OrthoplexFrame(2 * dim, dim, dtype=torch.float64).dense()
    np.testing.assert_allclose(one_vs_rest_distances(frame), 1, rtol=1e-12)


def test_polygon_and_points_inside():
    turns = 2 * math.pi * torch.arange(9, dtype=torch.float64) / 9
    polygon = torch.stack([turns.cos(), turns.sin()], 1)
    np.testing.assert_allclose(one_vs_rest_distances(polygon), 1 - math.cos(2 * math.pi / 9), rtol=1e-10)
    inside = torch.cat([polygon, torch.tensor([[0.1, 0.2]], dtype=torch.float64)])
    distances = one_vs_rest_distances(inside)
    assert distances[-1] < 1e-6
    assert one_vs_rest_distances(inside, classes=[9, 0]) == pytest.approx([float(distances[9]), float(distances[0])])


def test_repeated_and_flat_points():
    twice = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0], [-1, -1, 0]])
    assert one_vs_rest_distances(twice)[:4].abs().max() < 1e-7
    assert one_vs_rest_distances(twice)[4] == pytest.approx(math.hypot(1.5, 1.5))


def test_needs_two():
    with pytest.raises(InputError, match="K >= 2"):
        one_vs_rest_distances(torch.ones(1, 3))
