"""Arithmetic in GF(2^m), on integer tensors: bit i of an element is its coefficient of x^i.

Only odd m up to 15 is needed here. Polynomials: the primitive ones with fewest terms, from Lidl & Niederreiter, *Finite
Fields*, table of primitive polynomials (chapter 10, table D); `tests/test_frames_bases.py` proves each primitive.
"""

from __future__ import annotations

import torch
from torch import Tensor

PRIMITIVE = {  # m → primitive polynomial of degree m, as bits
    1: 0b11,  # x + 1
    3: 0b1011,  # x³ + x + 1
    5: 0b100101,  # x⁵ + x² + 1
    7: 0b10000011,  # x⁷ + x + 1
    9: 0b1000010001,  # x⁹ + x⁴ + 1
    11: 0b100000000101,  # x¹¹ + x² + 1
    13: 0b10000000011011,  # x¹³ + x⁴ + x³ + x + 1
    15: 0b1000000000000011,  # x¹⁵ + x + 1
}


def multiply(a: Tensor, b: Tensor, m: int) -> Tensor:
    """Products in GF(2^m); shapes broadcast."""
    product = torch.zeros_like(a & b)
    for i in range(m):
        product = product ^ (a * ((b >> i) & 1))
        a = a << 1
        a = a ^ (PRIMITIVE[m] * (a >> m))
    return product


def trace(a: Tensor, m: int) -> Tensor:
    """The absolute trace a + a² + a⁴ + … + a^(2^(m−1)), 0 or 1."""
    total = torch.zeros_like(a)
    for _ in range(m):
        total = total ^ a
        a = multiply(a, a, m)
    return total


def parity(a: Tensor) -> Tensor:
    """Whether the number of ones among the lowest 32 bits is odd, 0 or 1."""
    for shift in (16, 8, 4, 2, 1):
        a = a ^ (a >> shift)
    return a & 1
