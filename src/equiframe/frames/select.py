"""Which frame for K classes in D dimensions."""

from __future__ import annotations

import torch

from equiframe.errors import InputError, unknown
from equiframe.frames.base import DenseFrame, check_size
from equiframe.frames.orthoplex import OrthoplexFrame
from equiframe.frames.simplex import SimplexFrame

GEOMETRIES: dict[str, type[DenseFrame]] = {"simplex": SimplexFrame, "orthoplex": OrthoplexFrame}


def choose_geometry(num_classes: int, dim: int) -> str:
    """The best known geometry: simplex for K ≤ D+1, orthoplex for K ≤ 2D (both optimal).

    Raises:
        InputError: for K > 2D; the message says which width would do.
    """
    num_classes, dim = check_size(num_classes, dim)
    if num_classes <= dim + 1:
        return "simplex"
    if num_classes <= 2 * dim:
        return "orthoplex"
    raise InputError(
        f"no frame for K={num_classes} classes in D={dim} dimensions yet: "
        f"widen to D >= {-(-num_classes // 2)} (orthoplex) or D >= {num_classes - 1} (simplex)"
    )


def make_frame(
    num_classes: int, dim: int, *, geometry: str = "auto", seed: int = 0, dtype: torch.dtype = torch.float32
) -> DenseFrame:
    """Draw a frame. ``geometry`` is ``"auto"`` (see `choose_geometry`) or a name in `GEOMETRIES`."""
    if geometry == "auto":
        geometry = choose_geometry(num_classes, dim)
    if geometry not in GEOMETRIES:
        raise unknown("geometry", geometry, ["auto", *GEOMETRIES])
    return GEOMETRIES[geometry](num_classes, dim, seed=seed, dtype=dtype)
