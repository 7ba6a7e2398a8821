"""Exported files: what is in them, and how they are read. ``RUN → file`` is `equiframe.export`.

Each file holds the whole way from bytes to probabilities and says what it wants:

.. math:: x = (\\text{images}/255 - \\text{mean})/\\text{std}, \\quad z = W h(x) + b, \\quad p = \\operatorname{softmax}(z/T)

``images`` are uint8 RGB ``(B, 3, S, S)`` for any B; the outputs are ``logits (B, K)`` and ``probabilities (B, K)``, with the temperature T
that was fitted when the run ended. How an image becomes a square of side S is said in the description (``resize``), which every
file carries as text: `ModelCard`'s fields and a ``record`` of how it was made and checked, each value as JSON.

* ``.onnx``: a graph; the description is its metadata. Runs with onnxruntime.
* ``.pt2``: a ``torch.export`` program; the description lies in ``extra/``. **Reading such a file can run code that its maker put in** (pickles,
  expressions that are evaluated), so it is read only where the caller trusts it. The description alone is read without running anything.
* ``.safetensors``: the weights, by equiframe's own names; the description is the header's metadata. The network is built by equiframe.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equiframe.data.batches import normalise
from equiframe.errors import InputError, unknown
from equiframe.heads import affine_map
from equiframe.model import DESCRIPTION_LIMIT, Classifier, ModelCard, restore_classifier
from equiframe.numerics import choose_device

ENDINGS = {".onnx": "onnx", ".pt2": "torch-export", ".safetensors": "safetensors"}
INPUT, OUTPUTS = "images", ("logits", "probabilities")

Run = Callable[[Tensor], tuple[Tensor, Tensor]]  # uint8 images (B, 3, S, S) → logits, probabilities (B, K)


class Deployed(nn.Module):
    """A classifier with all that surrounds it: uint8 ``images (B, 3, S, S)`` → ``logits (B, K)``, ``probabilities (B, K)``.

    The head becomes the affine map that it is, whatever its frame; its BatchNorm and lengths stay.
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, model: Classifier, card: ModelCard) -> None:
        super().__init__()
        self.backbone, self.head = model.backbone, model.head
        self.temperature = card.temperature or 1.0
        weight, bias = affine_map(model.head)
        for name, value in {
            "mean": torch.tensor(card.mean), "std": torch.tensor(card.std),
            "weight": weight.float().cpu(), "bias": bias.float().cpu(),
        }.items():  # fmt: skip
            self.register_buffer(name, value.clone())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(normalise(images, self.mean, self.std, torch.contiguous_format))
        logits = F.linear(self.head.normalise(features), self.weight, self.bias)
        return logits, F.softmax(logits / self.temperature, dim=1)


def as_run(model: Classifier, card: ModelCard, device: torch.device) -> Run:
    """The same of a classifier as it is, without a dense frame; the outputs come to the CPU."""
    model = model.to(device, memory_format=torch.channels_last).eval()  # faster on a CPU than plane by plane
    mean, std = torch.tensor(card.mean, device=device), torch.tensor(card.std, device=device)

    @torch.no_grad()
    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(normalise(images.to(device), mean, std, torch.contiguous_format)).logits.float()
        return _on_cpu((logits, F.softmax(logits / (card.temperature or 1.0), dim=1)))

    return run


def as_ranked(
    model: Classifier, card: ModelCard, device: torch.device
) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """uint8 images and k → the k most probable classes' probabilities and the classes, each ``(B, k)``, on the CPU; on a frame of
    very many classes in bounded memory (`Head.ranked`)."""
    model = model.to(device).eval()
    mean, std = torch.tensor(card.mean, device=device), torch.tensor(card.std, device=device)

    @torch.no_grad()
    def ranked(images: Tensor, k: int) -> tuple[Tensor, Tensor]:
        output = model(normalise(images.to(device), mean, std, torch.channels_last))
        probabilities, classes = model.head.ranked(output.features, k, temperature=card.temperature or 1.0)
        return probabilities.cpu(), classes.cpu()

    return ranked


@dataclass(frozen=True)
class Exported:
    """An exported file, ready to run: ``run(images)`` gives logits and probabilities on the CPU."""

    card: ModelCard
    record: dict[str, object]
    run: Run


# --- the description, as text ------------------------------------------------------------------------------------------


def as_metadata(card: ModelCard, record: Mapping[str, object]) -> dict[str, str]:
    """The description as names and JSON values."""
    return {name: json.dumps(value) for name, value in (asdict(card) | {"record": dict(record)}).items()}


def from_metadata(metadata: Mapping[str, str], name: str) -> tuple[ModelCard, dict[str, object]]:
    """`as_metadata` undone, with every field checked as `ModelCard.from_json` does."""
    known = [*ModelCard.__dataclass_fields__, "record"]
    if "class_names" not in metadata:
        raise InputError(f"{name} has no description of a classifier; was it made by `equiframe export`?")
    try:
        fields = {key: json.loads(metadata[key]) for key in known if key in metadata}
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} has a damaged description: {error}") from error
    record = fields.pop("record", {})
    if not isinstance(record, dict):
        raise InputError(f"{name} has a damaged description: record is no record")
    return ModelCard.from_json(json.dumps(fields), name), record


