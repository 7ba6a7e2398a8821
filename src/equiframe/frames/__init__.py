"""Frames: K fixed unit vectors in R^D with the largest angles that are possible.

`make_frame` chooses one; every frame keeps the contract of `Frame`.
"""

from equiframe.frames.base import DenseFrame, Frame, check_size
from equiframe.frames.orthoplex import OrthoplexFrame
from equiframe.frames.select import GEOMETRIES, choose_geometry, make_frame
from equiframe.frames.simplex import SimplexFrame, haar_columns, nearest_simplex, simplex_vectors

__all__ = [
    "GEOMETRIES",
    "DenseFrame",
    "Frame",
    "OrthoplexFrame",
    "SimplexFrame",
    "check_size",
    "choose_geometry",
    "haar_columns",
    "make_frame",
    "nearest_simplex",
    "simplex_vectors",
]
