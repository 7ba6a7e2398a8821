import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equiframe import InputError, OrthoplexFrame, SimplexFrame, make_frame, nearest_simplex, simplex_vectors
from equiframe.frames import choose_geometry, haar_columns
from equiframe.frames.simplex import helmert

SIZES = [(2, 1), (2, 5), (3, 2), (10, 9), (10, 10), (10, 64), (100, 99), (100, 128), (500, 512)]


def simplex_gram(k: int) -> torch.Tensor:
    return torch.eye(k, dtype=torch.float64) * k / (k - 1) - 1 / (k - 1)


@pytest.mark.parametrize(("k", "d"), SIZES)
@pytest.mark.parametrize("seed", [0, 7])
def test_simplex_gram_matrix_is_exact(k, d, seed):
    vectors = simplex_vectors(k, d, seed=seed)
    assert vectors.shape == (k, d)
    assert vectors.dtype == torch.float64
    torch.testing.assert_close(vectors @ vectors.T, simplex_gram(k), rtol=0, atol=1e-12)
    assert vectors.sum(0).abs().max() < 1e-12


@given(st.integers(2, 40), st.integers(0, 30), st.integers(0, 2**31))
def test_simplex_for_every_dimension_from_k_minus_1(k, extra, seed):
    vectors = simplex_vectors(k, k - 1 + extra, seed=seed)
    torch.testing.assert_close(vectors @ vectors.T, simplex_gram(k), rtol=0, atol=1e-12)


def test_the_check_can_fail():
    wrong = simplex_vectors(10, 16, seed=0)
    wrong[3] = -wrong[3]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(wrong @ wrong.T, simplex_gram(10), rtol=0, atol=1e-12)


def test_helmert_against_the_textbook():
    for k in (2, 3, 8):
        slow = np.zeros((k, k - 1))
        for j in range(1, k):
            for i in range(j):
                slow[i, j - 1] = 1 / math.sqrt(j * (j + 1))
            slow[j, j - 1] = -j / math.sqrt(j * (j + 1))
        np.testing.assert_allclose(helmert(k).numpy(), slow, atol=1e-15)


def test_rotation_is_haar_and_not_the_authors():
    """First entry of a Haar column: E[q²] = 1/d, and its sign is even. The authors' QR of uniform numbers fails both:
    its first column is about the all-ones direction (|<1/√d, m_0>| ≈ 0.8 instead of ≈ 0.1)."""
    d = 16
    columns = torch.stack([haar_columns(d, 3, seed=s)[:, 0] for s in range(2000)])
    ones = torch.ones(d, dtype=torch.float64) / math.sqrt(d)
    along = columns @ ones
    assert abs(along.mean()) < 4 / math.sqrt(2000 * d)
    assert abs((along**2).mean() * d - 1) < 0.15
    uniform = torch.stack([torch.linalg.qr(torch.rand(d, 3, dtype=torch.float64))[0][:, 0] for _ in range(50)])
    assert (uniform @ ones).abs().mean() > 0.7


def test_seed_is_the_frames_own():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = simplex_vectors(5, 8, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, simplex_vectors(5, 8, seed=3))
    assert not torch.equal(first, simplex_vectors(5, 8, seed=4))


@pytest.mark.parametrize(("k", "d"), [(3, 2), (4, 2), (100, 64), (128, 64), (10, 64)])
def test_orthoplex_is_optimal(k, d):
    frame = OrthoplexFrame(k, d, dtype=torch.float64)
    gram = frame.dense() @ frame.dense().T
    torch.testing.assert_close(gram.diagonal(), torch.ones(k, dtype=torch.float64))
    off = gram - torch.eye(k, dtype=torch.float64) * gram.diagonal()
    assert off.max() < 1e-12
    assert frame.coherence == 0.0


