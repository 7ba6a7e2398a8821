"""A classifier is a backbone and a head; here it is built, saved and loaded. Loading runs no code from the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from equiframe.backbones import make_backbone
from equiframe.errors import InputError
from equiframe.heads import HeadOutput
from equiframe.method import build_head

FORMAT = 1


class Classifier(nn.Module):
    """``images (B, 3, H, W)`` → backbone → ``features (B, D)`` → head → `HeadOutput`."""

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
        except (ValueError, TypeError) as error:
            raise InputError(f"{name} is not a model description: {error}") from error
        if card.format != FORMAT:
            raise InputError(f"{name} has format {card.format}; this version reads format {FORMAT}")
        return card


def build_classifier(card: ModelCard, *, seed: int = 0, pretrained: bool = False) -> Classifier:
    """A fresh classifier. ``seed`` rotates the frame; other weights come from torch's global generator."""
    backbone = make_backbone(card.backbone, image_size=card.image_size, width=card.width, pretrained=pretrained)
    head = build_head(card.method_fields, backbone.num_features, len(card.class_names), seed=seed)
    return Classifier(backbone, head)


def load_classifier(run: str | Path, device: torch.device | str = "cpu") -> tuple[Classifier, ModelCard]:
    """The trained classifier of a run folder, in evaluation mode.

    Raises:
        InputError: if the folder holds no finished model or its parts do not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    run = Path(run)
    weights, description = run / "model.safetensors", run / "model.json"
    for path in (weights, description):
        if not path.is_file():
            kind = "has not finished training" if (run / "recipe.yaml").is_file() else "is not a run folder"
            inside = sorted(run.glob("*/seed-*/model.json"))
            if inside:
                raise InputError(f"{run} is a comparison; choose one of its runs, such as {inside[0].parent}")
            raise InputError(f"{run} {kind}: {path.name} is missing")
    card = ModelCard.from_json(description.read_bytes(), str(description))
    try:
        model = build_classifier(card)
    except (KeyError, TypeError) as error:
        raise InputError(f"{description} is damaged: {error!r}") from error
    try:
        model.load_state_dict(load_file(weights))
    except (SafetensorError, RuntimeError) as error:
        raise InputError(f"{weights} is damaged or does not fit {description}: {error}") from error
    return model.to(device).eval(), card


def save_classifier(model: Classifier, card: ModelCard, write) -> None:
    """Write ``model.safetensors`` and ``model.json`` through ``write(name, bytes)``."""
    from safetensors.torch import save

    state: Mapping[str, Tensor] = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    write("model.safetensors", save(dict(state)))
    write("model.json", card.to_json().encode())
