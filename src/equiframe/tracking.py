"""What is recorded beside loss and accuracy in each epoch: collapse, and the pull and push of gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from equiframe.collapse import ClassStatistics, collapse_measures, minority_angle, nc4_agreement
from equiframe.data.batches import Loader
from equiframe.data.prepare import PreparedData
from equiframe.data.sources import ImageSet
from equiframe.errors import InputError, unknown
from equiframe.evaluate import Outputs, accuracy_measures, collect
from equiframe.imbalance import class_groups
from equiframe.losses import CrossEntropy, Loss
from equiframe.model import Classifier, ModelCard
from equiframe.numerics import Numerics
from equiframe.peeled.gradients import class_norms, push_over_pull, split_gradients
from equiframe.recipe import Recipe

TRACKS = ("none", "collapse", "collapse-all", "gradients", "test")
TRACKED_IMAGES = 2000


def make_loader(images: ImageSet, card: ModelCard, numerics: Numerics, recipe: Recipe, **training: object) -> Loader:
    """A loader as a model card wants its images."""
    return Loader(
        images, batch_size=recipe.batch_size * recipe.accumulate, image_size=card.image_size, mean=card.mean, std=card.std,
        device=numerics.device, memory_format=numerics.torch_memory_format, world=numerics.world, workers=recipe.workers,
        stream=recipe.data_mode == "stream", centre_crop=card.centre_crop, **training,
    )  # fmt: skip


def parse_tracks(text: str) -> set[str]:
    """``"collapse,gradients"`` → the set of names, each in `TRACKS`."""
    names = {name.strip() for name in text.split(",") if name.strip()}
    for name in sorted(names):
        if name not in TRACKS:
            raise unknown("track", name, TRACKS)
    return names - {"none"}


def check_tracks(text: str, criterion: Loss) -> set[str]:
    """`parse_tracks`, refusing what the loss does not have."""
    names = parse_tracks(text)
    if "gradients" in names and not (isinstance(criterion, CrossEntropy) and criterion.pull_and_push):
        raise InputError(
            f"track 'gradients' splits the gradient of cross-entropy into pull and push; "
            f"the gradient of {type(criterion).__name__} is another"
        )
    return names


def tracked_positions(labels: np.ndarray, *, per_class: int) -> np.ndarray:
    """Positions of the first ``per_class`` images of each class (all of a smaller class), in order."""
    order = np.argsort(labels, kind="stable")
    rank = np.arange(len(labels)) - np.searchsorted(labels[order], labels[order])
    return np.sort(order[rank < per_class])


def tail_mask(train_counts: Sequence[int]) -> torch.Tensor:
    """The third of the classes with fewest training images, as a mask ``(K,)``."""
    return torch.from_numpy(class_groups(train_counts)["tail"])


def finite(values: dict[str, float]) -> dict[str, float | None]:
    """NaN and infinities as None: JSON has neither."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def tail_angles(statistics: ClassStatistics, class_vectors: Tensor, train_counts: Sequence[int]) -> dict[str, float]:
    """Mean angle in degrees between class means, and between class vectors, of the third of the classes with fewest
    images: about 90 and more at collapse, falling towards 0 under minority collapse."""
    tail = tail_mask(train_counts)
    return {
        "few_angle_means": minority_angle(statistics, tail),
        "few_angle_vectors": minority_angle(class_vectors, tail),
    }


@torch.no_grad()
def gradient_record(
    model: Classifier, loader: Loader, criterion: CrossEntropy, numerics: Numerics, train_counts: Sequence[int]
) -> dict[str, float | None]:
    """‖push‖/‖pull‖ of the training loss over all training images, for the thirds with most and with fewest images.

    ``vector_…`` on class vectors (what would move them, also where they are fixed), ``feature_…`` on features.
    Source: `equiframe.peeled.split_gradients`.
    """
    was_training = model.training
    model.eval()
    vectors = model.head.class_vectors()
    scale = getattr(model.head, "logit_scale", 1.0)
    norms = {f"feature_{of}": vectors.new_zeros(len(vectors)) for of in ("pull", "push")}
    sums = {f"vector_{of}": torch.zeros_like(vectors) for of in ("pull", "push")}

    def look() -> None:
        for images, targets in loader.ordered(256):
            with numerics.autocast():
                features = model.backbone(images)
            output = model.head(features)
            split = split_gradients(
                output.features, vectors, targets, logits=criterion.training_logits(output), scale=scale,
                weights=torch.full((len(targets),), 1 / len(loader.images), device=targets.device),
            )  # fmt: skip
            sums["vector_pull"] += split.vector_pull
            sums["vector_push"] += split.vector_push
            of_classes = class_norms(split, targets)
            for name in norms:
                norms[name] += of_classes[name]

    loader.world.each(look)
    for total in (*norms.values(), *sums.values()):
        loader.world.add_(total)
    model.train(was_training)
    norms |= {name: total.norm(dim=1) for name, total in sums.items()}
    groups = class_groups(train_counts)
    return finite(
        {
            f"{of}_push_over_pull_{group}": push_over_pull(norms, torch.from_numpy(groups[group]), of=of)
            for of in ("vector", "feature")
            for group in ("head", "tail")
        }
    )


