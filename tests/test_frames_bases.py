"""The Walsh–Hadamard transform, GF(2^m), Kerdock and Gold frames."""

import io
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard

from equiframe import DotRegression, FrameHead, GoldFrame, InputError, KerdockFrame, make_frame, walsh_hadamard
from equiframe.frames import bases as bases_module
from equiframe.frames import choose_geometry
from equiframe.frames.bases import gold_rows, kerdock_rows
from equiframe.frames.binary import PRIMITIVE, multiply, parity, trace
from equiframe.frames.hadamard import block_bits, hadamard_matrix, walsh_hadamard_peak

F64 = torch.float64


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


# --- transform --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", range(13))
@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 5), (0,)])
def test_transform_is_the_product_with_scipys_matrix(m, lead):
    x = randn(*lead, 2**m)
    expected = x @ torch.tensor(hadamard(2**m), dtype=F64)
    torch.testing.assert_close(walsh_hadamard(x), expected, rtol=0, atol=1e-11)
    block = hadamard_matrix(2 ** block_bits(m)[0], dtype=F64)
    assert torch.equal(walsh_hadamard(x, block), walsh_hadamard(x))


@pytest.mark.parametrize("m", [1, 2, 6, 8, 11])
def test_peak_is_the_largest_product_without_its_sign(m):
    x = randn(2, 3, 2**m)
    kept, expected = x.clone(), walsh_hadamard(x).abs().amax(-1)
    torch.testing.assert_close(walsh_hadamard_peak(x), expected, rtol=0, atol=1e-11)
    assert torch.equal(x, kept)


def test_transform_undoes_itself_and_differentiates():
    x = randn(3, 256)
    torch.testing.assert_close(walsh_hadamard(walsh_hadamard(x)) / 256, x)
    assert torch.autograd.gradcheck(walsh_hadamard, (randn(2, 16).requires_grad_(),))
    x, y = randn(2, 512).requires_grad_(), randn(2, 512, seed=1)
    (walsh_hadamard(x) * y).sum().backward()
    torch.testing.assert_close(x.grad, walsh_hadamard(y))


