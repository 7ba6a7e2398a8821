r"""The Walsh–Hadamard transform, by blocked matrix products.

.. math:: (H_D x)_j = \sum_i (-1)^{\langle i, j\rangle} x_i, \qquad H_{2D} = \begin{pmatrix} H_D & H_D \\ H_D & -H_D \end{pmatrix},
          \quad H_1 = (1),

with ⟨i, j⟩ the number of binary digits that i and j share (Sylvester's order). :math:`H_D = H_a \otimes H_b` for D = ab, so the
transform of D numbers is a few products with small blocks: D Σ b multiplications instead of D², and each pass does the work of
log₂ b rounds of butterflies in one trip through memory, on the matrix units.
"""

from __future__ import annotations

import torch
from torch import Tensor

from equiframe.errors import InputError

_ONE_BLOCK = 7  # up to D = 2⁷ a single product is fastest
_BLOCK = 5  # beyond, blocks of at most 2⁵ (two at D = 1,024 and three at 4,096 were the fastest of those tried)


def exponent(dim: int) -> int:
    """m with D = 2^m, or an error if D is no power of two."""
    if dim < 1 or dim & (dim - 1):
        raise InputError(f"a Walsh–Hadamard transform needs a power of two as width, got {dim}")
    return dim.bit_length() - 1


def block_bits(m: int) -> list[int]:
    """How the m binary digits of an index are shared out to blocks, largest block first."""
    parts = 1 if m <= _ONE_BLOCK else -(-m // _BLOCK)
    return [m // parts + (i < m % parts) for i in range(parts)]


def hadamard_matrix(
    size: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """Sylvester's Hadamard matrix ``(size, size)`` of ±1; its top left corners are the smaller ones."""
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    for _ in range(exponent(size)):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def walsh_hadamard(x: Tensor, block: Tensor | None = None) -> Tensor:
    """``H_D x`` along the last dimension, not normalised: ``(…, D) -> (…, D)``, D a power of two.

    H is symmetric and H H = D·I: the transform is its own gradient and, but for the factor D, its own inverse. It computes in the
    dtype of ``x``, also under autocast.

    Args:
        x: any leading shape.
        block: a `hadamard_matrix` of at least 2^``block_bits(m)[0]`` rows in x's dtype and device, where a caller
            keeps one; made anew otherwise.

    Raises:
        InputError: if D is no power of two.

    >>> walsh_hadamard(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    tensor([10., -2., -4.,  0.])
    """
    bits = block_bits(exponent(x.shape[-1]))
    if block is None:
        block = hadamard_matrix(1 << bits[0], dtype=x.dtype, device=x.device)
    if not torch.is_autocast_enabled(x.device.type):
        return _in_blocks(x, block, bits)
    with torch.autocast(x.device.type, enabled=False):  # entering takes as long as a small transform
        return _in_blocks(x, block, bits)


def _in_blocks(x: Tensor, block: Tensor, bits: list[int]) -> Tensor:
    done = 1 << bits[0]  # coordinates within reach of the blocks so far
    first = block if len(block) == done else block[:done, :done]
    if len(bits) == 1:
        return x @ first
    y = x.reshape(x.numel() // done, done) @ first
    for b in bits[1:]:
        size = 1 << b
        y = torch.matmul(block[:size, :size], y.reshape(x.numel() // (size * done), size, done))
        done *= size
    return y.reshape(x.shape)


def walsh_hadamard_peak(x: Tensor, block: Tensor | None = None) -> Tensor:
    """``max_j |(H_D x)_j|`` along the last dimension: ``(…, D) -> (…)``, D ≥ 2, in three quarters of the time of the transform.

    The last round of butterflies need not be made: max(|a + b|, |a − b|) = |a| + |b|.
    """
    halves = walsh_hadamard(x.unflatten(-1, (2, x.shape[-1] // 2)), block).abs_()
    return halves[..., 0, :].add_(halves[..., 1, :]).amax(-1)
