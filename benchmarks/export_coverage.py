"""Do exported files compute what the model does? Backbones × methods × classes, in ONNX and torch.export, on real images.

    python benchmarks/export_coverage.py [--only NAME,…] --out benchmarks/results/export_coverage.json

Weights are random, BatchNorm's statistics those of a few batches of images. A file that exists is added to: run it in parts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from equiframe.data.images import fit_square, to_tensor
from equiframe.data.sources import load_dataset
from equiframe.deployed import as_metadata, as_run, load_exported
from equiframe.export import compare_outputs, write_onnx, write_torch_export
from equiframe.method import METHOD_FIELDS, resolve_method
from equiframe.model import ModelCard, build_classifier
from equiframe.runs import environment

CASES = {  # name → backbone, method, changes, classes, side
    "resnet20": ("resnet20", "etf-la", {}, 10, 32),
    "resnet32-orthoplex": ("resnet32", "etf-dr", {}, 100, 32),
    "densenet150": ("densenet150", "etf-la", {}, 10, 32),
    "mlp-K2": ("mlp", "etf-la", {}, 2, 8),
    "mlp-K1000": ("mlp", "etf-dr", {}, 1000, 8),
    "mlp-kerdock": ("mlp", "etf-dr", {"geometry": "kerdock"}, 1000, 8),
    "mlp-gold": ("mlp", "etf-la", {"geometry": "gold"}, 1000, 8),  # D = 128
    "mlp-linear": ("mlp", "ce", {}, 10, 8),
    "mlp-cosine": ("mlp", "cosine", {}, 10, 8),
    "mlp-nearest-frame": ("mlp", "nearest-frame-la", {}, 10, 8),
    "mlp-crt": ("mlp", "crt", {}, 10, 8),
    "mlp-ncm": ("mlp", "ncm", {}, 10, 8),
    "timm-resnet18": ("timm:resnet18", "etf-la", {}, 10, 64),
    "timm-mobilenetv3": ("timm:mobilenetv3_small_050", "cosine", {}, 10, 64),
    "timm-efficientnet-b0": ("timm:efficientnet_b0", "etf-la", {}, 10, 64),
    "timm-convnext-atto": ("timm:convnext_atto", "etf-la", {}, 10, 64),
    "timm-vit-tiny": ("timm:vit_tiny_patch16_224", "etf-la", {}, 10, 32),
    "timm-swin-tiny": ("timm:swin_tiny_patch4_window7_224", "etf-la", {}, 10, 224),
}


def measure(name: str, data: str) -> dict[str, object]:
    backbone, method, changes, classes, side = CASES[name]
    fields = resolve_method(method, dict.fromkeys(METHOD_FIELDS) | changes)
    dataset = load_dataset("digits" if side == 8 else data)
    pixels = torch.stack([to_tensor(fit_square(dataset.test.image(i), side)) for i in range(24)])
    card = ModelCard(
        backbone=backbone, width=128 if name == "mlp-gold" else None, image_size=side, class_names=[str(k) for k in range(classes)], train_counts=[1] * classes,
        mean=[0.45] * 3, std=[0.25] * 3, method=method, method_fields=fields, temperature=0.7,
    )  # fmt: skip
    torch.manual_seed(0)
    model = build_classifier(card).train()
    with torch.no_grad():
        for part in pixels.split(8):  # statistics of real images
            model((part / 255 - 0.45) / 0.25)
    model.eval()
    reference, result = as_run(model, card, torch.device("cpu")), {}
    for kind, writer, ending in (("torch-export", write_torch_export, "pt2"), ("onnx", write_onnx, "onnx")):
        started = time.process_time()
        content = writer(model, card)(as_metadata(card, {}))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"m.{ending}"
            path.write_bytes(content)
            exported = load_exported(path, device="cpu", trust=True)
        batches = iter([(pixels[:1], None), (pixels[1:8], None), (pixels[8:], None)])
        result[kind] = compare_outputs(exported.run, reference, batches) | {
            "bytes": len(content), "processor_seconds": round(time.process_time() - started, 1)}  # fmt: skip
        print(name, kind, json.dumps(result[kind]), flush=True)
    return {"backbone": backbone, "method": method, **changes, "classes": classes, "side": side, **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--data", default="../shared/data/cifar10")
    parser.add_argument("--out", default="benchmarks/results/export_coverage.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out = Path(arguments.out)
    content = json.loads(out.read_text()) if out.is_file() else {}
    for name in arguments.only.split(","):
        content[name] = measure(name, arguments.data)
        content["environment"] = environment(torch.device("cpu"))
        out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
