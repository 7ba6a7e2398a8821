"""The recipe: all that a run needs, as one flat, typed record that reads from YAML and from command-line flags."""

from __future__ import annotations

import contextlib
import math
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from equiframe.errors import InputError, unknown


def _option(default, text: str, choices: tuple[str, ...] = ()):
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Recipe:
    """A run, completely. ``None`` in a method field means "as the method says"; ``auto`` is settled before training."""

    # data
    data: str = _option("", "built-in name, folder of class folders, or folder of Parquet files")
    data_root: str = _option("data", "where the built-in data sets lie")
    download: bool = _option(False, "download a built-in data set that is missing")
    imbalance: float | None = _option(None, "cut training to a long tail with this ratio n_max/n_min")
    profile: str = _option("exponential", "shape of the long tail", ("exponential", "step", "pareto"))
    class_counts: tuple[int, ...] | None = _option(None, "cut training to these counts, one a class: 500,100,20")
    subset_seed: int = _option(0, "seed of the cut and of the validation split (0 is the papers' protocol)")
    split: str | None = _option(None, "take the exact images of an earlier run's split.json")
    validation: float = _option(0.1, "share of training images held out where no validation split exists; 0: none")
    image_size: int | None = _option(None, "side of the square images; default: by the data")
    data_mode: str = _option(
        "auto", "keep decoded pixels in memory, or decode on the fly", ("auto", "resident", "stream")
    )
    augmentation: str = _option(
        "auto", "random changes to training images", ("auto", "none", "crop", "crop-flip", "resized-crop-flip")
    )
    mixup: float = _option(1.0, "mixup's alpha; 0: off")
    workers: int = _option(2, "decoding threads")
    # method
    method: str = _option("etf-la", "named method (equiframe methods lists them)")
    head: str | None = _option(None, "override the method's head")
    loss: str | None = _option(None, "override the method's loss")
    geometry: str | None = _option(None, "frame: auto, simplex, orthoplex, kerdock, gold, embedded, code")
    e_w: float | None = _option(None, "frame: squared length of class vectors, E_W")
    norm: str | None = _option(None, "head: batch or none, before the length is set")
    length: str | None = _option(None, "head: unit or free feature length")
    logit_scale: float | None = _option(None, "head: factor from inner products to logits")
    e_h: float | None = _option(None, "head: squared length of features, E_H")
    class_weighting: str | None = _option(None, "loss: none, batch-balanced or class-balanced")
    label_smoothing: float | None = _option(None, "loss: label smoothing")
    tau: float | None = _option(None, "loss: strength of logit adjustment")
    length_penalty: float | None = _option(None, "loss dr-released: weight of the mean feature length")
    # network
    backbone: str = _option("auto", "resnet20/32/44/56/110, densenet150, mlp, or a timm name; auto: by image size")
    width: int | None = _option(None, "base width of our own backbones")
    pretrained: bool = _option(False, "timm's pretrained weights")
    # optimisation
    epochs: int = _option(30, "passes over the training images")
    batch_size: int = _option(128, "images a step")
    lr: float = _option(0.1, "peak learning rate of SGD")
    momentum: float = _option(0.9, "momentum of SGD")
    weight_decay: float = _option(2e-4, "weight decay on all parameters")
    schedule: str = _option(
        "steps", "steps: x0.1 after 80 %, x0.01 after 90 % (the paper's); or cosine", ("steps", "cosine")
    )
    warmup: float = _option(0.025, "share of the run with linearly rising learning rate")
    seed: int = _option(0, "seed of the frame, the weights and the order of data")
    # records
    track: str = _option(
        "collapse", "recorded each epoch: none, collapse (on up to 2,000 images), collapse-all, gradients; with commas"
    )
    log: str = _option("none", "live view: tensorboard writes events into the run folder", ("none", "tensorboard"))
    # machine
    device: str = _option("auto", "cpu, cuda, cuda:1, mps")
    precision: str = _option("auto", "auto: the fastest of a short trial", ("auto", "float32", "bfloat16"))
    memory_format: str = _option("auto", "auto: the fastest of a short trial", ("auto", "contiguous", "channels-last"))
    compile: bool = _option(False, "torch.compile the backbone (needs a C++ compiler on CPU)")

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(Recipe)
        for f in fields(self):
            value = _typed(f.name, getattr(self, f.name), hints[f.name])
            object.__setattr__(self, f.name, value)
            choices = f.metadata["choices"]
            if choices and value not in choices:
                raise unknown(f.name.replace("_", " "), value, choices)
        # BatchNorm needs two images a step; a CIFAR ResNet needs four pixels a side
        for name, least in {"epochs": 1, "batch_size": 2, "workers": 1, "image_size": 4, "width": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} must be at least {least}, got {value}")
        for name, low, high in (("validation", 0, 0.9), ("warmup", 0, 1), ("momentum", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise InputError(f"{name} must be between {low} and {high}, got {getattr(self, name)}")
        for name in ("lr", "weight_decay", "mixup", "seed", "subset_seed"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must not be negative, got {getattr(self, name)}")
        for name, bits in (("seed", 63), ("subset_seed", 32)):  # what the generators of torch and NumPy take
            if getattr(self, name) >= 1 << bits:
                raise InputError(f"{name} must be below 2^{bits}, got {getattr(self, name)}")
        if self.imbalance is not None and self.class_counts is not None:
            raise InputError("give imbalance or class_counts, not both")

    def with_(self, **changes: object) -> Recipe:
        """A copy with some fields changed; an unknown field is an error that names the nearest."""
        for name in changes:
            if name not in FIELD_NAMES:
                raise unknown("field", name, FIELD_NAMES)
        return replace(self, **changes)

    def to_dict(self) -> dict[str, object]:
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


FIELD_NAMES = tuple(f.name for f in fields(Recipe))
WITHOUT_EFFECT = ("workers", "data_root", "download", "track", "log")  # fields that do not decide the result


def _typed(name: str, value: object, hint: object) -> object:
    """Check (and where harmless convert) a value against the field's annotation."""
    options = typing.get_args(hint) if type(None) in typing.get_args(hint) else (hint,)
    if value is None and type(None) in options:
        return None
    kind = next(o for o in options if o is not type(None))
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)  # also from text: YAML takes 1e-3 for a word
            if math.isfinite(number):
                return number
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind in (str, bool) and isinstance(value, kind):
        return value
    if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(_typed(name, v, int) for v in value)
    label = "a list of whole numbers" if typing.get_origin(kind) is tuple else {
        float: "a finite number", int: "a whole number", bool: "true or false", str: "text"}[kind]  # fmt: skip
    raise InputError(f"field {name!r} must be {label}, got {value!r}")


def load_recipe(path: str | Path) -> dict[str, object]:
    """The fields that a YAML file states (only what differs from the defaults needs to be there)."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read recipe {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise InputError(f"recipe {path} must be a mapping of fields, got {type(content).__name__}")
    for name in content:
        if name not in FIELD_NAMES:
            raise unknown("field", name, FIELD_NAMES)
    return dict(content)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every field."""
    import yaml

    return yaml.safe_dump(recipe.to_dict(), sort_keys=False)
