"""Which class gets which vector of the frame, in a run (`frame_order`): by the mean training images, by a class tree, or, once, by the
class means of the features after a warm-up."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from equiframe.collapse import ClassStatistics
from equiframe.data.batches import Loader
from equiframe.errors import InputError
from equiframe.frames import OrderedFrame, assign, tree_vectors
from equiframe.frames.assign import SIMILAR
from equiframe.model import Classifier
from equiframe.numerics import Numerics
from equiframe.recipe import Recipe

_SIDE = 32  # images are compared at most this large


def order_epoch(recipe: Recipe) -> int | None:
    """After how many epochs the order is found (0: before the first); None if nothing is to be found.

    Raises:
        InputError: if no epoch would be left to train in that order.
    """
    if recipe.frame_order not in SIMILAR:
        return None
    epoch = math.ceil((recipe.frame_order_after or 0.0) * recipe.epochs)
    if epoch >= recipe.epochs:
        raise InputError(
            f"frame_order_after {recipe.frame_order_after:g} leaves none of {recipe.epochs} epochs to train in the new order"
        )
    return epoch


@torch.no_grad()
def order_frame(model: Classifier, loader: Loader, numerics: Numerics, recipe: Recipe, *, by_features: bool) -> str:
    """Give the classes their vectors as ``recipe.frame_order`` says, similar ones apart or together; returns a line for a person.

    Similarity is that of the class means of the features (``by_features``; the model stays in its mode), else of the class tree's own
    vectors, else of the mean training images.
    """
    frame, num_classes = model.head.frame, model.head.num_classes
    if not isinstance(frame, OrderedFrame):
        raise InputError("only a frame with an order can be given another")
    if by_features:
        means, source = _class_means(loader, num_classes, model, numerics), "class means of the features"
    elif recipe.class_tree is not None:
        means, source = tree_vectors(recipe.class_tree, num_classes - 1), "the class tree"
    else:
        means, source = _class_means(loader, num_classes, None, numerics), "mean training images"
    order = assign(frame.frame, means, similar=str(recipe.frame_order), seed=recipe.seed)
    frame.set_order(order.to(frame.order.device))
    return f"frame order: similar classes {recipe.frame_order}, by {source}"


def _class_means(loader: Loader, num_classes: int, model: Classifier | None, numerics: Numerics) -> torch.Tensor:
    """Mean over the images of each class, ``(K, D')``: of the model's features, or of the images themselves."""
    side = min(_SIDE, loader.image_size)
    dim = 3 * side * side if model is None else model.head.inner_dim
    statistics = ClassStatistics(num_classes, dim, within="none", device=numerics.device)

    def look() -> None:
        for images, targets in loader.ordered(256):
            if model is None:
                rows = F.adaptive_avg_pool2d(images.float(), side).flatten(1)
            else:
                with numerics.autocast():
                    features = model.backbone(images)
                rows = model.head(features).features.float()
            statistics.update(rows, targets)

    training = model is not None and model.training
    if model is not None:
        model.eval()
    loader.world.each(look)
    if model is not None:
        model.train(training)
    statistics.unite(loader.world)
    return statistics.class_means