class Tracker:
    """Records of an epoch: accuracy on validation images, and what ``recipe.track`` names.

    ``collapse`` looks at NC1 to NC4 and the angles of the tail, of up to 2,000 training and 2,000 test images (the first
    of each class) and of the validation images, ``collapse-all`` at every measure of all of them, ``gradients`` at pull
    and push of the training loss, ``test`` at the accuracy on all test images: a curve to look at, on which nothing is
    ever chosen. Keys are ``train_nc1``, ``test_nc1``, ``val_macro``, ``test_macro``, …; NC4 takes the class means of the
    training images that were looked at.

    Raises:
        InputError: for an unknown track, or one that the loss does not have.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: Classifier,
        criterion: Loss,
        data: PreparedData,
        card: ModelCard,
        numerics: Numerics,
    ) -> None:
        self.model, self.criterion, self.card, self.numerics = model, criterion, card, numerics
        self.tracks = check_tracks(recipe.track, criterion)
        self.full = "collapse-all" in self.tracks
        self.collapse = self.full or "collapse" in self.tracks
        self.held_out = {} if data.val is None else {"val": make_loader(data.val, card, numerics, recipe)}
        self.everything = self.training = make_loader(data.train, card, numerics, recipe)

        def first_of_each_class(images: ImageSet) -> Loader:
            few = tracked_positions(images.labels, per_class=max(10, TRACKED_IMAGES // data.num_classes))
            return make_loader(images.subset(few), card, numerics, recipe)

        if self.collapse and not self.full and len(data.train) > TRACKED_IMAGES:
            self.training = first_of_each_class(data.train)
        if data.test is not data.val and (self.collapse or "test" in self.tracks):
            few = not self.full and "test" not in self.tracks and len(data.test) > TRACKED_IMAGES
            self.held_out["test"] = (
                first_of_each_class(data.test) if few else make_loader(data.test, card, numerics, recipe)
            )

    def record(self) -> dict[str, float | None]:
        """Look at the model as it is now."""
        record: dict[str, float | None] = {}
        means = None
        if self.collapse:
            statistics = self._statistics()
            seen = self._collect(self.training, statistics, keep_features=True)
            means = statistics.class_means
            agreement = nc4_agreement(seen.features, seen.logits, means)  # only now are the means known
            record |= self._measures("train", statistics) | finite({"train_nc4": agreement})
        for name, loader in self.held_out.items():
            statistics = self._statistics(means) if self.collapse else None
            outputs = self._collect(loader, statistics)
            if name == "val" or "test" in self.tracks:
                measures = accuracy_measures(outputs.logits.argmax(1), outputs.labels, self.card.train_counts)
                record |= {f"{name}_top1": measures["top1"], f"{name}_macro": measures["macro"]}
            if statistics is not None:
                record |= self._measures(name, statistics)
        if "gradients" in self.tracks:
            record |= gradient_record(
                self.model, self.everything, self.criterion, self.numerics, self.card.train_counts
            )
        return record

    def _statistics(self, class_means: Tensor | None = None) -> ClassStatistics:
        size = len(self.card.class_names), self.model.head.inner_dim
        return ClassStatistics(*size, class_means=class_means, device=self.numerics.device)

    def _collect(self, loader: Loader, statistics: ClassStatistics | None, keep_features: bool = False) -> Outputs:
        return collect(
            self.model, loader, autocast=self.numerics.autocast, statistics=statistics, keep_features=keep_features,
            decisions=statistics is not None and statistics.knows_means,
        )  # fmt: skip

    def _measures(self, name: str, statistics: ClassStatistics) -> dict[str, float | None]:
        head, counts = self.model.head, self.card.train_counts
        vectors, bias = head.class_vectors().detach(), head.class_bias()
        values = collapse_measures(
            statistics, vectors, None if bias is None else bias.detach(), few=tail_mask(counts), full=self.full
        )
        return {f"{name}_{key}": v for key, v in finite(values | tail_angles(statistics, vectors, counts)).items()}


def event_writer(log: str, folder: str) -> Callable[[dict], None]:
    """A function that records an epoch: to TensorBoard for ``log="tensorboard"``, to nowhere for ``"none"``."""
    if log == "none":
        return lambda record: None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("--log tensorboard needs TensorBoard: pip install 'equiframe[tensorboard]'") from error
    writer = SummaryWriter(folder)

    def write(record: dict) -> None:
        for name, value in record.items():
            if name != "epoch" and value is not None:
                writer.add_scalar(name, value, record["epoch"])
        writer.flush()

    return write
