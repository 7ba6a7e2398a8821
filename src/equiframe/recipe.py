"""The recipe: all that a run needs, as one flat, typed record that reads from YAML and from command-line flags."""

from __future__ import annotations

import contextlib
import math
import reprlib
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from equiframe.errors import InputError, unknown
from equiframe.files import read_limited


def _option(default, text: str, choices: tuple[str, ...] = ()):
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Recipe:
    """A run, completely. ``None`` in a method field means "as the method says"; ``auto`` is settled before training."""

    # data
    data: str = _option("", "built-in name, folder (of class folders, lists or Parquet), train list, or hf:NAME")
    data_root: str = _option("data", "where the built-in data sets lie, or the images of lists")
    download: bool = _option(False, "download a built-in data set that is missing")
    imbalance: float | None = _option(None, "cut training to a long tail with this ratio n_max/n_min")
    tail: str = _option("exponential", "shape of the long tail", ("exponential", "step", "pareto"))
    class_counts: tuple[int, ...] | None = _option(None, "cut training to these counts, one a class: 500,100,20")
    subset_seed: int = _option(0, "seed of the cut and of the validation split (0 is the papers' protocol)")
    split: str | None = _option(None, "take the exact images of an earlier run's split.json")
    validation: float = _option(0.1, "share of training images held out where no validation split exists; 0: none")
    image_size: int | None = _option(None, "side of the square images; default: by the data")
    data_mode: str = _option(
        "auto", "keep decoded pixels in memory, or decode on the fly", ("auto", "resident", "stream")
    )
    augmentation: str = _option(
        "auto",
        "random changes to training images: auto (a crop by the data), none, or some of crop, crop-flip, "
        "resized-crop-flip, color-jitter, randaugment, autoaugment, cutout, joined by +",
    )
    mixup: float | None = _option(None, "mixup's alpha, such as 1; 0: off; default: the method's, mostly off")
    cutmix: float | None = _option(None, "cutmix's alpha, likewise. With mixup, each batch takes one of the two")
    remix: bool | None = _option(None, "targets of mixed images favour the smaller class (Chou 2020)")
    mix_share: str | None = _option(
        None,
        "mix all batches, or as large a share of them as the network had right of those not mixed in the epoch before (known); "
        "default: the method's, mostly all",
        ("all", "known"),
    )
    mix_until: float | None = _option(
        None,
        "mix for this share of the run; 0.8: until the learning rate falls (He 2019); default: the method's, mostly 1",
    )
    sampler: str | None = _option(
        None,
        "which images make an epoch; default: the method's, mostly instance",
        ("instance", "class-balanced", "square-root", "effective-number", "progressive"),
    )
    centre_crop: float = _option(
        1.0, "streamed images: share of the shorter side that is evaluated; 0.875: 256 to 224, usual for ImageNet"
    )
    draft: bool = _option(
        False, "streamed training images: decode large JPEGs at 1/2, 1/4 or 1/8 where twice the side is left"
    )
    on_bad_image: str = _option(
        "error", "an image that cannot be read ends the run, or is left out (all are decoded once)", ("error", "skip")
    )
    workers: int | None = _option(None, "decoding threads; default: one for each core")
    # method
    method: str = _option("etf-mix-blend", "named method (equiframe methods lists them)")
    head: str | None = _option(None, "override the method's head")
    loss: str | None = _option(None, "override the method's loss")
    geometry: str | None = _option(None, "frame: auto, simplex, orthoplex, kerdock, gold, embedded, code, tree")
    projection: str | None = _option(
        None,
        "frame, cosine: features as they are (none), or a learned linear map of them to K-1 dimensions where a simplex needs it (auto)",
        ("none", "auto"),
    )
    capacity: int | None = _option(None, "frame: classes that it has vectors for; those beyond the data's are reserved")
    frame_order: str | None = _option(None, "frame: which class gets which vector: given, random, apart, together")
    frame_order_after: float | None = _option(
        None,
        "frame_order apart, together: by class means of the features after this share of the run; 0: by mean images",
    )
    class_tree: tuple[int, ...] | None = _option(
        None, "group of each class, as 0,0,1,1,2: measures mistake severity; geometry tree and frame_order follow it"
    )
    sibling_cosine: float | None = _option(None, "geometry tree: cosine between classes of a group")
    e_w: float | None = _option(None, "frame: squared length of class vectors, E_W")
    norm: str | None = _option(None, "head: batch or none, before the length is set")
    length: str | None = _option(None, "head: unit or free feature length")
    logit_scale: float | None = _option(None, "head: factor from inner products to logits")
    e_h: float | None = _option(None, "head: squared length of features, E_H")
    frame_rate: float | None = _option(None, "nearest-frame: weight of a batch in the running class means")
    class_weighting: str | None = _option(
        None, "loss: none, batch-balanced, class-balanced, effective-number or effective-number-mean"
    )
    reweight_from: float | None = _option(None, "loss: share of the run after which the class weighting begins")
    effective_beta: float | None = _option(None, "class weighting effective-number: beta")
    alignment: float | None = _option(None, "loss: weight of the features' transport cost to the frame (DisA); 0: off")
    sampled_classes: int | None = _option(None, "loss sampled-ce: how many classes are drawn a step")
    label_smoothing: float | None = _option(None, "loss: label smoothing")
    tau: float | None = _option(None, "loss: strength of logit adjustment")
    vs_gamma: float | None = _option(None, "loss vs: exponent of the factor (n_k/n_max)^gamma on the logits")
    focal_gamma: float | None = _option(None, "loss focal: exponent of 1 - p")
    max_margin: float | None = _option(None, "loss ldam: the largest margin, of the smallest class")
    mse_kappa: float | None = _option(None, "loss mse: weight of the target's own term")
    mse_target: float | None = _option(None, "loss mse: what the target's logit should be, M")
    length_penalty: float | None = _option(None, "loss dr-released: weight of the mean feature length")
    second_stage: str | None = _option(
        None,
        "after training: crt, crt-adjusted, crt-blend, tau-norm, lws, label-aware-smoothing, ncm, ncm-euclidean, post-hoc or none",
    )
    stage_tau: float | None = _option(None, "second stages tau-norm, post-hoc: τ; default: chosen on validation images")
    # network
    backbone: str = _option("auto", "resnet20/32/44/56/110, densenet150, mlp, or a timm name; auto: by image size")
    width: int | None = _option(None, "base width of our own backbones")
    pretrained: bool = _option(False, "timm's pretrained weights")
    # optimisation
    epochs: int = _option(30, "passes over the training images")
    batch_size: int = _option(128, "images of a forward pass, of all processes together")
    accumulate: int = _option(1, "forward passes a step: a step is this times --batch-size images")
    sync_batch_norm: bool = _option(True, "several processes: BatchNorm sees the batch of all, as one process does")
    shard: bool = _option(
        False,
        "several processes: each keeps a part of the backbone's weights and of what the optimiser knows of them (FSDP2)",
    )
    optimizer: str = _option("sgd", "sgd, or adamw (with a --lr of about 0.001)", ("sgd", "adamw"))
    lr: float = _option(0.1, "peak learning rate")
    momentum: float = _option(0.9, "momentum of SGD, beta1 of AdamW")
    weight_decay: float = _option(1e-3, "weight decay on all parameters")
    layer_decay: float = _option(
        1.0, "timm: each group of layers learns at this times the rate of the one above; 1: off"
    )
    sam: float = _option(0.0, "sharpness-aware steps of this radius, twice the work (0.05 is usual); 0: off")
    ema: float = _option(
        0.0, "evaluate and save a moving average of the weights with this decay, such as 0.999; 0: off"
    )
    schedule: str = _option(
        "steps", "steps: x0.1 after 80 %, x0.01 after 90 % (the paper's); or cosine", ("steps", "cosine")
    )
    warmup: float = _option(0.025, "share of the run with linearly rising learning rate")
    seed: int = _option(0, "seed of the frame, the weights and the order of data")
    on_nonfinite: str = _option(
        "stop",
        "a loss or gradient that is not finite ends the run, or its step is left out and listed",
        ("stop", "skip"),
    )
    # records
    track: str = _option(
        "collapse",
        "recorded each epoch, with commas: none, collapse (of up to 2,000 training and test images), "
        "collapse-all (every measure, all images), gradients, test (accuracy on test images)",
    )
    log: str = _option("none", "live view: tensorboard writes events into the run folder", ("none", "tensorboard"))
    # machine
    device: str = _option("auto", "cpu, cuda, cuda:1, mps")
    precision: str = _option(
        "auto",
        "auto: float32 or bfloat16, the faster in a short trial; float16 scales its loss (for GPUs without bfloat16)",
        ("auto", "float32", "bfloat16", "float16"),
    )
    memory_format: str = _option("auto", "auto: the fastest of a short trial", ("auto", "contiguous", "channels-last"))
    compile: str = _option(
        "off",
        "torch.compile the backbone (needs a C++ compiler on CPU); auto: where a trial says so",
        ("auto", "on", "off"),
    )
    deterministic: bool = _option(False, "only algorithms that give the same bits each time (on a GPU; slower)")

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(Recipe)
        for f in fields(self):
            value = _typed(f.name, getattr(self, f.name), hints[f.name])
            object.__setattr__(self, f.name, value)
            choices = f.metadata["choices"]
            if choices and value is not None and value not in choices:
                raise unknown(f.name.replace("_", " "), value, choices)
        # BatchNorm needs two images a step; a CIFAR ResNet needs four pixels a side
        for name, least in {
            "epochs": 1,
            "batch_size": 2,
            "accumulate": 1,
            "workers": 1,
            "image_size": 4,
            "width": 1,
        }.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} must be at least {least}, got {value}")
        for name, low, high in (("validation", 0, 0.9), ("warmup", 0, 1), ("momentum", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise InputError(f"{name} must be between {low} and {high}, got {getattr(self, name)}")
        if not 0 < self.layer_decay <= 1:
            raise InputError(f"layer_decay must be above 0 and at most 1, got {self.layer_decay}")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema must be at least 0 and below 1, got {self.ema}")
        for name in ("lr", "weight_decay", "mixup", "cutmix", "sam", "seed", "subset_seed"):
            if (getattr(self, name) or 0) < 0:
                raise InputError(f"{name} must not be negative, got {getattr(self, name)}")
        for name, bits in (("seed", 63), ("subset_seed", 32)):  # what the generators of torch and NumPy take
            if getattr(self, name) >= 1 << bits:
                raise InputError(f"{name} must be below 2^{bits}, got {getattr(self, name)}")
        if self.mix_until is not None and not 0 < self.mix_until <= 1:
            raise InputError(f"mix_until must be above 0 and at most 1, got {self.mix_until}")
        if not 0.1 <= self.centre_crop <= 1:
            raise InputError(f"centre_crop must be between 0.1 and 1, got {self.centre_crop}")
        if self.precision == "float16" and self.sam:
            raise InputError(
                "sharpness-aware steps need a gradient that is not scaled; take --precision float32 or bfloat16"
            )
        for name, off in {"ema": 0.0, "compile": "off"}.items():
            if self.shard and getattr(self, name) != off:
                raise InputError(
                    f"a sharded backbone cannot do {name} {getattr(self, name)}; take {name} {off}, or train without --shard"
                )
        if self.shard and self.precision == "float16":
            raise InputError("a sharded backbone cannot scale its loss; take --precision bfloat16 or float32")
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
PACKAGED_RECIPES = Path(__file__).with_name("recipes")
# which images train and are tested, and how they are read
DATA_FIELDS = (
    "data", "data_root", "imbalance", "tail", "class_counts", "subset_seed", "split", "validation", "image_size",
    "data_mode", "augmentation", "centre_crop", "draft", "on_bad_image",
)  # fmt: skip
RENAMED = {"profile": "tail"}  # fields of recipes that were written under an earlier name
WITHOUT_EFFECT = ("workers", "data_root", "download", "track", "log", "shard")  # fields that do not decide the result


_SHORT = reprlib.Repr()  # a few lines of YAML may stand for gigabytes
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong = 2, 80, 80
RECIPE_LIMIT = 1 << 20  # bytes


def _typed(name: str, value: object, hint: object) -> object:
    """Check (and where harmless convert) a value against the field's annotation."""
    if name == "compile":  # true and false in earlier recipes; YAML reads a bare on and off so, too
        value = {"true": "on", "false": "off"}.get(str(value).lower(), value)
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
    raise InputError(f"field {name!r} must be {label}, got {_SHORT.repr(value)}")


def packaged_recipes() -> dict[str, str]:
    """The recipes that come with the package: name and first line."""
    files = sorted(PACKAGED_RECIPES.glob("*.yaml"), key=lambda file: file.stem)
    return {file.stem: file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for file in files}


def load_recipe(path: str | Path) -> dict[str, object]:
    """The fields that a YAML file states (only what differs from the defaults needs to be there).

    Text without a folder and an ending names one of `packaged_recipes`.
    """
    import yaml

    if str(path) == Path(path).stem:
        if path not in packaged_recipes():
            raise unknown("recipe", path, packaged_recipes())
        path = PACKAGED_RECIPES / f"{path}.yaml"
    try:
        content = yaml.safe_load(read_limited(Path(path), RECIPE_LIMIT).decode("utf-8"))
    except OSError as error:
        raise InputError(f"cannot read recipe {path}: {error.strerror}") from error
    except InputError:
        raise
    except (
        Exception
    ) as error:  # hostile text makes PyYAML raise more than its own: ValueError, IndexError, RecursionError
        raise InputError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise InputError(f"recipe {path} must be a mapping of fields, got {type(content).__name__}")
    content = {RENAMED.get(name, name): value for name, value in content.items()}
    for name in content:
        if name not in FIELD_NAMES:
            raise unknown("field", name, FIELD_NAMES)
    return content


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every field."""
    import yaml

    return yaml.safe_dump(recipe.to_dict(), sort_keys=False)


def setting_from_text(text: str) -> tuple[str, object]:
    """``"lr=0.05"`` → ``("lr", 0.05)``: a field of the recipe and its value, of the field's own kind.

    Raises:
        InputError: if it is not FIELD=VALUE, the field is unknown (names the nearest), or the value of another kind.
    """
    name, equals, value = text.partition("=")
    name = name.strip().replace("-", "_")
    if not equals:
        raise InputError(f"a setting must be FIELD=VALUE, got {text!r}")
    if name not in FIELD_NAMES:
        raise unknown("field", name, FIELD_NAMES)
    hint = typing.get_type_hints(Recipe)[name]
    return name, _typed(name, _from_text(value.strip(), hint), hint)


def _from_text(text: str, hint: object) -> object:
    """A value as the command line would read it; text that does not fit stays text, which `_typed` refuses."""
    kind = next(k for k in (typing.get_args(hint) or (hint,)) if k is not type(None))
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    with contextlib.suppress(ValueError):
        if kind is int:
            return int(text)
        if typing.get_origin(hint) is tuple or typing.get_origin(kind) is tuple:
            return tuple(int(part) for part in text.split(","))
    return text


def setting_to_text(name: str, value: object) -> str:
    """The shortest text that `setting_from_text` reads as this setting."""
    if isinstance(value, bool):
        return f"{name}={str(value).lower()}"
    if isinstance(value, tuple):
        return f"{name}={','.join(map(str, value))}"
    return f"{name}={repr(value).removesuffix('.0') if isinstance(value, float) else value}"
