"""The page about a model: a ``README.md`` in the Hugging Face Hub's convention, from what was measured and nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from equiframe.errors import InputError
from equiframe.imbalance import class_groups
from equiframe.method import METHODS

GROUPS = {
    "many": "many: more than 100 training images",
    "medium": "medium: 20 to 100",
    "few": "few: fewer than 20",
    "head": "head: the third with most training images",
    "middle": "middle third",
    "tail": "tail: the third with fewest",
}
CROSS_FITTED = "cross-fit"
FITTED_ON = {  # temperature_from → the images
    "validation": "validation",
    "train": "training",
    CROSS_FITTED: "cross-fitted training",  # each judged by a classifier that had not seen it
}
CLASSES_SHOWN = 40  # of more classes, the smallest
TRAINED_WITH = (
    "epochs", "batch_size", "optimizer", "lr", "schedule", "weight_decay", "augmentation", "mixup", "cutmix", "mix_share", "mix_until",
    "sampler", "ema", "sam", "pretrained", "imbalance", "validation", "seed",
)  # fmt: skip


def model_page(
    name: str,
    description: Mapping[str, object],
    *,
    metrics: Mapping[str, object] | None = None,
    data: str | None = None,
    recipe: Mapping[str, object] | None = None,
    license: str | None = None,
    load_from: str | None = None,
) -> str:
    """The text of a ``README.md``: front matter in YAML, then results by class group, calibration, data, training, limits, use.

    Args:
        name: of the model; the page's title.
        description: the fields of ``model.json``.
        metrics: the content of ``metrics.json``; without it the page says that nothing was measured.
        data: the data set's name.
        recipe: settings of the training; of these `TRAINED_WITH` are told, no paths.
        license: an identifier as ``mit``; None: left to whoever publishes it.
        load_from: the repository or folder in the lines that load it; default ``name``.
    """
    counts = np.asarray(description["train_counts"])
    parts = [
        _front_matter(name, metrics, data, license),
        f"# {_text(name)}\n\n{_what_it_is(description)}",
        _results(description, metrics, data),
        _data(description, metrics, data, counts),
        _training(description, recipe or {}),
        _limits(description, metrics, recipe or {}, counts),
        _use(load_from or name),
    ]
    return "\n\n".join(parts) + "\n"


def _text(value: object) -> str:
    """Text that Markdown and HTML take as it stands."""
    plain = " ".join(str(value).encode(errors="replace").decode().split())
    return "".join(f"&#{ord(c)};" if c in "\\`*_[]<>|#~$&" else c for c in plain)


def _classes(num: int) -> str:
    return "1 class" if num == 1 else f"{num:,} classes"


def _percent(value: object) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _front_matter(name: str, metrics: Mapping | None, data: str | None, license: str | None) -> str:
    try:
        import yaml
    except ImportError as error:
        raise InputError("a model card needs pyyaml: pip install 'equiframe[hub]'") from error

    content: dict[str, object] = {"library_name": "equiframe", "pipeline_tag": "image-classification"}
    content["tags"] = ["image-classification", "imbalanced-classification", "long-tailed-recognition"]
    if license:
        content["license"] = license
    if data and data.startswith("hf:"):
        content["datasets"] = [data.removeprefix("hf:").partition(":")[0]]
    if metrics:
        content["metrics"] = ["accuracy"]
        measured = [
            ("accuracy", "Accuracy", "top1"),
            ("balanced_accuracy", "Balanced accuracy (mean over classes)", "macro"),
        ]
        known = (data or "unnamed").removeprefix("hf:")
        content["model-index"] = [{"name": name, "results": [{
            "task": {"type": "image-classification", "name": "Image classification"},
            "dataset": {"name": known, "type": known, "split": str(metrics["evaluated_on"])},
            "metrics": [
                {"type": kind, "name": label, "value": round(metrics[key], 4)}
                for kind, label, key in measured if metrics.get(key) is not None
            ],
        }]}]  # fmt: skip
    return "---\n" + yaml.safe_dump(content, sort_keys=False, allow_unicode=True) + "---"


def _what_it_is(description: Mapping) -> str:
    method = METHODS.get(str(description["method"]))
    summary = f": {method.summary}" if method else ""
    side = description["image_size"]
    return (
        f"Tells which of {len(description['class_names']):,} classes an image shows. Backbone `{description['backbone']}`, "
        f"images of {side}×{side} pixels, method `{description['method']}`{summary}. Made for classes of very different size, with the Python library "
        "*equiframe*."
    )


def _results(description: Mapping, metrics: Mapping | None, data: str | None) -> str:
    if not metrics:
        return "## Results\n\nNothing was measured, or the measurements were not handed on."
    masks = class_groups(description["train_counts"])
    rows = [
        ["all images (top-1)", "", _percent(metrics["top1"])],
        ["**all classes, each counted once (macro)**", f"{len(description['class_names']):,}", f"**{_percent(metrics['macro'])}**"],
        *([label, f"{int(masks[key].sum()):,}", _percent(metrics[key])] for key, label in GROUPS.items() if metrics.get(key) is not None),
    ]  # fmt: skip
    tested = [c for c in metrics["classes"] if c["accuracy"] is not None]
    worst = min(tested, key=lambda c: c["accuracy"])
    rows.append([f"worst class: {_text(worst['name'])}", "1", _percent(worst["accuracy"])])
    source = str(metrics["temperature_from"])
    return (
        f"## Results\n\n{metrics['num_test']:,} {metrics['evaluated_on']} images of {_text(data or 'the training data')}; the groups are by "
        f"**training** images of a class. Weights: {_text(metrics.get('selected', 'last epoch'))}; tested once.\n\n"
        + _table(["classes", "number", "accuracy, %"], rows)
        + f"\n\n**Calibration.** Expected calibration error {_percent(metrics['ece'])} % (15 bins), mean −log p of the true class "
        f"{metrics['nll']:.3f} nats, on the same images. Probabilities are softmax(logits / {metrics['temperature']:.3g}); that temperature was "
        f"fitted on {FITTED_ON.get(source, source)} images."
    )


def _data(description: Mapping, metrics: Mapping | None, data: str | None, counts: np.ndarray) -> str:
    names = description["class_names"]
    order = np.argsort(-counts, kind="stable")
    shown = order if len(order) <= CLASSES_SHOWN else order[-CLASSES_SHOWN:]
    tested = {i: c for i, c in enumerate(metrics["classes"])} if metrics else {}
    rows = [
        [_text(names[k]), f"{counts[k]:,}", *([f"{tested[k]['num_test']:,}", _percent(tested[k]["accuracy"])] if tested else [])]
        for k in shown.tolist()
    ]  # fmt: skip
    columns = ["class", "training images", *(["test images", "accuracy, %"] if tested else [])]
    ratio = counts.max() / max(counts.min(), 1)
    only = f" The {CLASSES_SHOWN} smallest of {len(order):,} classes:" if len(order) > CLASSES_SHOWN else ""
    return (
        f"## Data\n\n{_text(data) if data else 'Data set'}: {counts.sum():,} training images of {len(counts):,} classes, {counts.max():,} of the largest and "
        f"{counts.min():,} of the smallest (imbalance ratio {ratio:,.4g}).{only}\n\n" + _table(columns, rows)
    )


def _training(description: Mapping, recipe: Mapping) -> str:
    mixes = recipe.get("mixup") or recipe.get("cutmix")
    told_of = [key for key in TRAINED_WITH if mixes or key not in ("mix_share", "mix_until")]
    fields = {key: recipe[key] for key in told_of if recipe.get(key) not in (None, False, 0, 0.0)}
    told = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in fields.items())
    stage = description["method_fields"].get("second_stage", "none")
    lines = [
        f"Method `{description['method']}`" + (f", second stage `{stage}`" if stage not in (None, "none") else "") + "."
    ]
    lines += [f"Settings: {_text(told)}."] if told else []
    return "## Training\n\n" + " ".join(lines)


def _limits(description: Mapping, metrics: Mapping | None, recipe: Mapping, counts: np.ndarray) -> str:
    """What a reader must not expect: the general points, and those that the numbers show."""
    few = int((counts < 20).sum())
    points = [
        "Every image gets one of the classes, also an image of none of them.",
        "The numbers hold for images like those it was tested on; other cameras, places or class shares change them. It was not tested for "
        "fairness, nor against images made to deceive.",
        "One training with one seed: another seed gives other numbers, most of all in small classes.",
    ]
    if few:
        points.append(
            f"{few:,} of {len(counts):,} classes had fewer than 20 training images; their accuracies are the least certain."
        )
    if metrics:
        untested = [c for c in metrics["classes"] if not c["num_test"]]
        thin = [c for c in metrics["classes"] if 0 < c["num_test"] < 20]
        if untested:
            points.append(f"{_classes(len(untested))} had no image in the test and do not count in the table.")
        if thin:
            points.append(f"{_classes(len(thin))} had fewer than 20 test images: accuracies by class are coarse there.")
        if metrics["evaluated_on"] != "test":
            points.append(
                "There were no test images: the results are those of the validation images, on which the temperature was fitted too."
            )
        if metrics["temperature_from"] == "train":
            points.append("The temperature was fitted on training images: probabilities are too confident.")
        if metrics["temperature_from"] == CROSS_FITTED:
            points.append(
                "The temperature was cross-fitted on training images, which the features have seen: probabilities may be too confident."
            )
    if recipe.get("imbalance"):
        points.append(
            "The training set was cut to a long tail on purpose; it is an experiment, not the best model of this data."
        )
    return "## Limits\n\n" + "\n".join(f"- {point}" for point in points)


def _use(load_from: str) -> str:
    quoted = f'"{load_from}"' if re.fullmatch(r"[\w./ -]+", load_from) else '"FOLDER"'
    return f"""## Use

```python
from equiframe import Classifier
from equiframe.predict import find_images, predict

model = Classifier.from_pretrained({quoted})
images = find_images(["photos"])
for image, ranked in zip(images, predict(model, model.card, images, top=3)):
    print(image, ranked)
```

Loading runs no code from the files. `pip install 'equiframe[train,hub]'`; from the shell, after downloading the repository to a folder,
`equiframe predict FOLDER photos/`."""
