"""Macro accuracy of finished runs on *development images*: training images of the data set that the long-tailed cut leaves out.

A synthetic long tail throws away most images of its small classes. They are the best validation images there are: balanced, never
trained on, never tested on. Settings are chosen on them and the test images are looked at for final configurations alone. A class that is kept
whole has none left and does not count (said in the output).

Run: python benchmarks/left_out.py runs/cifar10-r100-16px/*/seed-0 [--each 300] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from equiframe.data.sources import load_dataset, with_pixels
from equiframe.model import load_classifier
from equiframe.recipe import load_recipe


def left_out(run: Path, each: int) -> tuple[object, np.ndarray, np.ndarray]:
    """The run's data set, and up to ``each`` training images of a class that the run has not seen: indices and labels."""
    recipe, split = load_recipe(run / "recipe.yaml"), json.loads((run / "split.json").read_text())
    dataset = load_dataset(str(recipe["data"]))
    labels = np.asarray(dataset.train.labels)
    seen = np.concatenate([np.asarray(split[name] or [], dtype=int) for name in ("train", "val")])
    rest = np.setdiff1d(np.arange(len(labels)), seen)
    np.random.default_rng(0).shuffle(rest)
    chosen = np.concatenate([rest[labels[rest] == k][:each] for k in range(dataset.num_classes)])
    return dataset, chosen, labels[chosen]


@torch.no_grad()
def measure(run: Path, each: int) -> dict[str, object]:
    dataset, chosen, labels = left_out(run, each)
    model, card = load_classifier(run)
    model.eval()
    size = int(load_recipe(run / "recipe.yaml")["image_size"])
    pixels = torch.as_tensor(np.asarray(with_pixels(dataset.train.subset(chosen), size).pixels))
    if pixels.shape[-1] == 3:
        pixels = pixels.permute(0, 3, 1, 2)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (card.mean, card.std))
    right = (
        torch.cat([model((part.float() / 255 - mean) / std).logits.argmax(1) for part in pixels.split(256)]).numpy()
        == labels
    )
    recall = np.array(
        [right[labels == k].mean() if (labels == k).any() else np.nan for k in range(dataset.num_classes)]
    )
    order = np.argsort(-np.asarray(card.train_counts), kind="stable")
    third = np.array_split(order, 3)
    return {
        "run": f"{run.parent.parent.name}/{run.parent.name}/{run.name}",
        "macro": float(np.nanmean(recall)),
        **{name: float(np.nanmean(recall[part])) for name, part in zip(("head", "middle", "tail"), third, strict=True)},
        "images": len(chosen),
        "classes": int((~np.isnan(recall)).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--each", type=int, default=300, help="images of a class, at most [300]")
    parser.add_argument("--json", type=Path, help="where to keep the numbers")
    arguments = parser.parse_args()
    rows = []
    for run in arguments.runs:
        rows.append(row := measure(run, arguments.each))
        numbers = ", ".join(f"{name} {100 * row[name]:.1f}" for name in ("macro", "head", "middle", "tail"))
        print(f"{row['run']}: {numbers} (percent; {row['images']:,} images of {row['classes']} classes)", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
