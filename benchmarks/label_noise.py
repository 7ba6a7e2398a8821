"""How many wrong labels ``equiframe evaluate RUN --label-noise`` finds, on digits whose labels were made wrong.

    python benchmarks/label_noise.py --out benchmarks/results/label_noise.json

A share of the training labels is replaced by another class, drawn evenly; a run is trained on them. Precision: of the training images
that are told, the share whose label is wrong; recall: of the wrong ones, the share that is told.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["EQUIFRAME_CACHE"] = ""

import numpy as np
import torch

from equiframe.data.prepare import prepare_data
from equiframe.measure import open_run
from equiframe.recipe import Recipe
from equiframe.suspects import suspects_of
from equiframe.train import train

DIGITS = {"data": "digits", "backbone": "mlp", "width": 64, "epochs": 30, "batch_size": 64, "lr": 0.05, "device": "cpu",
          "mixup": 1.0, "weight_decay": 2e-4,
          "precision": "float32", "memory_format": "contiguous", "track": "none"}  # fmt: skip
SETTINGS = [(method, share, None) for method in ("etf-la", "ce") for share in (0.0, 0.1, 0.3)] + [("etf-la", 0.1, 20)]


def one(method: str, share: float, imbalance: float | None, seed: int) -> dict[str, object]:
    recipe = Recipe(**DIGITS, method=method, imbalance=imbalance, seed=seed)
    data, generator = prepare_data(recipe), np.random.default_rng(seed)
    true = data.train.labels
    wrong = generator.random(len(true)) < share
    labels = np.where(wrong, (true + generator.integers(1, 10, len(true))) % 10, true)
    noisy = replace(data, train=replace(data.train, labels=labels))
    with tempfile.TemporaryDirectory() as folder:
        metrics = train(recipe, Path(folder) / "run", data=noisy)
        model, card, _, numerics, opened = open_run(Path(folder) / "run", device="cpu")
        suspects, judged = suspects_of(model, card, noisy, numerics, opened)
    told = np.isin(data.train.names, [s.image for s in suspects if s.split == "train"])
    return {"seed": seed, "top1": round(metrics["top1"], 4), "train": len(true), "wrong": int(wrong.sum()), "told": int(told.sum()),
            "told_and_wrong": int((told & wrong).sum()), "test_told": sum(s.split == "test" for s in suspects), "test": judged["test"]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for method, share, imbalance in SETTINGS:
        runs = [one(method, share, imbalance, seed) for seed in range(arguments.seeds)]
        row = {"method": method, "share": share, "imbalance": imbalance, "runs": runs}
        for name, of in (("precision", "told"), ("recall", "wrong")):
            values = [r["told_and_wrong"] / r[of] for r in runs if share and r[of]]
            row[name] = (
                [round(float(np.mean(values)), 3), round(float(np.std(values, ddof=1)), 3)] if len(values) > 1 else None
            )
        rows.append(row)
        print({k: v for k, v in row.items() if k != "runs"}, [r["told"] for r in runs], flush=True)
    record = {
        "date": date.today().isoformat(),
        "command": " ".join(sys.argv),
        "torch": str(torch.__version__),
        "rows": rows,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
