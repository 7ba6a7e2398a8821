"""A classifier is a backbone and a head; here it is built, saved and loaded. Loading runs no code from the file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from equiframe.backbones import OWN_BACKBONES, make_backbone
from equiframe.errors import InputError
from equiframe.files import read_limited, verify
from equiframe.heads import HeadOutput
from equiframe.method import build_head

FORMAT = 1
DESCRIPTION_LIMIT = 256 << 20  # bytes of model.json; a million classes need a tenth of it


class Classifier(nn.Module):
    """``images (B, 3, H, W)`` → backbone → ``features (B, D)`` → head → `HeadOutput`.

    Attributes:
        card: what it is and how to feed it, where it was loaded; None where it was built.
    """

    card: ModelCard | None = None

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> HeadOutput:
        return self.head(self.backbone(images))


@dataclass(frozen=True)
class ModelCard:
    """All that is needed to build a classifier again and to feed it: the content of ``model.json``."""

    backbone: str
    width: int | None
    image_size: int
    class_names: list[str]
    train_counts: list[int]
    mean: list[float]
    std: list[float]
    method: str
    method_fields: dict[str, object]
    centre_crop: float = 1.0
    temperature: float | None = None
    temperature_from: str | None = None
    format: int = FORMAT

    def to_json(self) -> str:
        return json.dumps(self.__dict__, indent=1)

    @staticmethod
    def from_json(text: str | bytes, name: str) -> ModelCard:
        try:
            content = json.loads(text)
            card = ModelCard(**content)
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{name} is not a model description: {error}") from error
        if card.format != FORMAT:
            raise InputError(f"{name} has format {card.format}; this version reads format {FORMAT}")
        for what, held in card._schema().items():
            if not held:
                raise InputError(f"{name} is not a model description: {what}")
        return card

    def _schema(self) -> dict[str, bool]:
        """What must hold of a card, whoever wrote it. The sizes are far beyond use, and small enough to refuse in time."""

        def whole(value: object, low: int, high: int) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

        def number(value: object) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

        def each(values: object, holds: Callable[[object], bool]) -> bool:
            return isinstance(values, list) and all(map(holds, values))

        return {
            "backbone must be text": isinstance(self.backbone, str),
            "width must be a whole number from 1 to 4,096": self.width is None or whole(self.width, 1, 4096),
            "image_size must be a whole number from 1 to 4,096": whole(self.image_size, 1, 4096),
            "class_names must be a list of texts": each(self.class_names, lambda name: isinstance(name, str)),
            "train_counts must be a list of whole numbers": each(self.train_counts, lambda n: whole(n, 0, 1 << 53)),
            "as many train_counts as class_names": len(self.train_counts) == len(self.class_names) >= 2
            if isinstance(self.train_counts, list) and isinstance(self.class_names, list) else False,
            "mean must be three numbers": each(self.mean, number) and len(self.mean) == 3,
            "std must be three numbers above 0": each(self.std, lambda x: number(x) and x > 0) and len(self.std) == 3,
            "method must be text": isinstance(self.method, str),
            "method_fields must be a record": isinstance(self.method_fields, dict),
            "centre_crop must be a number from 0.1 to 1": number(self.centre_crop) and 0.1 <= self.centre_crop <= 1,
            "temperature must be a number above 0": self.temperature is None
            or (number(self.temperature) and self.temperature > 0),
        }  # fmt: skip


def build_classifier(card: ModelCard, *, seed: int = 0, pretrained: bool = False) -> Classifier:
    """A fresh classifier. ``seed`` rotates the frame; other weights come from torch's global generator."""
    backbone = make_backbone(card.backbone, image_size=card.image_size, width=card.width, pretrained=pretrained)
    head = build_head(card.method_fields, backbone.num_features, len(card.class_names), seed=seed)
    return Classifier(backbone, head)


def load_classifier(run: str | Path, device: torch.device | str = "cpu") -> tuple[Classifier, ModelCard]:
    """The trained classifier of a run folder (or of a folder that `save_pretrained` made), in evaluation mode.

    Raises:
        InputError: if the folder holds no finished model or its parts do not fit.
    """
    run = Path(run)
    weights, description = run / "model.safetensors", run / "model.json"
    if not description.is_file() and (run / "config.json").is_file():  # the Hub's name of it
        description = run / "config.json"
    for path in (weights, description):
        if not path.is_file():
            kind = "has not finished training" if (run / "recipe.yaml").is_file() else "is not a run folder"
            inside = sorted(run.glob("*/seed-*/model.json"))
            if inside:
                raise InputError(f"{run} is a comparison; choose one of its runs, such as {inside[0].parent}")
            raise InputError(f"{run} {kind}: {path.name} is missing")
    text = read_limited(description, DESCRIPTION_LIMIT)
    card = ModelCard.from_json(text, str(description))
    model = restore_classifier(card, weights, description)
    verify(run, description.name, text)
    verify(run, weights.name, weights.read_bytes())
    return model.to(device), card


def restore_classifier(card: ModelCard, weights: Path, description: Path) -> Classifier:
    """The classifier that a card describes, with the weights of a safetensors file, in evaluation mode.

    Raises:
        InputError: if they do not fit each other; ``description`` is where the card came from.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _check_size(card, weights, description)
    try:
        model = build_classifier(card)
    except InputError:
        raise
    except Exception as error:  # whatever a description that nobody wrote makes of the parts
        raise InputError(f"{description} is damaged: {error!r}") from error
    try:
        state, expected = load_file(weights), model.state_dict()
        for name in state.keys() & expected.keys():
            if state[name].dtype != expected[name].dtype:
                raise RuntimeError(f"{name} is {state[name].dtype}, not {expected[name].dtype}")
        model.load_state_dict(state)
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        raise InputError(f"{weights} is damaged or does not fit {description}: {error}") from error
    model.card = card
    return model.eval()


def _check_size(card: ModelCard, weights: Path, description: Path) -> None:
    """Refuse a description of our own backbones that asks for more memory than the weights have: before it is taken."""
    if card.backbone in OWN_BACKBONES:
        with torch.device("meta"):
            backbone = make_backbone(card.backbone, image_size=card.image_size, width=card.width)
        needed = sum(p.numel() * p.element_size() for p in backbone.parameters())
        if needed > weights.stat().st_size:
            raise InputError(f"{weights} is damaged or does not fit {description}: its backbone has {needed:,} bytes")


def save_classifier(model: Classifier, card: ModelCard, write) -> None:
    """Write ``model.safetensors`` and ``model.json`` through ``write(name, bytes)``."""
    from safetensors.torch import save

    state: Mapping[str, Tensor] = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    write("model.safetensors", save(dict(state)))
    write("model.json", card.to_json().encode())
