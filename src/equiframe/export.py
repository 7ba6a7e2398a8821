"""A finished run → one file that a server takes: ONNX, ``torch.export``, or safetensors (what is in it: `equiframe.deployed`).

Nothing is written before it was checked: the file is read again and run on images of the run's own data, and what was found
is written into it. Int8 is onnxruntime's quantiser.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from equiframe.data.sources import ImageSet
from equiframe.deployed import (
    ENDINGS,
    INPUT,
    OUTPUTS,
    Deployed,
    Exported,
    as_metadata,
    as_run,
    load_exported,
    need,
    resize_in_words,
)
from equiframe.errors import InputError, unknown
from equiframe.evaluate import Outputs, accuracy_measures, calibration_measures
from equiframe.files import atomic_write
from equiframe.measure import open_run
from equiframe.model import Classifier, ModelCard, load_classifier
from equiframe.numerics import Numerics
from equiframe.recipe import Recipe
from equiframe.tracking import make_loader, tracked_positions

FORMATS = {name: ending for ending, name in ENDINGS.items()}
QUANTISERS = ("static", "dynamic")
CALIBRATION_IMAGES = 512
TOLERANCE = 1e-3  # of logits, relative to the largest: float32 sums in another order differ by 1e-5
ONNX_LIMIT = 2 << 30  # bytes of a protobuf

Say = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """Where batches of a run's own images come from, as bytes."""

    card: ModelCard
    numerics: Numerics
    recipe: Recipe

    def batches(self, images: ImageSet, batch_size: int = 128) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 ``(B, 3, S, S)`` and labels, in order."""
        yield from make_loader(images, self.card, self.numerics, self.recipe).ordered_pixels(batch_size)


def export_run(
    run: str | Path,
    format: str,
    out: str | Path | None = None,
    *,
    int8: str | None = None,
    images: int = 512,
    data: str | None = None,
    data_root: str | None = None,
    say: Say = lambda text: None,
) -> dict[str, object]:
    """Write a finished run as one file, checked on its own images.

    Args:
        format: ``onnx``, ``torch-export`` or ``safetensors``.
        out: the file, with the format's ending; default ``model.onnx``, ``model.int8.onnx``, ``model.pt2`` or ``exported.safetensors`` in
            the run folder.
        int8: ``static`` (activations calibrated on training images) or ``dynamic``: 8-bit weights and activations, ONNX only.
            Accuracy by class group is measured before and after, on all test images.
        images: test images that the file is checked on, evenly spaced; 0: none, and the file says so.
        data, data_root: where the run's images lie now, if not where the run found them.

    Returns:
        the ``record`` that the file holds, and its ``path`` and ``bytes``.

    Raises:
        InputError: wrong input, a package that is missing, or a file that does not agree with the run (it is not kept).
    """
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    if int8 is not None and int8 not in QUANTISERS:
        raise unknown("kind of int8", int8, QUANTISERS)
    if int8 is not None and format != "onnx":
        raise InputError(f"int8 is onnxruntime's, for format onnx, not {format}")
    if images < 0:
        raise InputError(f"images must be at least 0, got {images}")
    path = _target(Path(run), format, out, int8)
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            need(package, "format onnx")
    source = tested = None
    if images or int8:
        model, card, prepared, numerics, recipe = open_run(run, device="cpu", data=data, data_root=data_root)
        source, tested = Source(card, numerics, recipe), prepared.test
    else:
        model, card = load_classifier(run)
    model = model.to("cpu", memory_format=torch.contiguous_format)
    say(f"writing {format}")
    record: dict[str, object] = {"format": format, "made_by": _versions(format), "run": Path(run).name}
    record |= {"input": _input_in_words(card), "resize": resize_in_words(card), "parity": None}
    write = WRITERS[format](model, card)
    reference = as_run(model, card, torch.device("cpu"))
    if int8:
        training = prepared.train.subset(_calibration_positions(prepared.train.labels, len(card.class_names)))
        say(f"int8, {int8}" + (f": calibrating on {len(training)} training images" if int8 == "static" else ""))
        graph = write({})
        small = quantise(graph, int8, [pixels for pixels, _ in source.batches(training, 32)])
        record["int8"] = {
            "kind": int8,
            "calibration": f"{len(training)} training images, class by class" if int8 == "static" else None,
            "bytes_float32": len(graph), "bytes_int8": len(small),
        }  # fmt: skip
        write = _onnx_writer(small)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / f"draft{FORMATS[format]}"
        draft.write_bytes(write(as_metadata(card, record)))
        exported = load_exported(draft, device="cpu", trust=True)
        if images and tested is not None:
            positions = np.unique(np.linspace(0, len(tested) - 1, min(images, len(tested))).round().astype(int))
            say(f"checking on {len(positions):,} {prepared.test_is} images")
            record["parity"] = compare_outputs(exported.run, reference, source.batches(tested.subset(positions)))
            record["parity"] |= {
                "of": f"{prepared.test_is} images of {prepared.name}",
                "against": f"torch {torch.__version__}, float32",
            }
            if not int8:
                _refuse_difference(record["parity"], str(run), format)
        if int8:
            say(f"measuring float32 and int8 on {len(tested):,} {prepared.test_is} images")
            record["int8"] |= accuracy_before_and_after(reference, exported, source, tested, prepared.test_is)
    content = write(as_metadata(card, record))
    atomic_write(path, content)
    return record | {"path": str(path), "bytes": len(content)}


def _target(run: Path, format: str, out: str | Path | None, int8: str | None) -> Path:
    ending = FORMATS[format]
    if out is None:
        name = {"onnx": "model.int8" if int8 else "model", "torch-export": "model", "safetensors": "exported"}[format]
        return run / f"{name}{ending}"
    out = Path(out)
    if out.suffix.lower() != ending:
        raise InputError(f"a file of format {format} ends in {ending}, --out {out} does not")
    if not out.parent.is_dir():
        raise InputError(f"no such folder: {out.parent}")
    if out.name == "model.safetensors" and (out.parent / "recipe.yaml").is_file():
        raise InputError(f"{out} holds the run's own weights; choose another --out")
    return out


def _versions(format: str) -> str:
    from equiframe import __version__

    names = {"onnx": ("onnx", "onnxscript", "onnxruntime")}.get(format, ())
    more = "".join(f", {name} {need(name, 'format onnx').__version__}" for name in names)
    return f"equiframe {__version__}, torch {torch.__version__}{more}"


def _input_in_words(card: ModelCard) -> str:
    side = card.image_size
    return f"{INPUT}: uint8 RGB (batch, 3, {side}, {side}), 0 to 255; mean and std are applied inside"


# --- the writers: each gives a function from metadata to the file's content ---------------------------------------------

Write = Callable[[dict[str, str]], bytes]


def _program(model: Classifier, card: ModelCard) -> torch.export.ExportedProgram:
    """The network with its surroundings as a graph, for any number of images."""
    side = card.image_size
    example = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    with quiet():
        return torch.export.export(
            Deployed(model, card).eval().requires_grad_(False),
            (example,),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )


def write_torch_export(model: Classifier, card: ModelCard) -> Write:
    program = _program(model, card)

    def write(metadata: dict[str, str]) -> bytes:
        file = io.BytesIO()
        with quiet():
            torch.export.save(program, file, extra_files={"equiframe.json": json.dumps(metadata)})
        return file.getvalue()

    return write


def write_safetensors(model: Classifier, card: ModelCard) -> Write:
    from safetensors.torch import save

    state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    return lambda metadata: save(state, metadata)


def write_onnx(model: Classifier, card: ModelCard) -> Write:
    program = _program(model, card)
    with quiet():
        made = torch.onnx.export(
            program, dynamo=True, input_names=[INPUT], output_names=list(OUTPUTS), external_data=False, verbose=False
        )
    size = sum(p.numel() * p.element_size() for p in program.state_dict.values())
    if size >= ONNX_LIMIT:
        raise InputError(f"the model has {size:,} bytes, an ONNX file holds {ONNX_LIMIT:,}; take --format safetensors")
    graph = made.model_proto
    _name_batch(graph.graph)
    graph.doc_string = f"{_input_in_words(card)}. {resize_in_words(card)}. Outputs (batch, {len(card.class_names)})."
    return _onnx_writer(graph.SerializeToString())


def _name_batch(graph) -> None:
    """Call the free dimension ``batch`` wherever it occurs."""
    free = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == free:
                dim.dim_param = "batch"


def _onnx_writer(graph: bytes) -> Write:
    import onnx

    def write(metadata: dict[str, str]) -> bytes:
        model = onnx.load_model_from_string(graph)
        onnx.helper.set_model_props(model, metadata)
        return model.SerializeToString()

    return write


WRITERS: dict[str, Callable[[Classifier, ModelCard], Write]] = {
    "onnx": write_onnx,
    "torch-export": write_torch_export,
    "safetensors": write_safetensors,
}


@contextlib.contextmanager
def quiet():
    """The exporters and the quantiser talk on stdout, in warnings and in logs about what is theirs to mend."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# --- int8 ----------------------------------------------------------------------------------------------------------------


