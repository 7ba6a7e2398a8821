"""All measures of a trained model, on its own training, validation and test images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from equiframe import evaluate
from equiframe.collapse import ClassStatistics, collapse_measures, nc4
from equiframe.data.prepare import PreparedData, prepare_data
from equiframe.data.sources import ImageSet
from equiframe.errors import InputError
from equiframe.frames import mistake_severity
from equiframe.model import Classifier, ModelCard, load_classifier
from equiframe.modelcard import CROSS_FITTED
from equiframe.numerics import Numerics, choose_numerics
from equiframe.recipe import Recipe
from equiframe.runs import RunFolder
from equiframe.tracking import finite, make_loader, tail_angles, tail_mask


@dataclass(frozen=True)
class Measured:
    """What was measured: the card with its temperature, ``metrics.json``, what only pictures need, and each test image's
    prediction."""

    card: ModelCard
    metrics: dict[str, object]
    details: dict[str, object]
    predictions: dict[str, np.ndarray]


def measure(
    model: Classifier, card: ModelCard, data: PreparedData, numerics: Numerics, recipe: Recipe, *, full: bool = False
) -> Measured:
    """Accuracy, calibration and collapse of a trained model.

    NC1–NC4 are those of the training images (NC4: agreement with the nearest of their class means), ``full`` adds all
    other measures of collapse. ``val_top1`` and ``val_macro`` are for choices. The temperature comes from validation images; where there are none (or all are right), from the second stage that
    cross-fitted it (``temperature_from`` is ``cross-fit``), else from the training images (``train``: then it is too confident). Images that are all right never sharpen: it is 1 at least. Raw cosines are never called probabilities.
    """

    def outputs_on(name: str, images: ImageSet, **options: object) -> evaluate.Outputs:
        loader = make_loader(images, card, numerics, recipe)
        outputs = evaluate.collect(model, loader, autocast=numerics.autocast, **options)
        if not outputs.logits.isfinite().all():
            raise InputError(
                f"the model's outputs on {name} images are not finite; try a lower --lr than {recipe.lr:g}"
            )
        return outputs

    size = len(card.class_names), model.head.inner_dim
    statistics = ClassStatistics(*size, device=numerics.device)
    fitted_on = outputs_on("training", data.train, statistics=statistics, keep=data.val is None)
    decided = ClassStatistics(*size, within="none", class_means=statistics.class_means, device=numerics.device)
    outputs_on(
        "training", data.train, statistics=decided, decisions=True, keep=False
    )  # NC4 needs the means of the first pass
    chosen_by: dict[str, object] = {}
    if data.val is not None:
        fitted_on = outputs_on("validation", data.val)
        decided_there = fitted_on.logits.argmax(1)
        measures = evaluate.accuracy_measures(decided_there, fitted_on.labels, card.train_counts)
        chosen_by = {"val_top1": measures["top1"], "val_macro": measures["macro"]}
    if card.temperature_from != CROSS_FITTED:
        temperature = evaluate.fit_temperature(fitted_on.logits, fitted_on.labels)
        if bool((fitted_on.logits.argmax(1) == fitted_on.labels).all()):
            temperature = max(temperature, 1.0)  # no error tells how sure it may be: not surer than it is
        card = replace(card, temperature=temperature, temperature_from="train" if data.val is None else "validation")
    temperature = card.temperature
    outputs = outputs_on("test", data.test)
    predictions = outputs.logits.argmax(1)
    bias, vectors = model.head.class_bias(), model.head.class_vectors().detach()
    collapse = collapse_measures(
        statistics,
        vectors,
        None if bias is None else bias.detach(),
        few=tail_mask(card.train_counts),
        full=full,
    )
    collapse |= {"nc4": nc4(decided)} | tail_angles(statistics, vectors, card.train_counts)
    severity = {}
    if recipe.class_tree is not None:
        severity = finite({"mistake_severity": mistake_severity(predictions, outputs.labels, recipe.class_tree)})
    metrics = {
        **evaluate.accuracy_measures(predictions, outputs.labels, card.train_counts),
        **evaluate.calibration_measures(outputs.logits, outputs.labels, temperature),
        **finite(collapse),
        **severity,
        **chosen_by,
        "num_train": len(data.train),
        "num_test": len(data.test),
        "evaluated_on": data.test_is,
        "temperature": temperature,
        "temperature_from": card.temperature_from,
        "classes": evaluate.class_table(predictions, outputs.labels, card.class_names, card.train_counts),
    }
    details = evaluate.picture_details(
        outputs, temperature, statistics, vectors, data.test, card.class_names, card.train_counts
    )
    return Measured(card, metrics, details, evaluate.prediction_arrays(outputs, temperature))


def evaluate_run(
    run: str | Path,
    *,
    device: str = "auto",
    full: bool = False,
    data: str | None = None,
    data_root: str | None = None,
) -> dict[str, object]:
    """Measure a finished run again: its saved model on its own images (``split.json``), nothing written. All files of the run
    are held against their checksums first.

    ``data`` and ``data_root`` say where these images lie now, if not where the run found them.

    Raises:
        InputError: if the folder is not a finished run, or its data has changed.
    """
    model, card, images, numerics, recipe = open_run(run, device=device, data=data, data_root=data_root)
    RunFolder(run).verify()
    return measure(model, card, images, numerics, recipe, full=full).metrics


def open_run(
    run: str | Path, *, device: str = "auto", data: str | None = None, data_root: str | None = None
) -> tuple[Classifier, ModelCard, PreparedData, Numerics, Recipe]:
    """A finished run's model on a device, its own images, and its recipe with ``split`` set to these images.

    ``data`` and ``data_root`` say where these images lie now, if not where the run found them.

    Raises:
        InputError: if the folder is not a finished run, or its data has changed.
    """
    folder = RunFolder(run)
    model, card = load_classifier(run)
    recipe = folder.recipe().with_(device=device, split=str(folder.path / "split.json"))
    moved = {"data": data, "data_root": data_root}
    recipe = recipe.with_(**{name: value for name, value in moved.items() if value is not None})
    images = prepare_data(recipe)
    numerics = choose_numerics(
        model, card.image_size, recipe.batch_size,
        device=recipe.device, precision=recipe.precision, memory_format=recipe.memory_format,
    )  # fmt: skip
    model.to(numerics.device, memory_format=numerics.torch_memory_format)
    return model, card, images, numerics, recipe