@pytest.mark.parametrize(
    ("k", "d", "geometry"), [(10, 64, "auto"), (100, 64, "auto"), (2, 1, "simplex"), (8, 4, "orthoplex")]
)
def test_every_frame_equals_its_dense_twin(k, d, geometry):
    frame = make_frame(k, d, geometry=geometry, seed=1, dtype=torch.float64)
    dense = frame.dense()
    features = torch.randn(6, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.tensor([0, 1, k - 1, 0, 1, 1])
    assert torch.equal(frame.vectors(targets), dense[targets])
    torch.testing.assert_close(frame.logits(features), features @ dense.T)
    values, classes = frame.topk(features, 2)
    expected = (features @ dense.T).topk(2, dim=1)
    torch.testing.assert_close(values, expected.values)
    assert torch.equal(classes, expected.indices)
    gram = dense @ dense.T - 2 * torch.eye(k, dtype=torch.float64)
    assert abs(gram.max().item() - frame.coherence) < 1e-12
    frame.logits(features).sum().backward()
    torch.testing.assert_close(features.grad, dense.sum(0).expand(6, -1))
    assert list(frame.parameters()) == []


def test_choice_of_geometry():
    assert choose_geometry(65, 64) == "simplex"
    assert choose_geometry(66, 64) == "orthoplex"
    assert choose_geometry(128, 64) == "orthoplex"
    assert choose_geometry(129, 64) == "code"
    assert choose_geometry(513, 64) == "kerdock"
    assert choose_geometry(1024, 128) == choose_geometry(1024, 100) == "code"
    assert choose_geometry(1025, 128) == "gold"
    assert choose_geometry(1025, 100) == choose_geometry(200, 17) == "embedded"
    assert choose_geometry(1024, 5) == "code"
    assert choose_geometry(1_000_000, 1024) == "kerdock"
    for k, d, message in [
        (4225, 64, r"widen to D >= 128 \(gold\) or D >= 2113 \(orthoplex\)"),
        (1025, 3, r"widen to D >= 32 \(gold\)"),
        (3, 1, r"widen to D >= 2"),
        (10**12, 64, r"widen to D >= 500000000000 \(orthoplex\)"),
    ]:
        with pytest.raises(InputError, match=message):
            choose_geometry(k, d)


@pytest.mark.parametrize(
    ("k", "d", "message"),
    [
        (1, 5, "at least 2 classes"),
        (0, 5, "at least 2 classes"),
        (10, 8, r'needs D >= 9, got D=8; use geometry="orthoplex" \(K <= 16\) or widen'),
        (100, 8, r"needs D >= 99, got D=8; widen \(an orthoplex needs D >= 50\)"),
        (10.0, 16, "num_classes must be a whole number, got 10.0"),
        (10, "16", "dim must be a whole number"),
        (True, 16, "num_classes must be a whole number"),
        (2, 0, "dim >= 1"),
    ],
)
def test_impossible_sizes(k, d, message):
    with pytest.raises(InputError, match=message):
        SimplexFrame(k, d)


def test_numpy_integers_are_whole_numbers():
    assert SimplexFrame(np.int64(3), np.int32(4)).num_classes == 3


def test_unknown_geometry_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'simplex'"):
        make_frame(3, 4, geometry="simplx")


def test_state_dict_wins_over_the_seed_and_dtype_moves():
    first, second = SimplexFrame(10, 16, seed=0), SimplexFrame(10, 16, seed=99)
    assert not torch.equal(first.dense(), second.dense())
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.dense(), second.dense())
    assert first.half().dense().dtype == torch.float16
    assert first.to(torch.float64).dtype == torch.float64


# --- the nearest simplex ----------------------------------------------------------------------------------------------


def misfit(vectors, frame):
    """‖Y − 1bᵀ − tW‖ with the best shift b and factor t ≥ 0."""
    y = vectors - vectors.mean(0)
    t = ((y * frame).sum() / (frame * frame).sum()).clamp_min(0)
    return (y - t * frame).norm()


@given(st.integers(2, 8), st.integers(0, 5), st.integers(0, 1000))
def test_no_simplex_is_nearer_than_the_nearest(k, more, seed):
    d = k - 1 + more
    vectors = torch.randn(k, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    nearest = nearest_simplex(vectors)
    gram = k / (k - 1) * torch.eye(k, dtype=torch.float64) - 1 / (k - 1)
    torch.testing.assert_close(nearest @ nearest.T, gram)
    best = misfit(vectors, nearest)
    for other in range(20):
        assert best <= misfit(vectors, simplex_vectors(k, d, seed=other)) + 1e-9
    generator = torch.Generator().manual_seed(seed)
    for _ in range(20):  # and none beside it: small rotations only make it worse
        turn = 0.05 * torch.randn(d, d, dtype=torch.float64, generator=generator)
        assert best <= misfit(vectors, nearest @ torch.matrix_exp(turn - turn.T)) + 1e-9


def test_nearest_simplex_moves_with_its_vectors():
    vectors = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    nearest = nearest_simplex(vectors)
    rotation = haar_columns(7, 7, seed=3)
    shift = torch.arange(7.0)
    torch.testing.assert_close(nearest_simplex(3 * vectors @ rotation + shift), nearest @ rotation)
    torch.testing.assert_close(nearest_simplex(vectors.flip(0)), nearest.flip(0))
    frame = simplex_vectors(5, 7, seed=1)
    torch.testing.assert_close(nearest_simplex(0.2 * frame + shift), frame)


def test_nearest_simplex_is_the_trust_regions_solution():
    """The problem as Markou et al. state it, over D × K matrices P, descended by many small steps: the same frame."""
    k, d, delta = 4, 6, 1e-3
    means = torch.randn(k, d, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    previous = simplex_vectors(k, d, seed=5)
    centred = (means - means.mean(0)).T
    y, m = centred / centred.norm(), torch.eye(k, dtype=torch.float64) - 1 / k
    scale = math.sqrt(k / (k - 1))
    prox = previous.T @ m / scale
    p = haar_columns(d, k, seed=7)
    for _ in range(3000):  # projected gradient on the Stiefel manifold
        gradient = 2 / (k - 1) * p @ m - 2 / math.sqrt(k - 1) * y @ m + delta * (p - prox)
        u, _, vh = torch.linalg.svd(p - 0.5 * gradient, full_matrices=False)
        p = u @ vh
    nearest = nearest_simplex(means, previous=previous, proximity=delta)
    torch.testing.assert_close(scale * (p @ m).T, nearest, atol=1e-5, rtol=0)


def test_nearest_simplex_stays_where_the_vectors_say_nothing():
    frame = simplex_vectors(6, 8, seed=0)
    silent = torch.ones(6, 8, dtype=torch.float64)
    torch.testing.assert_close(nearest_simplex(silent, previous=frame), frame, atol=1e-5, rtol=0)
    known = frame.clone()
    known[3:] = known[:3].mean(0)  # three classes in their places, three without any
    torch.testing.assert_close(nearest_simplex(known, previous=frame)[:3], frame[:3], atol=1e-2, rtol=0)
    with pytest.raises(InputError, match="needs D >= 5, got D=4"):
        nearest_simplex(torch.ones(6, 4))
