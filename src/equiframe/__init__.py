"""Equiframe: classify imbalanced data on a fixed frame.

Heads and losses for your own loop, frames, long tails, neural-collapse measures; ``equiframe --help`` for the whole way
from a folder of images to a model. Names are imported when they are first used, so that the command line starts at
once; nothing here loads timm, torchvision or matplotlib.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

_WHERE = {
    "errors": ("InputError",),
    "frames": (
        "CodeFrame",
        "EmbeddedFrame",
        "Frame",
        "GoldFrame",
        "KerdockFrame",
        "OrderedFrame",
        "OrthoplexFrame",
        "SimplexFrame",
        "TreeFrame",
        "assign",
        "make_frame",
        "mistake_severity",
        "nearest_simplex",
        "simplex_vectors",
        "tree_vectors",
        "walsh_hadamard",
    ),
    "heads": ("CosineHead", "FrameHead", "HeadOutput", "LinearHead", "NearestFrameHead", "training_parameters"),
    "angular": ("angular_regression",),
    "losses": (
        "AngularRegression",
        "BalancedSoftmax",
        "CrossEntropy",
        "DotRegression",
        "FocalLoss",
        "LDAM",
        "LogitAdjustedCrossEntropy",
        "MixedTargets",
        "ReleasedDotRegression",
        "SampledCrossEntropy",
        "SquaredError",
        "VectorScaling",
        "adjust_logits",
        "cross_entropy",
        "dot_regression",
        "effective_number_weights",
        "focal_loss",
        "ldam_margins",
        "released_dot_regression",
        "sampled_cross_entropy",
        "squared_error",
        "vector_scaling",
    ),
    "estimator": ("EquiframeClassifier",),
    "model": ("Classifier",),
    "integrate": ("Attached", "attach", "detach", "fold"),
    "incremental": ("fit_session", "incremental_measures", "mean_features"),
    "openset": ("auroc", "open_set_scores"),
    "transport": ("transport_cost",),
    "imbalance": ("class_groups", "class_profile", "long_tail_indices", "stratified_split", "subset_indices"),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}
__all__ = [*sorted(_MODULE_OF), "__version__"]

if TYPE_CHECKING:  # the same names, for editors and type checkers
    __version__: str
    from equiframe.angular import angular_regression as angular_regression
    from equiframe.errors import InputError as InputError
    from equiframe.estimator import EquiframeClassifier as EquiframeClassifier
    from equiframe.frames import CodeFrame as CodeFrame
    from equiframe.frames import EmbeddedFrame as EmbeddedFrame
    from equiframe.frames import Frame as Frame
    from equiframe.frames import GoldFrame as GoldFrame
    from equiframe.frames import KerdockFrame as KerdockFrame
    from equiframe.frames import OrderedFrame as OrderedFrame
    from equiframe.frames import OrthoplexFrame as OrthoplexFrame
    from equiframe.frames import SimplexFrame as SimplexFrame
    from equiframe.frames import TreeFrame as TreeFrame
    from equiframe.frames import assign as assign
    from equiframe.frames import make_frame as make_frame
    from equiframe.frames import mistake_severity as mistake_severity
    from equiframe.frames import nearest_simplex as nearest_simplex
    from equiframe.frames import simplex_vectors as simplex_vectors
    from equiframe.frames import tree_vectors as tree_vectors
    from equiframe.frames import walsh_hadamard as walsh_hadamard
    from equiframe.heads import CosineHead as CosineHead
    from equiframe.heads import FrameHead as FrameHead
    from equiframe.heads import HeadOutput as HeadOutput
    from equiframe.heads import LinearHead as LinearHead
    from equiframe.heads import NearestFrameHead as NearestFrameHead
    from equiframe.heads import training_parameters as training_parameters
    from equiframe.imbalance import class_groups as class_groups
    from equiframe.imbalance import class_profile as class_profile
    from equiframe.imbalance import long_tail_indices as long_tail_indices
    from equiframe.imbalance import stratified_split as stratified_split
    from equiframe.imbalance import subset_indices as subset_indices
    from equiframe.incremental import fit_session as fit_session
    from equiframe.incremental import incremental_measures as incremental_measures
    from equiframe.incremental import mean_features as mean_features
    from equiframe.integrate import Attached as Attached
    from equiframe.integrate import attach as attach
    from equiframe.integrate import detach as detach
    from equiframe.integrate import fold as fold
    from equiframe.losses import LDAM as LDAM
    from equiframe.losses import AngularRegression as AngularRegression
    from equiframe.losses import BalancedSoftmax as BalancedSoftmax
    from equiframe.losses import CrossEntropy as CrossEntropy
    from equiframe.losses import DotRegression as DotRegression
    from equiframe.losses import FocalLoss as FocalLoss
    from equiframe.losses import LogitAdjustedCrossEntropy as LogitAdjustedCrossEntropy
    from equiframe.losses import MixedTargets as MixedTargets
    from equiframe.losses import ReleasedDotRegression as ReleasedDotRegression
    from equiframe.losses import SampledCrossEntropy as SampledCrossEntropy
    from equiframe.losses import SquaredError as SquaredError
    from equiframe.losses import VectorScaling as VectorScaling
    from equiframe.losses import adjust_logits as adjust_logits
    from equiframe.losses import cross_entropy as cross_entropy
    from equiframe.losses import dot_regression as dot_regression
    from equiframe.losses import effective_number_weights as effective_number_weights
    from equiframe.losses import focal_loss as focal_loss
    from equiframe.losses import ldam_margins as ldam_margins
    from equiframe.losses import released_dot_regression as released_dot_regression
    from equiframe.losses import sampled_cross_entropy as sampled_cross_entropy
    from equiframe.losses import squared_error as squared_error
    from equiframe.losses import vector_scaling as vector_scaling
    from equiframe.model import Classifier as Classifier
    from equiframe.openset import auroc as auroc
    from equiframe.openset import open_set_scores as open_set_scores
    from equiframe.transport import transport_cost as transport_cost


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("equiframe")
        except metadata.PackageNotFoundError:  # the source beside no installation
            return "0+unknown"
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'equiframe' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"equiframe.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
