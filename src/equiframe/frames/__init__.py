"""Frames: K fixed unit vectors in R^D with the largest angles that are possible, for any K (docs/frames.md).

`make_frame` chooses one; every frame keeps the contract of `Frame`.
"""

from equiframe.frames.assign import assign
from equiframe.frames.base import DenseFrame, Frame, check_size
from equiframe.frames.bases import GoldFrame, KerdockFrame
from equiframe.frames.bounds import levenshtein_bound, line_bound, lower_bound, rankin_bound, simplex_bound, welch_bound
from equiframe.frames.code import CodeFrame, largest_cosine
from equiframe.frames.embedded import EmbeddedFrame
from equiframe.frames.hadamard import hadamard_matrix, walsh_hadamard
from equiframe.frames.order import OrderedFrame
from equiframe.frames.orthoplex import OrthoplexFrame
from equiframe.frames.select import GEOMETRIES, choose_geometry, describe_frame, frame_text, make_frame
from equiframe.frames.simplex import SimplexFrame, haar_columns, nearest_simplex, simplex_vectors
from equiframe.frames.tree import TreeFrame, mistake_severity, tree_vectors

__all__ = [
    "GEOMETRIES",
    "CodeFrame",
    "DenseFrame",
    "EmbeddedFrame",
    "Frame",
    "GoldFrame",
    "KerdockFrame",
    "OrderedFrame",
    "OrthoplexFrame",
    "SimplexFrame",
    "TreeFrame",
    "assign",
    "check_size",
    "choose_geometry",
    "describe_frame",
    "frame_text",
    "haar_columns",
    "hadamard_matrix",
    "largest_cosine",
    "levenshtein_bound",
    "line_bound",
    "lower_bound",
    "make_frame",
    "mistake_severity",
    "nearest_simplex",
    "rankin_bound",
    "simplex_bound",
    "simplex_vectors",
    "tree_vectors",
    "walsh_hadamard",
    "welch_bound",
]
