"""What onnxruntime's int8 costs and brings: accuracy by class group, size, processor time; static against dynamic.

    python benchmarks/int8.py RUN … --out benchmarks/results/int8.json

RUN are finished runs on data that lies where they found it. All kinds run in turn in one process on one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from equiframe.deployed import as_metadata, as_run, load_exported
from equiframe.export import (
    Source,
    _calibration_positions,
    _onnx_writer,
    accuracy_before_and_after,
    compare_outputs,
    quantise,
    write_onnx,
)
from equiframe.measure import open_run
from equiframe.runs import environment

KINDS = {"static": ("static", True), "dynamic": ("dynamic", True), "static, 8-bit weights": ("static", False)}


def measure(run: str, rounds: int, batch: int, images: int) -> dict[str, object]:
    model, card, prepared, numerics, recipe = open_run(run, device="cpu")
    model = model.to(memory_format=torch.contiguous_format)
    tested = prepared.test
    if images and len(tested) > images:
        tested = tested.subset(np.unique(np.linspace(0, len(tested) - 1, images).round().astype(int)))
    source, reference = Source(card, numerics, recipe), as_run(model, card, torch.device("cpu"))
    training = prepared.train.subset(_calibration_positions(prepared.train.labels, len(card.class_names)))
    calibration = [pixels for pixels, _ in source.batches(training, 32)]
    write = write_onnx(model, card)
    graph = write({})
    contents = {"float32": graph}
    for name, (kind, reduce_range) in KINDS.items():
        contents[name] = quantise(graph, kind, calibration, reduce_range=reduce_range)
    exported = {}
    for name, content in contents.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m.onnx"
            path.write_bytes(_onnx_writer(content)(as_metadata(card, {})))
            exported[name] = load_exported(path, device="cpu", threads=1)
    pixels = next(source.batches(tested, batch))[0]
    times: dict[str, list[float]] = {name: [] for name in ["torch", *exported]}
    for _ in range(rounds + 1):
        for name in times:
            run_it = reference if name == "torch" else exported[name].run
            started = time.process_time()
            run_it(pixels)
            times[name].append((time.process_time() - started) / len(pixels))
    result: dict[str, object] = {
        "run": Path(run).name, "backbone": card.backbone, "classes": len(card.class_names), "data": prepared.name, "test_images": len(tested),
        "calibration_images": len(training), "batch": len(pixels), "rounds": rounds,
        "seconds_an_image": {k: {"median": statistics.median(v[1:]), "least": min(v[1:]), "most": max(v[1:])} for k, v in times.items()},
        "bytes": {name: len(content) for name, content in contents.items()}, "accuracy": {}, "agreement": {},
    }  # fmt: skip
    for name, file in exported.items():
        found = (
            accuracy_before_and_after(reference, file, source, tested, prepared.test_is) if name != "float32" else None
        )
        if found:
            result["accuracy"].setdefault("float32", found["before"])
            result["accuracy"][name] = found["after"]
        result["agreement"][name] = compare_outputs(file.run, reference, source.batches(tested))
        print(run, name, json.dumps(result["agreement"][name]), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=0, help="test images, evenly spaced; 0: all")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    content = {
        "environment": environment(torch.device("cpu")),
        "runs": [measure(r, arguments.rounds, arguments.batch, arguments.images) for r in arguments.runs],
    }
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(content, indent=1) + "\n")
    for r in content["runs"]:
        print(f"\n{r['run']}: {r['backbone']}, {r['data']}")
        base = r["seconds_an_image"]["torch"]["median"]
        for name in r["seconds_an_image"]:
            accuracy = r["accuracy"].get(name, {})
            groups = " ".join(
                f"{k} {100 * accuracy[k]:.1f}"
                for k in ("macro", "head", "middle", "tail", "ece")
                if accuracy.get(k) is not None
            )
            size = r["bytes"].get(name)
            print(f"{name:24} {1e3 * r['seconds_an_image'][name]['median']:.3f} ms/image, {base / r['seconds_an_image'][name]['median']:.2f}x torch, "
                  f"{size or '':>9} bytes, {groups}")  # fmt: skip


if __name__ == "__main__":
    main()