def test_transform_under_autocast_strides_and_integers():
    x = randn(4, 1024, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(walsh_hadamard(x), walsh_hadamard(x.clone()))
        assert walsh_hadamard(x).dtype == torch.float32
    torch.testing.assert_close(walsh_hadamard(x[:, ::4]), walsh_hadamard(x[:, ::4].contiguous()))
    assert walsh_hadamard(torch.arange(4)).tolist() == [6, -2, -4, 0]


def test_transform_refuses_other_widths():
    with pytest.raises(InputError, match="power of two as width, got 12"):
        walsh_hadamard(torch.zeros(2, 12))


# --- field ------------------------------------------------------------------------------------------------------------


def factors(n):
    return [p for p in range(2, n + 1) if n % p == 0 and all(p % q for q in range(2, math.isqrt(p) + 1))]


def power(m, exponent):
    result, base = torch.tensor(1), torch.tensor(2 if m > 1 else 1)
    while exponent:
        result = multiply(result, base, m) if exponent & 1 else result
        base, exponent = multiply(base, base, m), exponent >> 1
    return int(result)


@pytest.mark.parametrize("m", PRIMITIVE)
def test_polynomials_are_primitive(m):
    """x has order 2^m − 1: so the powers of x are all non-zero elements, and the polynomial is irreducible too."""
    order = 2**m - 1
    assert PRIMITIVE[m] >> m == 1
    assert power(m, order) == 1
    assert all(power(m, order // p) != 1 for p in factors(order) if p <= 5000 or order == p)


def test_multiplication_against_long_division():
    for m in (3, 5):
        for a, b in itertools.product(range(2**m), repeat=2):
            slow = 0
            for i in range(m):
                slow ^= (a << i) * (b >> i & 1)
            for i in reversed(range(m, 2 * m)):
                slow ^= (PRIMITIVE[m] << (i - m)) * (slow >> i & 1)
            assert int(multiply(torch.tensor(a), torch.tensor(b), m)) == slow


@pytest.mark.parametrize("m", [1, 3, 5, 9])
def test_trace_is_additive_balanced_and_fixed_by_squaring(m):
    x = torch.arange(2**m)
    t = trace(x, m)
    assert set(t.tolist()) == {0, 1}
    assert int(t.sum()) == 2 ** (m - 1)
    assert torch.equal(trace(multiply(x, x, m), m), t)
    assert torch.equal(trace(x ^ x.flip(0), m), t ^ t.flip(0))
    assert int(parity(torch.tensor(0b1011))) == 1


def gf2_rank(matrix):
    rows, rank = [int("".join(map(str, row)), 2) for row in matrix], 0
    while rows:
        pivot = rows.pop()
        if pivot:
            rank += 1
            low = pivot & -pivot
            rows = [r ^ pivot if r & low else r for r in rows]
    return rank


@pytest.mark.parametrize(("make", "m", "rank"), [(kerdock_rows, 4, 4), (kerdock_rows, 6, 6), (gold_rows, 5, 4)])
def test_sums_of_forms_have_the_promised_rank(make, m, rank):
    rows = make(m, 2 ** (m - 1) if make is kerdock_rows else 2**m).tolist()
    for s, t in itertools.combinations(range(len(rows)), 2):
        upper = [[(rows[s][j] ^ rows[t][j]) >> i & 1 if i < j else 0 for j in range(m)] for i in range(m)]
        assert gf2_rank([[upper[i][j] ^ upper[j][i] for j in range(m)] for i in range(m)]) == rank


# --- frames -----------------------------------------------------------------------------------------------------------


def slow_vectors(frame):
    """Every vector from the definition: signs, a quadratic form summed term by term, an inner product of digits."""
    d, m = frame.dim, frame.dim.bit_length() - 1
    kerdock = isinstance(frame, KerdockFrame)
    rows = (kerdock_rows if kerdock else gold_rows)(m, frame.num_bases).tolist()
    vectors = []
    for c in range(frame.num_classes):
        basis, j, sign = c // (2 * d), c % d, -1 if c % (2 * d) >= d else 1
        if basis == (d // 2 if kerdock else 1):
            vector = [sign * float(x == j) for x in range(d)]
        else:
            form = rows[basis if kerdock or basis == 0 else basis - 1]
            q = [sum((x >> t & 1) * bin(form[t] & x).count("1") for t in range(m)) for x in range(d)]
            vector = [sign * (-1) ** (q[x] + bin(j & x).count("1")) / math.sqrt(d) for x in range(d)]
        vectors.append(vector)
    return torch.tensor(vectors, dtype=F64) * frame.signs


@pytest.mark.parametrize(("kind", "k", "d"), [(KerdockFrame, 288, 16), (GoldFrame, 144, 8), (GoldFrame, 200, 32)])
def test_vectors_against_the_definition(kind, k, d):
    frame = kind(k, d, seed=5, dtype=F64)
    torch.testing.assert_close(frame.dense(), slow_vectors(frame), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("kind", "k", "d", "coherence"),
    [
        (KerdockFrame, 8, 4, 0.0),
        (KerdockFrame, 24, 4, 1 / 2),
        (KerdockFrame, 288, 16, 1 / 4),
        (KerdockFrame, 33, 16, 1 / 4),
        (KerdockFrame, 4224, 64, 1 / 8),
        (GoldFrame, 144, 8, 1 / 2),
        (GoldFrame, 17, 8, 8**-0.5),
        (GoldFrame, 32, 8, 8**-0.5),
        (GoldFrame, 33, 8, 1 / 2),
        (GoldFrame, 2112, 32, 1 / 4),
    ],
)
def test_coherence_is_exact(kind, k, d, coherence):
    frame = kind(k, d, seed=1, dtype=F64)
    gram = frame.dense() @ frame.dense().T
    torch.testing.assert_close(gram.diagonal(), torch.ones(k, dtype=F64))
    assert abs(gram.fill_diagonal_(-2).max().item() - coherence) < 1e-14
    assert frame.coherence == pytest.approx(coherence, abs=1e-15)


def test_full_kerdock_has_four_cosines_and_sums_to_zero():
    vectors = KerdockFrame(288, 16, dtype=F64).dense()
    gram = (vectors @ vectors.T * 4).round().long()
    values, counts = gram.unique(return_counts=True)
    assert values.tolist() == [-4, -1, 0, 1, 4]
    assert counts.tolist() == [288, 288 * 128, 288 * 30, 288 * 128, 288]  # 30 orthogonal: its own basis but ±itself
    assert vectors.sum(0).abs().max() < 1e-12
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(16, dtype=F64) * 288 / 16)  # tight


@pytest.mark.parametrize(
    ("kind", "d", "allowed"), [(KerdockFrame, 256, {1.0}), (GoldFrame, 128, {0.0, 2.0}), (KerdockFrame, 1024, {1.0})]
)
def test_pairs_of_wide_bases(kind, d, allowed):
    """D·cos² between vectors of sampled pairs of bases: all 1 (unbiased), or 0 and 2; 1 with the standard basis."""
    full = d * d + 2 * d if kind is KerdockFrame else 2 * d * d + 2 * d
    frame = kind(full, d, seed=2, dtype=F64)
    standard = d // 2 if kind is KerdockFrame else 1
    for i, (s, t) in enumerate(
        [(0, standard), (standard, 7), (0, frame.num_bases - 2), (3, 5), (9, d // 2 - 1), (2, 3)]
    ):
        first = frame.vectors(2 * d * s + torch.arange(d))
        second = frame.vectors(2 * d * t + torch.arange(40 * i, 40 * i + 30) % d + d)
        if i < 2:
            torch.testing.assert_close(first @ first.T, torch.eye(d, dtype=F64))
        found = set(((first @ second.T) ** 2 * d).round(decimals=9).unique().tolist())
        assert found == ({1.0} if standard in (s, t) else allowed)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_frame_equals_its_dense_twin(data):
    d = data.draw(st.sampled_from([4, 8, 16, 32]))
    kind, most = (KerdockFrame, d * d + 2 * d) if d in (4, 16) else (GoldFrame, 2 * d * d + 2 * d)
    k_classes = data.draw(st.integers(2, min(most, 700)))
    chunk = data.draw(st.sampled_from([1, 100, 1000, 10**6]))
    top = data.draw(st.integers(1, min(k_classes, 40)))
    frame = kind(k_classes, d, seed=data.draw(st.integers(0, 5)), dtype=F64)
    x = randn(data.draw(st.integers(0, 4)), d, seed=data.draw(st.integers(0, 99))).requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bases_module._CHUNK, "cpu", chunk)
        dense = frame.dense()
        logits = frame.logits(x)
        torch.testing.assert_close(logits, x @ dense.T, rtol=0, atol=1e-13)
        values, classes = frame.topk(x, top)
    torch.testing.assert_close(values, (x @ dense.T).topk(top, dim=1).values, rtol=0, atol=1e-13)
    torch.testing.assert_close(values, (x @ dense.T).gather(1, classes), rtol=0, atol=1e-13)
    assert all(len(set(row)) == top for row in classes.tolist())
    weight = randn(*logits.shape, seed=3)
    (logits * weight).sum().backward()
    torch.testing.assert_close(x.grad, weight @ dense, rtol=0, atol=1e-12)
    if d in (4, 16) and k_classes > 2 * d:  # gaps between classes make the order exact too
        assert torch.equal(classes[:, :1], (x @ dense.T).topk(1, dim=1).indices)


def test_topk_differentiates_and_bounds_k():
    frame = KerdockFrame(200, 16, dtype=F64)
    x = randn(3, 16).requires_grad_()
    values, classes = frame.topk(x, 3)
    values.sum().backward()
    torch.testing.assert_close(x.grad, frame.dense()[classes].sum(1))
    for k in (0, 201):
        with pytest.raises(InputError, match=r"k must be in 1 … 200"):
            frame.topk(x, k)


def test_zero_features_tie_everywhere_and_still_name_classes():
    values, classes = KerdockFrame(100, 16).topk(torch.zeros(2, 16), 5)
    assert values.abs().max() == 0
    assert int(classes.max()) < 100
    assert all(len(set(row)) == 5 for row in classes.tolist())


def test_classes_keep_their_vectors_when_more_come():
    few, many = KerdockFrame(100, 64, seed=4), KerdockFrame(4224, 64, seed=4)
    assert torch.equal(few.dense(), many.vectors(torch.arange(100)))


def test_seed_state_dict_and_dtype():
    first, second = KerdockFrame(4224, 64, seed=0), KerdockFrame(4224, 64, seed=9)
    assert not torch.equal(first.dense(), second.dense())
    assert {name: tuple(v.shape) for name, v in first.state_dict().items()} == {"signs": (64,)}
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.dense(), second.dense())
    features = randn(5, 64)
    assert torch.equal(first.double().topk(features, 1)[1], second.double().topk(features, 1)[1])
    half = KerdockFrame(288, 16).half()
    assert half.dtype == half.dense().dtype == half.logits(features[:, :16].half()).dtype == torch.float16
    assert torch.equal(half.dense().double(), KerdockFrame(288, 16, dtype=F64).dense())  # ±1/4: no rounding
    assert list(first.parameters()) == []


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    KerdockFrame(100, 16, seed=3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("target", [-1, 100])
def test_targets_out_of_range(target):
    with pytest.raises(IndexError, match=r"targets must be in 0 … 99"):
        KerdockFrame(100, 16).vectors(torch.tensor([0, target]))


@pytest.mark.parametrize(
    ("kind", "k", "d", "message"),
    [
        (KerdockFrame, 289, 16, r"D=16 dimensions has K <= 288, got K=289"),
        (GoldFrame, 145, 8, "K <= 144"),
        (KerdockFrame, 100, 32, r"kerdock frame needs D = 4, 16, 64"),
        (GoldFrame, 100, 64, "gold frame needs D = 8, 32"),
        (KerdockFrame, 100, 48, "got D=48"),
        (GoldFrame, 3, 2, "got D=2"),
        (KerdockFrame, 1, 16, "at least 2 classes"),
    ],
)
def test_impossible_sizes(kind, k, d, message):
    with pytest.raises(InputError, match=message):
        kind(k, d)


# --- in a head --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "d"), [(600, 64), (600, 32), (600, 40), (70, 16)])
def test_head_reloads_compiles_and_ignores_autocast(k, d):
    assert choose_geometry(k, d) in ("kerdock", "gold", "embedded", "code")
    head = FrameHead(d, k, logit_scale=8.0, norm="none", seed=1)
    x, targets = randn(4, d, dtype=torch.float32), torch.tensor([0, 1, k - 1, 5])
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    file.seek(0)
    other = FrameHead(d, k, logit_scale=8.0, norm="none", seed=2)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x).logits, head(x).logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(x).logits, other(x).logits)
        loss = DotRegression()(head(x), targets)
    torch.testing.assert_close(loss, DotRegression()(head(x), targets), rtol=0, atol=0)

    def both(x):
        return head(x).logits, DotRegression()(head(x), targets), head.frame.topk(head(x).features, 3)

    compiled = torch.compile(both, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), both(x))


def test_dot_regression_never_makes_logits_of_a_million_classes():
    head = FrameHead(1024, 1_000_000, logit_scale=1.0, norm="none")
    x = randn(2, 1024, dtype=torch.float32).requires_grad_()
    targets = torch.tensor([7, 999_999])
    DotRegression()(head(x), targets).backward()
    vectors, h = head.frame.vectors(targets), torch.nn.functional.normalize(x.detach(), dim=1)
    cosines = (h * vectors).sum(1, keepdim=True)
    pull = -(1 - cosines) * (vectors - cosines * h) / x.detach().norm(dim=1, keepdim=True) / 2
    torch.testing.assert_close(x.grad, pull, rtol=1e-4, atol=1e-8)
    values, classes = head.frame.topk(vectors, 1)
    assert classes.flatten().tolist() == targets.tolist()
    torch.testing.assert_close(values, torch.ones(2, 1))


def test_auto_takes_these_frames():
    assert isinstance(make_frame(1000, 64), KerdockFrame)
    assert isinstance(make_frame(2000, 128), GoldFrame)