def resize_in_words(card: ModelCard) -> str:
    """How an image of any size becomes the square that the network takes."""
    return (
        f"RGB; resize the shorter side to {round(card.image_size / card.centre_crop)} (bicubic, antialiased), "
        f"cut the centre {card.image_size}x{card.image_size}; EXIF rotation applied, transparency on white"
    )


# --- reading -----------------------------------------------------------------------------------------------------------


def is_exported(path: str | Path) -> bool:
    """Whether a path is a file that `load_exported` would try to read."""
    return Path(path).is_file() and Path(path).suffix.lower() in ENDINGS


def load_exported(
    path: str | Path, *, device: str = "auto", trust: bool = False, threads: int | None = None
) -> Exported:
    """Read an exported file.

    Args:
        device: where it runs; ONNX files need onnxruntime's provider for it.
        trust: read a ``.pt2`` file, whose maker can put code into it that runs then.
        threads: of onnxruntime; None: as many as torch uses.

    Raises:
        InputError: if it is no such file, is damaged, needs a package that is missing, or is not trusted.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise unknown("kind of exported file", path.suffix, ENDINGS)
    if ENDINGS[ending] == "onnx":
        return _load_onnx(path, device, threads or torch.get_num_threads())
    where = choose_device(device)
    return (
        _load_torch_export(path, where, trust) if ENDINGS[ending] == "torch-export" else _load_safetensors(path, where)
    )


def _on_cpu(outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    logits, probabilities = outputs
    return logits.float().cpu(), probabilities.float().cpu()


def _load_safetensors(path: Path, device: torch.device) -> Exported:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if "class_names" not in metadata and (path.parent / "model.json").is_file():
        raise InputError(f"{path} holds the weights of a run only; give its folder, {path.parent}")
    card, record = from_metadata(metadata, str(path))
    return Exported(card, record, as_run(restore_classifier(card, path, path), card, device))


def _load_torch_export(path: Path, device: torch.device, trust: bool) -> Exported:
    card, record = read_torch_export_description(path)
    if not trust:
        raise InputError(
            f"{path}: reading a .pt2 file can run code that its maker put in; add --trust if that is you or somebody you "
            "trust, or export to onnx or safetensors, which run none"
        )
    try:
        program = torch.export.load(str(path))
        if device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
        module = program.module()
    except Exception as error:  # torch's reader raises all sorts
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())[:300] or repr(error)}") from error
    return Exported(card, record, torch.no_grad()(lambda images: _on_cpu(module(images.to(device)))))


def read_torch_export_description(path: Path) -> tuple[ModelCard, dict[str, object]]:
    """The description in a ``.pt2`` file, which is a zip archive: nothing else of it is touched."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if m.filename.endswith("extra/equiframe.json")]
            if sum(m.file_size for m in members) > DESCRIPTION_LIMIT:
                raise InputError(f"{path}: its description is larger than {DESCRIPTION_LIMIT:,} bytes; refused")
            metadata = json.loads(archive.read(members[0])) if members else {}
    except InputError:
        raise
    except Exception as error:  # a damaged archive makes zipfile raise all sorts
        raise InputError(f"{path} is not a .pt2 file, or damaged: {error}") from error
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(f"{path} has a damaged description")
    return from_metadata(metadata, str(path))


def need(package: str, what: str, extra: str = "export"):
    """A package that is imported when it is needed; `InputError` that names the extra where it is missing."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"{what} needs {package.partition('.')[0]}: pip install 'equiframe[{extra}]'") from error


def _load_onnx(path: Path, device: str, threads: int) -> Exported:
    session = onnx_session(path.read_bytes(), str(path), device=device, threads=threads)
    card, record = from_metadata(session.get_modelmeta().custom_metadata_map, str(path))
    names = [o.name for o in session.get_outputs()]
    if [i.name for i in session.get_inputs()] != [INPUT] or names != list(OUTPUTS):
        raise InputError(f"{path} has other inputs or outputs than `equiframe export` makes")

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        logits, probabilities = session.run(list(OUTPUTS), {INPUT: images.cpu().contiguous().numpy()})
        return torch.from_numpy(logits), torch.from_numpy(probabilities)

    return Exported(card, record, run)


def onnx_session(content: bytes, name: str, *, device: str = "cpu", threads: int = 1):
    """An onnxruntime session of a model given whole, so that it can name no other file. Warnings are kept quiet."""
    onnxruntime = need("onnxruntime", "an ONNX file")
    kind = "cpu" if device == "auto" else device.partition(":")[0]
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(kind)
    if provider not in onnxruntime.get_available_providers():
        raise InputError(f"device {device!r} cannot run ONNX files here; onnxruntime has: " +
                         ", ".join(onnxruntime.get_available_providers()))  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    try:
        return onnxruntime.InferenceSession(content, options, providers=[provider])
    except Exception as error:  # onnxruntime's own exceptions share no base but Exception
        raise InputError(f"{name} is not a readable ONNX file: {' '.join(str(error).split())[:300]}") from error
