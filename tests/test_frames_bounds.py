"""Bounds against known optimal codes; optimised codes, embedded frames, and what is told of a frame."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equiframe import CodeFrame, EmbeddedFrame, InputError, KerdockFrame, make_frame
from equiframe.cli import main
from equiframe.frames import (
    describe_frame,
    largest_cosine,
    levenshtein_bound,
    line_bound,
    lower_bound,
    rankin_bound,
    welch_bound,
)
from equiframe.frames.bounds import design_size
from equiframe.frames.embedded import bases_frame, capacity, inner_dim
from equiframe.frames.select import code_limit

SHARP = [  # Cohn & Kumar, Universally optimal distribution of points on spheres (2007), table 1: D, K, largest cosine
    (3, 12, 1 / math.sqrt(5)),
    (5, 16, 1 / 5),
    (6, 27, 1 / 4),
    (7, 56, 1 / 3),
    (8, 240, 1 / 2),
    (21, 162, 1 / 7),
    (22, 100, 1 / 11),
    (22, 275, 1 / 6),
    (22, 891, 1 / 4),
    (23, 552, 1 / 5),
    (23, 4600, 1 / 3),
    (24, 196560, 1 / 2),
]


@pytest.mark.parametrize(("d", "k", "cosine"), SHARP)
def test_sharp_codes_attain_levenshteins_bound(d, k, cosine):
    assert levenshtein_bound(k, d) == pytest.approx(cosine, abs=1e-12)


@pytest.mark.parametrize("d", [2, 3, 4, 7, 16])
def test_levenshteins_bound_grows_with_k_without_a_jump(d):
    values = [levenshtein_bound(k, d) for k in range(2 * d + 1, 500)]
    assert values[0] > 0
    assert all(a < b < 1 for a, b in itertools.pairwise(values))
    assert max(b - a for a, b in itertools.pairwise(values[5:])) < 0.2


def test_designs_and_closed_forms():
    assert [design_size(3, t) for t in range(1, 6)] == [2, 4, 6, 9, 12]
    assert design_size(24, 11) == 196560
    assert levenshtein_bound(9, 2) == pytest.approx(math.cos(2 * math.pi / 9))
    assert welch_bound(16, 6) == pytest.approx(1 / 3)  # 16 equiangular lines in R^6
    assert welch_bound(28, 7) == pytest.approx(1 / 3)
    assert line_bound(120, 8) == pytest.approx(1 / 2)  # E8
    for d in (4, 16, 64, 1024):
        assert line_bound(d * (d + 2) // 2, d) == pytest.approx(d**-0.5)
    assert lower_bound(5, 4) == ("simplex", -0.25)
    assert lower_bound(8, 4) == ("Rankin", 0.0)
    assert lower_bound(3, 1)[1] == 1.0


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (rankin_bound, (5, 4), "K > D\\+1"),
        (welch_bound, (4, 4), "K > D"),
        (levenshtein_bound, (8, 4), "K > 2D"),
        (line_bound, (21, 4), "at most"),
    ],
)
def test_bounds_refuse_what_they_do_not_cover(function, arguments, message):
    with pytest.raises(InputError, match=message):
        function(*arguments)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.integers(2, 40), st.integers(0, 3))
def test_no_frame_beats_its_bound(d, k, seed):
    frame = make_frame(k, d, seed=seed, dtype=torch.float64)
    assert abs(largest_cosine(frame.dense()) - frame.coherence) < 1e-12
    assert frame.coherence >= lower_bound(k, d)[1] - 1e-12


def test_codes_find_known_optima():
    for k, d, best in [(5, 2, math.cos(2 * math.pi / 5)), (12, 3, 1 / math.sqrt(5)), (16, 5, 1 / 5), (27, 6, 1 / 4)]:
        frame = CodeFrame(k, d)
        assert best - 1e-9 <= frame.coherence < best + 1e-3
    assert torch.equal(CodeFrame(20, 5, seed=1).dense(), CodeFrame(20, 5, seed=1).dense())
    assert not torch.equal(CodeFrame(20, 5, seed=1).dense(), CodeFrame(20, 5, seed=2).dense())


@pytest.mark.parametrize(
    ("k", "d"),
    [
        (20, 4),
        (24, 5),
        (120, 8),
        (144, 9),
        (128, 16),
        (144, 17),
        (160, 18),
        (176, 19),
        (200, 20),
        (256, 22),
        (288, 24),
        (200, 48),
    ],
)
def test_a_code_is_taken_where_it_is_better(k, d):
    frame = make_frame(k, d)
    assert frame.geometry == "code"
    assert frame.coherence < bases_frame(k, inner_dim(d)).coherence


def test_a_code_is_left_where_it_is_worse():
    for d in (4, 8, 16, 17, 18, 19, 20, 22):
        k = min(2 * code_limit(d), capacity(inner_dim(d)))
        assert CodeFrame(k, d).coherence > make_frame(k, d).coherence


@pytest.mark.parametrize(("k", "d"), [(600, 40), (300, 20), (100, 5)])
def test_embedded_frame_keeps_the_cosines(k, d):
    if k > capacity(inner_dim(d)):
        with pytest.raises(InputError, match=f"has K <= {capacity(inner_dim(d))}"):
            EmbeddedFrame(k, d)
        return
    frame = EmbeddedFrame(k, d, seed=3, dtype=torch.float64)
    dense = frame.dense()
    torch.testing.assert_close(dense @ dense.T, frame.inner.dense() @ frame.inner.dense().T)
    assert abs(largest_cosine(dense) - frame.coherence) < 1e-12
    x = torch.randn(5, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(frame.logits(x), x @ dense.T)
    torch.testing.assert_close(frame.vectors(torch.tensor([0, k - 1])), dense[[0, k - 1]])
    values, classes = frame.topk(x, 4)
    torch.testing.assert_close(values, (x @ dense.T).topk(4, dim=1).values)
    torch.testing.assert_close(values, (x @ dense.T).gather(1, classes))
    other = EmbeddedFrame(k, d, seed=4, dtype=torch.float64)
    other.load_state_dict(frame.state_dict())
    assert torch.equal(other.dense(), dense)


def test_capacities():
    assert [capacity(inner_dim(d)) for d in (3, 4, 8, 16, 63, 64, 1024)] == [0, 24, 144, 288, 2112, 4224, 1050624]


@pytest.mark.parametrize(("k", "d", "message"), [(1025, 64, "K <= 1024"), (3, 1, "D >= 2")])
def test_codes_have_limits(k, d, message):
    with pytest.raises(InputError, match=message):
        CodeFrame(k, d)


def test_description_tells_bound_and_reason():
    full = describe_frame(KerdockFrame(4224, 64))
    assert full["coherence"] == 0.125
    assert full["bound_name"] == "Levenshtein"
    assert 0.12 < full["bound"] < 0.125
    assert full["optimal"] is False
    assert "no 2112 lines in R^64 have a larger angle" in full["reason"]
    assert full["saved"] == 64
    assert "larger angle" not in describe_frame(KerdockFrame(4000, 64))["reason"]
    assert describe_frame(make_frame(100, 64))["optimal"] is True
    assert describe_frame(make_frame(12, 3))["bound"] == pytest.approx(5**-0.5)
    assert "turned into R^100" in describe_frame(make_frame(1100, 100))["reason"]


def test_frame_verb(capsys):
    assert main(["frame", "1000000", "1024", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["geometry"], told["coherence"], told["saved"]) == ("kerdock", 0.03125, 1024)
    assert main(["frame", "10", "9"]) == 0
    assert "no smaller one is possible" in capsys.readouterr().out
    assert main(["frame", "40", "16", "--geometry", "gold"]) == 2
    assert "gold frame needs D = 8" in capsys.readouterr().err
