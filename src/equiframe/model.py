"""A classifier is a backbone and a head; here it is built, saved and loaded. Loading runs no code from the file."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from equiframe.backbones import OWN_BACKBONES, make_backbone
from equiframe.errors import InputError
from equiframe.files import atomic_write, read_limited, verify
from equiframe.heads import HeadOutput
from equiframe.method import build_head
from equiframe.modelcard import model_page

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

    # --- the Hugging Face Hub's convention: model.safetensors, config.json (what a run calls model.json), README.md -----

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> Classifier:
        """A trained classifier from a folder (a run, or one that `save_pretrained` made) or a repository of the Hub, in evaluation
        mode, with its ``card``. Runs no code from the files. What is not a folder and looks like ``owner/name`` is asked of the Hub.

        Raises:
            InputError: if there is no such folder or repository, or its files do not fit each other.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = _download(
                str(pretrained_model_name_or_path), revision=revision, cache_dir=cache_dir, force_download=force_download,
                local_files_only=local_files_only, token=token,
            )  # fmt: skip
        return load_classifier(folder, device)[0]

    def save_pretrained(self, save_directory: str | Path, *, name: str | None = None, **page: object) -> Path:
        """Write ``model.safetensors``, ``config.json`` and a ``README.md`` (`model_page`, which takes ``page``: ``metrics``, ``data``, ``recipe``,
        ``license``) into a folder.

        Raises:
            InputError: if the classifier has no ``card``, or the folder holds a run.
        """
        folder = Path(save_directory)
        if self.card is None:
            raise InputError(
                "this classifier has no card; set model.card, a ModelCard, which says how images are to be fed"
            )
        if (folder / "recipe.yaml").is_file():
            raise InputError(f"{folder} holds a run, whose weights this would replace; choose another folder")
        text = model_page(name or folder.resolve().name, self.card.__dict__, **page)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot create {folder}: {error.strerror}") from error
        files: dict[str, bytes] = {}
        save_classifier(self, self.card, files.__setitem__)
        files["config.json"] = files.pop("model.json")
        for file, content in (files | {"README.md": text.encode()}).items():
            atomic_write(folder / file, content)
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload an equiframe classifier",
        **page: object,
    ) -> str:
        """`save_pretrained` into a repository of the Hub, made if it does not exist; returns its address.

        Raises:
            InputError: without the library, or if the Hub refuses.
        """
        hub = _hub(f"pushing to {repo_id}")
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, name=repo_id, **page)
            try:
                api = hub.HfApi(token=token)
                made = api.create_repo(repo_id, private=private, exist_ok=True)
                api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message=commit_message)
            except Exception as error:  # the library and its network clients raise all sorts
                raise InputError(f"{repo_id} could not be pushed: {_short(error)}") from error
        return str(made)


def _hub(what: str):
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError(f"{what} needs huggingface_hub: pip install 'equiframe[hub]'") from error
    return huggingface_hub


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _download(repo_id: str, **options: object) -> Path:
    """The files of a repository of the Hub that `load_classifier` reads, in the library's cache."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo_id) or repo_id.startswith("."):
        raise InputError(f"no such folder: {repo_id}")
    hub = _hub(f"no folder {repo_id} exists, and asking the Hub")
    wanted = ["model.safetensors", "config.json", "model.json"]
    try:
        return Path(hub.snapshot_download(repo_id, allow_patterns=wanted, **options))
    except Exception as error:  # the library and its network clients raise all sorts
        raise InputError(f"no folder {repo_id} exists, and the Hub did not give it: {_short(error)}") from error


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
    if not run.exists():
        raise InputError(f"no such run folder: {run}")
    for path in (weights, description):
        if not path.is_file():
            kind = "has not finished training" if (run / "recipe.yaml").is_file() else "is not a run folder"
            inside = sorted(run.glob("*/seed-*/model.json"))
            if inside:
                raise InputError(f"{run} is a comparison; choose one of its runs, such as {inside[0].parent}")
            more = f"; continue with: equiframe train --resume --out {run}" if "finished" in kind else ""
            raise InputError(f"{run} {kind}: {path.name} is missing{more}")
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
