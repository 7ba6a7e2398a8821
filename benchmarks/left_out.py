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

from equiframe.data.sources import load_dataset, with_pixels
from equiframe.evaluate import accuracy_measures, collect
from equiframe.model import load_classifier
from equiframe.numerics import choose_numerics
from equiframe.recipe import Recipe, load_recipe
from equiframe.tracking import make_loader


def measure(run: Path, each: int) -> dict[str, object]:
    """Accuracies of a run on up to ``each`` training images of a class that it has not seen."""
    recipe, split = Recipe(**load_recipe(run / "recipe.yaml")), json.loads((run / "split.json").read_text())
    dataset = load_dataset(recipe.data)
    seen = [np.asarray(split[name] or [], dtype=int) for name in ("train", "val")]
    rest = np.setdiff1d(np.arange(len(dataset.train)), np.concatenate(seen))
    np.random.default_rng(0).shuffle(rest)
    labels = dataset.train.labels[rest]
    chosen = np.concatenate([rest[labels == k][:each] for k in range(dataset.num_classes)])
    model, card = load_classifier(run)
    numerics = choose_numerics(
        model, card.image_size, 256, device="cpu", precision="float32", memory_format="contiguous"
    )
    images = with_pixels(dataset.train.subset(chosen), card.image_size)
    found = collect(model, make_loader(images, card, numerics, recipe))
    measured = accuracy_measures(found.logits.argmax(1), found.labels, card.train_counts)
    return {
        "run": f"{run.parent.parent.name}/{run.parent.name}/{run.name}",
        **{name: measured[name] for name in ("macro", "head", "middle", "tail")},
        "images": len(chosen),
        "classes": len(np.unique(found.labels)),
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
