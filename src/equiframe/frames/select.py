"""Which frame for K classes in D dimensions, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch

from equiframe.errors import InputError, unknown
from equiframe.frames.base import Frame, check_size
from equiframe.frames.bases import BasesFrame, GoldFrame, KerdockFrame
from equiframe.frames.bounds import line_bound, lower_bound
from equiframe.frames.code import MOST, CodeFrame
from equiframe.frames.embedded import LARGEST, EmbeddedFrame, capacity, inner_dim
from equiframe.frames.order import OrderedFrame
from equiframe.frames.orthoplex import OrthoplexFrame
from equiframe.frames.simplex import SimplexFrame

GEOMETRIES: dict[str, Callable[..., Frame]] = {
    "simplex": SimplexFrame,
    "orthoplex": OrthoplexFrame,
    "kerdock": KerdockFrame,
    "gold": GoldFrame,
    "embedded": EmbeddedFrame,
    "code": CodeFrame,
}
# From this D on an optimised code has the smaller cosine up to this K (benchmarks/code_limits.py); the largest that were tried
CODE_WINS = {
    2: 512, 4: 20, 5: 512, 8: 120, 9: 512, 16: 128, 17: 144, 18: 160, 19: 176, 20: 200, 22: 256, 24: 512,
    36: 1024, 64: 512, 80: 960, 96: 1024, 257: 512,
}  # fmt: skip


def code_limit(dim: int) -> int:
    """The largest K for which a code is taken before a Kerdock or Gold frame in D ≥ 2 dimensions."""
    return CODE_WINS[max(d for d in CODE_WINS if d <= dim)]


def choose_geometry(num_classes: int, dim: int) -> str:
    """The best geometry that we have, from K and D alone.

    simplex for K ≤ D+1 and orthoplex for K ≤ 2D (both optimal); then an optimised code while that has the smaller cosine
    (`CODE_WINS`: K ≤ 1,024); then Kerdock or Gold, in D dimensions or embedded from the largest power of two below; an optimised code again
    where those have no room (K ≤ 1,024).

    Raises:
        InputError: beyond all of these; the message says which width would do.
    """
    num_classes, dim = check_size(num_classes, dim)
    if num_classes <= dim + 1:
        return "simplex"
    if num_classes <= 2 * dim:
        return "orthoplex"
    if dim > 1 and num_classes <= code_limit(dim):
        return "code"
    n = inner_dim(dim)
    if num_classes <= capacity(n):
        if n < dim:
            return "embedded"
        return "kerdock" if n.bit_length() % 2 else "gold"
    if num_classes <= MOST and dim > 1:
        return "code"
    wider = 4
    while capacity(wider) < num_classes and wider < LARGEST:
        wider *= 2
    options = [(2, "code")] if num_classes <= MOST else []
    if capacity(wider) >= num_classes:
        options.append((wider, "kerdock" if wider.bit_length() % 2 else "gold"))
    options.append((-(-num_classes // 2), "orthoplex"))
    raise InputError(
        f"no frame for K={num_classes} classes in D={dim} dimensions: widen to "
        + " or ".join(f"D >= {width} ({name})" for width, name in options)
    )


def make_frame(
    num_classes: int, dim: int, *, geometry: str = "auto", seed: int = 0, dtype: torch.dtype = torch.float32
) -> Frame:
    """Draw a frame. ``geometry`` is ``"auto"`` (see `choose_geometry`) or a name in `GEOMETRIES`."""
    if geometry == "auto":
        geometry = choose_geometry(num_classes, dim)
    if geometry not in GEOMETRIES:
        raise unknown("geometry", geometry, ["auto", *GEOMETRIES])
    return GEOMETRIES[geometry](num_classes, dim, seed=seed, dtype=dtype)


def describe_frame(frame: Frame) -> dict[str, object]:
    """What `equiframe frame` tells: coherence, the bound it is held against, whether it is optimal, and why this frame.

    ``optimal`` means that no K unit vectors have a smaller largest cosine; False means that this is not known.
    ``stored`` counts the numbers that the frame keeps, ``saved`` those in its state dict.
    """
    bound_name, bound = lower_bound(frame.num_classes, frame.dim)
    return {
        "geometry": frame.geometry,
        "num_classes": frame.num_classes,
        "dim": frame.dim,
        "coherence": frame.coherence,
        "bound": bound,
        "bound_name": bound_name,
        "optimal": frame.coherence <= bound + 1e-9,
        "reason": _reason(frame),
        "stored": sum(buffer.numel() for buffer in frame.buffers()),
        "saved": sum(tensor.numel() for tensor in frame.state_dict().values()),
    }


def _reason(frame: Frame) -> str:
    if isinstance(frame, OrderedFrame):
        return _reason(frame.frame) + "; in an order of its own"
    k, d = frame.num_classes, frame.dim
    if frame.geometry == "tree":
        return "siblings have one cosine, all others another: the smallest that is possible"
    if frame.geometry == "simplex":
        return f"K <= D+1 = {d + 1}: all angles equal"
    if frame.geometry == "orthoplex":
        return f"K <= 2D = {2 * d}: an orthonormal basis and its negatives"
    if frame.geometry == "code":
        return f"optimised from a seed; K <= {MOST}, coherence measured"
    bases = cast(BasesFrame, frame.inner if isinstance(frame, EmbeddedFrame) else frame)
    n = bases.dim
    text = f"K <= {capacity(n)}: {bases.num_bases} orthonormal bases of R^{n} and their negatives"
    if n < d:
        text += f", turned into R^{d}, which is no power of two"
    lines = k // 2
    full = k % (2 * n) == 0 and n * (n + 1) // 2 < lines and n == d
    if full and abs(line_bound(lines, d) - frame.coherence) < 1e-12:
        text += f"; no {lines} lines in R^{d} have a larger angle (Levenshtein)"
    return text


def frame_text(described: dict[str, object]) -> str:
    """`describe_frame` as lines for a person."""
    against = (
        "no smaller one is possible"
        if described["optimal"]
        else f"no frame goes below {described['bound']:.6g}, by {described['bound_name']}'s bound"
    )
    return (
        f"{described['geometry']} frame: {described['num_classes']} unit vectors in R^{described['dim']}, "
        f"largest cosine {described['coherence']:.6g} ({against})\n"
        f"{described['reason']}; keeps {described['stored']:,} numbers, saves {described['saved']:,}"
    )
