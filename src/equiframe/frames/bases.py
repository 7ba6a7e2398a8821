r"""Kerdock and Gold frames: up to a million classes and more in D = 2^m dimensions, computed where they are needed.

A frame is a list of orthonormal bases and their negatives. Basis s has the vectors

.. math:: m_{s,j}(x) = \frac{1}{\sqrt D}\,\sigma(x)\,(-1)^{q_s(x) + \langle j, x\rangle}, \qquad x, j \in \mathrm{GF}(2)^m,

with σ random signs (the seed) and :math:`q_s(x) = \sum_{i<t} A^s_{it} x_i x_t` a quadratic form whose alternating matrix A^s is

- m even (Kerdock; Calderbank, Cameron, Kantor & Seidel 1997), for (x, a), (y, b) ∈ GF(2^{m−1}) × GF(2) and s ∈ GF(2^{m−1}):
  Tr(s²xy) + Tr(sx) Tr(sy) + a Tr(sy) + b Tr(sx). Sums of two such matrices have full rank, so any two bases are
  unbiased: all cosines between them are ±1/√D. With the standard basis there are D/2 + 1, hence K ≤ D² + 2D. No larger system of
  lines has this angle, and none of so many lines a larger one (Levenshtein's bound for lines).
- m odd (Gold 1968), for a ∈ GF(2^m): Tr(a(x²y + xy²)), the form of Tr(ax³). Sums have rank m−1, so cosines are 0 or ±√(2/D), and
  ±1/√D with the standard basis. D + 1 bases, hence K ≤ 2D² + 2D.

Class c is vector j of basis ⌊c/2D⌋ with j = c mod D, negative in the second half of each 2D classes. So every class keeps its
vector when K grows, and the vectors of each full basis sum to zero. The largest cosine is the same in every other order as soon as
K > 2D; this one needs half as many transforms for prediction as one with negatives last. The standard basis is second for Gold
(up to 4D classes at 1/√D) and last for Kerdock.

Inner products with the D vectors of a basis are one Walsh–Hadamard transform of h ∘ σ ∘ (−1)^{q_s}. A vector itself is built in
stretches of b ≈ √D coordinates: where only the low digits of x move, (−1)^{q_s(x) + ⟨j, x⟩} is a signed row of H_b times (−1)^{q_s} of
the low digits. The frame keeps which row, a + b ≈ 2√D small numbers a basis.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from equiframe.errors import InputError
from equiframe.frames.base import Frame, check_size
from equiframe.frames.binary import PRIMITIVE, multiply, parity, trace
from equiframe.frames.hadamard import block_bits, exponent, hadamard_matrix, walsh_hadamard, walsh_hadamard_peak

_CHUNK = {"cpu": 2**18}  # numbers at once: what stays in a core's cache
_CHUNK_ELSEWHERE = 2**25


def kerdock_rows(m: int, num_bases: int) -> Tensor:
    """Quadratic forms of the first Kerdock bases, ``(num_bases, m)``: bit i < t of entry t is A_it."""
    n = m - 1
    s = torch.arange(num_bases)[:, None]
    unit = 1 << torch.arange(n)
    s_trace = trace(multiply(s, unit, n), n)
    products = multiply(unit[:, None], unit, n)
    field = trace(multiply(multiply(s, s, n)[:, :, None], products, n), n) ^ (s_trace[:, :, None] & s_trace[:, None])
    form = torch.zeros(num_bases, m, m, dtype=torch.long)
    form[:, :n, :n] = field
    form[:, :n, n] = s_trace
    return _rows_of(form)


def gold_rows(m: int, num_bases: int) -> Tensor:
    """Quadratic forms of the first Gold bases, ``(num_bases, m)``: bit i < t of entry t is A_it."""
    a = torch.arange(num_bases)[:, None, None]
    unit = 1 << torch.arange(m)
    square = multiply(unit, unit, m)
    products = multiply(square[:, None], unit, m) ^ multiply(unit[:, None], square, m)
    return _rows_of(trace(multiply(a, products, m), m))


def _rows_of(form: Tensor) -> Tensor:
    m = form.shape[-1]
    return (form.triu(1) << torch.arange(m)[:, None]).sum(1)


def _values(rows: Tensor) -> Tensor:
    """Values 0 or 1 of quadratic forms on all their 2^m points: ``(n, m) -> (n, 2^m)``."""
    values = torch.zeros(len(rows), 1, dtype=torch.long)
    for t in range(rows.shape[1]):
        points = torch.arange(1 << t)
        values = torch.cat([values, values ^ parity(rows[:, t : t + 1] & points)], 1)
    return values


def _mixed(columns: Tensor) -> Tensor:
    """Sums over GF(2) of columns chosen by the digits of u: ``(n, m) -> (n, 2^m)``."""
    sums = torch.zeros(len(columns), 1, dtype=torch.long)
    for t in range(columns.shape[1]):
        sums = torch.cat([sums, sums ^ columns[:, t : t + 1]], 1)
    return sums


class BasesFrame(Frame):
    """What Kerdock and Gold frames share; make one of those.

    Nothing but the D signs of the seed is in the state dict; 2√D small numbers a basis are made anew.
    """

    signs: Tensor  # (D,) ±1, which also carry dtype and device
    stretches: Tensor  # (bases, a): which row of ±H_b a stretch of a basis's first vector is
    walsh: Tensor  # (2b, b): H and −H of the low digits
    low: Tensor  # (bases, b): (−1)^q of the low digits; 0 for the standard basis
    block: Tensor  # Hadamard matrix and its negative

    def __init__(
        self, num_classes: int, dim: int, rows: Tensor, standard: int, coherence: float, seed: int, dtype: torch.dtype
    ) -> None:
        super().__init__(num_classes, dim, coherence)
        m = exponent(dim)
        self.num_bases = -(-num_classes // (2 * dim))
        self.standard = standard
        low_bits = -(-m // 2)
        self.stretch = 1 << low_bits
        generator = torch.Generator().manual_seed(seed)
        signs = 1.0 - 2.0 * torch.randint(2, (dim,), generator=generator)
        high = rows[:, low_bits:]
        stretches = (_values(high >> low_bits) << low_bits) ^ _mixed(high & (self.stretch - 1))
        low = 1 - 2 * _values(rows[:, :low_bits])
        if standard < self.num_bases:
            none = torch.zeros(1, 1, dtype=torch.long)
            stretches = torch.cat([stretches[:standard], none.expand(1, dim >> low_bits), stretches[standard:]])
            low = torch.cat([low[:standard], none.expand(1, self.stretch), low[standard:]])
        block = hadamard_matrix(max(self.stretch, 1 << block_bits(m)[0]))
        self.register_buffer("signs", signs.to(dtype))
        self.register_buffer("stretches", stretches.int(), persistent=False)
        self.register_buffer("low", low.to(dtype), persistent=False)
        self.register_buffer("block", block.to(dtype), persistent=False)
        walsh = self.block[: self.stretch, : self.stretch]
        self.register_buffer("walsh", torch.cat([walsh, -walsh]), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.signs.dtype

    def vectors(self, targets: Tensor) -> Tensor:
        if targets.device.type == "cpu" and targets.numel() and not torch.compiler.is_compiling():
            smallest, largest = targets.aminmax()
            if smallest < 0 or largest >= self.num_classes:
                raise IndexError(f"targets must be in 0 … {self.num_classes - 1}, got {smallest} … {largest}")
        bases, place = targets // (2 * self.dim), targets % (2 * self.dim)
        index, negative = place % self.dim, place // self.dim
        vectors = self._signed(bases, index, negative)
        if self.standard < self.num_bases:
            sign = (bases == self.standard) * (1 - 2 * negative)
            vectors.scatter_add_(1, index[:, None], sign[:, None].to(vectors.dtype) * math.sqrt(self.dim))
        return vectors * (self.signs / math.sqrt(self.dim))

    def _signed(self, bases: Tensor, index: Tensor, negative: Tensor) -> Tensor:
        """±1 coordinates ``(n, D)`` of vectors ``index (n,)`` of ``bases (n,)`` before σ; 0 for the standard basis."""
        b, a = self.stretch, self.dim // self.stretch
        high = torch.where(self.block[:a, :a] < 0, b, 0).int()  # what ⟨j, x⟩ of the high digits adds to the row
        flips = (index % b + b * negative).int()
        which = self.stretches[bases] ^ high[index // b] ^ flips[:, None]
        signed = self.walsh.index_select(0, which.flatten()).view(len(bases), a, b)
        return (signed * self.low[bases][:, None]).view(len(bases), self.dim)

    def _diagonals(self, bases: Tensor) -> Tensor:
        """σ ∘ (−1)^q / √D of each basis, ``(n,) -> (n, D)``."""
        first = torch.zeros_like(bases)
        return self._signed(bases, first, first) * (self.signs / math.sqrt(self.dim))

    def _products(self, features: Tensor, bases: Tensor) -> Tensor:
        """Inner products with the positive vectors of ``bases (n,)`` or ``(B, n)``: ``(B, D) -> (B, n, D)``."""
        diagonals = self._diagonals(bases.flatten()).view(*bases.shape, self.dim)
        products = walsh_hadamard(features[:, None] * diagonals, self.block)
        if self.standard < self.num_bases:
            itself = (features * self.signs)[:, None]
            products = torch.where((bases == self.standard)[..., None], itself, products)
        return products

    def _chunks(self, total: int, each: int, device: torch.device) -> Iterator[slice]:
        """0 … total in slices of which each holds at most the chunk's numbers, at ``each`` numbers an item."""
        size = max(1, _CHUNK.get(device.type, _CHUNK_ELSEWHERE) // max(each, 1))
        return (slice(start, min(start + size, total)) for start in range(0, total, size))

    def logits(self, features: Tensor) -> Tensor:
        pieces = list(self.pieces(features))
        return torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]

    def pieces(self, features: Tensor) -> Iterator[Tensor]:
        everything = torch.arange(self.num_bases, device=features.device)
        for part in self._chunks(self.num_bases, features.numel(), features.device):
            bases = everything[part]
            products = self._products(features, bases)
            both = torch.cat([products, -products], -1).flatten(1)
            yield both[:, : self.num_classes - part.start * 2 * self.dim]

    def topk(self, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest inner products and their classes, each ``(B, k)``, largest first; exact.

        The k best of all things lie in the k groups with the highest peaks. So a first pass of transforms keeps a peak a basis
        (B·K/2D numbers, nothing of size K); the k best bases are transformed again, their k best lines ±m kept, and of those the
        k best vectors. Which of several exactly equal values come first is as open as in `torch.topk`. Differentiable in the values.
        """
        if not 1 <= k <= self.num_classes:
            raise InputError(f"k must be in 1 … {self.num_classes} (the classes), got {k}")
        peaks = self._peaks(features.detach())
        best = peaks.topk(min(k, self.num_bases), dim=1).indices.sort(dim=1).values
        rows = self._chunks(len(features), self.dim * best.shape[1], features.device)
        parts = [self._best(features[row], best[row], k) for row in rows]
        if not parts:
            return features.new_empty(0, k), best.new_empty(0, k)
        return torch.cat([values for values, _ in parts]), torch.cat([classes for _, classes in parts])

    @torch.no_grad()
    def _peaks(self, features: Tensor) -> Tensor:
        """The largest inner product with the classes of each basis, ``(B, bases)``."""
        everything = torch.arange(self.num_bases, device=features.device)
        peaks = features.new_empty(len(features), self.num_bases)
        rows = list(self._chunks(len(features), self.dim, features.device))
        each = features[rows[0]].numel() if rows else 1  # numbers of a basis for a slice of rows
        for part in self._chunks(self.num_bases, self.dim, features.device):
            diagonals = self._diagonals(everything[part])
            for row, some in itertools.product(rows, self._chunks(len(diagonals), each, features.device)):
                signed = features[row, None] * diagonals[some]
                peaks[row, part][:, some] = walsh_hadamard_peak(signed, self.block)
        if self.standard < self.num_bases:
            peaks[:, self.standard] = (features * self.signs).abs().amax(1)
        if self.num_classes % (2 * self.dim):  # the last basis lacks classes
            last = everything[-1:]
            for row in rows:
                products = self._products(features[row], last)
                peaks[row, -1] = self._line_peaks(products, last.expand(len(products), 1)).amax((1, 2))
        return peaks

    def _line_peaks(self, products: Tensor, bases: Tensor) -> Tensor:
        """The larger inner product with the two vectors ±m of each line, ``(B, n, D)`` as ``products``: |m·h|, but for the classes
        that the last basis lacks. ``bases (B, n)`` ascend, so that it comes last."""
        peaks, last = products.abs(), products[:, -1]
        left = self.num_classes - 2 * self.dim * bases[:, -1:]  # classes from the last basis's first on
        line = torch.arange(self.dim, device=bases.device)
        peaks[:, -1] = torch.where(line + self.dim < left, peaks[:, -1], last).masked_fill(line >= left, -math.inf)
        return peaks

    def _best(self, features: Tensor, bases: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best classes among those of ``bases (B, n)``, which are ascending."""
        products = self._products(features, bases)
        peaks = self._line_peaks(products.detach(), bases).flatten(1)
        lines = peaks.topk(min(k, peaks.shape[1]), dim=1).indices
        positive = products.flatten(1).gather(1, lines)
        first = bases.gather(1, lines // self.dim) * (2 * self.dim) + lines % self.dim
        classes = torch.cat([first, first + self.dim], 1)
        both = torch.cat([positive, -positive], 1).masked_fill(classes >= self.num_classes, -math.inf)
        values, places = both.topk(k, dim=1)
        return values, classes.gather(1, places)

    def dense(self) -> Tensor:
        return self.vectors(torch.arange(self.num_classes, device=self.signs.device))


def _check_bases(name: str, num_classes: int, dim: int, *, odd: bool, smallest: int) -> int:
    """m, if the frame exists for K and D = 2^m."""
    num_classes, dim = check_size(num_classes, dim)
    m = dim.bit_length() - 1
    if dim != 1 << m or m % 2 != odd or m < smallest or m - (not odd) not in PRIMITIVE:
        widths = "8, 32, 128, 512, …, 32768" if odd else "4, 16, 64, 256, 1024, …, 65536"
        raise InputError(f'{name} frame needs D = {widths}, got D={dim}; use geometry="auto"')
    most = (2 * dim + 2) * dim if odd else (dim + 2) * dim
    if num_classes > most:
        raise InputError(f"{name} frame in D={dim} dimensions has K <= {most}, got K={num_classes}; widen")
    return m


class KerdockFrame(BasesFrame):
    """D = 2^m, m even: K ≤ D² + 2D vectors with largest cosine 1/√D (0 for K ≤ 2D).

    >>> KerdockFrame(1_000_000, 1024).coherence
    0.03125
    """

    geometry = "kerdock"

    def __init__(self, num_classes: int, dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        m = _check_bases("kerdock", num_classes, dim, odd=False, smallest=2)
        bases = -(-num_classes // (2 * dim))
        rows = kerdock_rows(m, min(bases, dim // 2))
        coherence = 0.0 if bases == 1 else dim**-0.5
        super().__init__(num_classes, dim, rows, dim // 2, coherence, seed, dtype)


class GoldFrame(BasesFrame):
    """D = 2^m, m odd: K ≤ 2D² + 2D vectors with largest cosine √(2/D) (0 for K ≤ 2D, 1/√D for K ≤ 4D).

    >>> GoldFrame(2112, 32).coherence
    0.25
    """

    geometry = "gold"

    def __init__(self, num_classes: int, dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        m = _check_bases("gold", num_classes, dim, odd=True, smallest=3)
        bases = -(-num_classes // (2 * dim))
        rows = gold_rows(m, bases - (bases > 1))
        coherence = 0.0 if bases == 1 else dim**-0.5 if bases == 2 else (2 / dim) ** 0.5
        super().__init__(num_classes, dim, rows, 1, coherence, seed, dtype)