def _calibration_positions(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Training images for calibration, the same number of each class, so that the ranges are not those of the head
    classes alone."""
    return tracked_positions(labels, per_class=math.ceil(CALIBRATION_IMAGES / num_classes))


def quantise(graph: bytes, kind: str, batches: Sequence[Tensor], *, reduce_range: bool = True) -> bytes:
    """An ONNX graph with 8-bit weights, symmetric and per output channel, and 8-bit activations.

    Args:
        kind: ``static``: ranges of the activations are the smallest and largest value on ``batches`` (uint8 images); ``dynamic``: ranges
            are taken anew for each batch that comes, and only matrix products and convolutions count.
        reduce_range: weights of 7 bits.

    Normalisation, classifier and softmax stay in float32: they are a negligible part of the work, and probabilities in steps of 1/255 are none.
    With 8 bits, sums of two products overflow on CPUs without VNNI instructions, and the file would be wrong there.
    """
    import onnx
    from onnxruntime import quantization as q

    feed = iter([{INPUT: batch.numpy()} for batch in batches])

    class Reader(q.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(feed, None)

    with tempfile.TemporaryDirectory() as folder, quiet():
        given, whole, small = (Path(folder) / f"{name}.onnx" for name in ("given", "whole", "small"))
        given.write_bytes(graph)
        q.shape_inference.quant_pre_process(str(given), str(whole), skip_symbolic_shape=True)
        options = {"per_channel": True, "reduce_range": reduce_range, "weight_type": q.QuantType.QInt8}
        options["nodes_to_exclude"] = _kept_nodes(onnx.load(whole).graph)
        if kind == "static":
            q.quantize_static(whole, small, Reader(), activation_type=q.QuantType.QUInt8, **options)
        else:
            q.quantize_dynamic(whole, small, **options)
        return small.read_bytes()


def _kept_nodes(graph) -> list[str]:
    """Names of the nodes that stay in float32: normalisation before the first product, and from the classifier's on."""
    products = [i for i, node in enumerate(graph.node) if node.op_type in ("Conv", "Gemm", "MatMul")]  # in order of use
    after, names = set(), [node.name for node in graph.node[: products[0]]]
    for node in graph.node:
        if OUTPUTS[0] in node.output or after & set(node.input):
            after |= set(node.output)
            names.append(node.name)
    return names


# --- checks --------------------------------------------------------------------------------------------------------------


def compare_outputs(run, reference, batches: Iterator[tuple[Tensor, Tensor]]) -> dict[str, object]:
    """How far two ways to compute agree on the same images.

    Returns:
        ``num_images``, ``max_abs_logits`` and ``max_abs_probabilities`` (largest differences), ``largest_logit``, and
        ``argmax_agreement`` (share of images in [0, 1] with the same most probable class).
    """
    most = {"logits": 0.0, "probabilities": 0.0, "largest": 0.0}
    same = num = 0
    for pixels, _ in batches:
        (z, p), (z0, p0) = run(pixels), reference(pixels)
        most["logits"] = max(most["logits"], float((z - z0).abs().max()))
        most["probabilities"] = max(most["probabilities"], float((p - p0).abs().max()))
        most["largest"] = max(most["largest"], float(z0.abs().max()))
        same, num = same + int((z.argmax(1) == z0.argmax(1)).sum()), num + len(pixels)
    return {
        "num_images": num,
        "max_abs_logits": most["logits"],
        "max_abs_probabilities": most["probabilities"],
        "largest_logit": most["largest"],
        "argmax_agreement": same / max(num, 1),
    }


def _refuse_difference(parity: dict[str, object], run: str, format: str) -> None:
    if not parity["max_abs_logits"] <= TOLERANCE * max(1.0, parity["largest_logit"]):
        raise InputError(
            f"the {format} file does not compute what {run} does: logits differ by up to {parity['max_abs_logits']:.3g} on "
            f"{parity['num_images']} images, the same class in {100 * parity['argmax_agreement']:.1f} %; nothing was written"
        )


def accuracy_before_and_after(
    reference, exported: Exported, source: Source, images: ImageSet, images_are: str
) -> dict[str, object]:
    """Accuracy by class group and calibration of float32 and int8 on the same images."""

    def measures(run) -> dict[str, float | None]:
        logits, labels = [], []
        for pixels, targets in source.batches(images):
            logits.append(run(pixels)[0])
            labels.append(targets)
        outputs = Outputs(torch.cat(logits), torch.cat(labels).cpu())
        card = exported.card
        return accuracy_measures(outputs.logits.argmax(1), outputs.labels, card.train_counts) | calibration_measures(
            outputs.logits, outputs.labels, card.temperature or 1.0
        )

    return {"num_images": len(images), "of": images_are, "before": measures(reference), "after": measures(exported.run)}
