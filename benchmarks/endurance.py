"""Load and length: many files, many epochs, a grid that is killed again and again. Writes what it measured as JSON.

    python benchmarks/endurance.py files --count 100000 --out benchmarks/results/endurance_files.json
    python benchmarks/endurance.py epochs --count 10000 --out benchmarks/results/endurance_epochs.json
    python benchmarks/endurance.py grid --count 200 --kills 10 --out benchmarks/results/endurance_grid.json

``files``: a folder of so many small images, streamed: time and memory of preparing it, of an epoch, and by the count.
``epochs``: a toy run; memory, open files and processor time of an epoch, and their slope over epochs by least squares.
``grid``: a comparison of so many cells, killed with SIGKILL at random times and started again; each cell must be finished, and a
sample of them equal, times aside, to cells trained in peace.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["EQUIFRAME_CACHE"] = ""

import numpy as np
import torch

from equiframe.data.prepare import prepare_data
from equiframe.recipe import Recipe
from equiframe.runs import RunFolder
from equiframe.train import train

TIMES = ("seconds", "images_per_second")
TOY = {
    "data": "digits", "backbone": "mlp", "width": 4, "batch_size": 512, "lr": 0.05, "mixup": 0, "augmentation": "none",
    "device": "cpu", "precision": "float32", "memory_format": "contiguous", "track": "none",
}  # fmt: skip


def memory() -> float:
    """MiB that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def slope(values: list[float]) -> dict[str, float]:
    """Least squares over the position, per thousand; with its standard error (blocks of a fiftieth, as neighbours correlate)."""
    x, y = np.arange(len(values)) / 1000, np.asarray(values, dtype=float)
    blocks = max(1, len(y) // 50)
    n = len(y) // blocks
    bx, by = (a[: n * blocks].reshape(n, blocks).mean(1) for a in (x, y))
    cx = bx - bx.mean()
    b = float(cx @ by / (cx @ cx))
    rest = by - by.mean() - b * cx
    return {"per_thousand": b, "standard_error": float(np.sqrt(rest @ rest / (n - 2) / (cx @ cx))), "mean": float(y.mean()),
            "first_tenth": float(y[: len(y) // 10].mean()), "last_tenth": float(y[-len(y) // 10 :].mean())}  # fmt: skip


def many_files(count: int, folder: Path) -> dict[str, object]:
    from PIL import Image

    results = []
    for part in (count // 10, count):
        root = folder / f"files-{part}"
        started = time.process_time()
        noise = np.random.default_rng(0).integers(0, 255, (64, 12, 12, 3)).astype(np.uint8)
        for k in range(100):
            (root / f"class-{k:02d}").mkdir(parents=True)
            for i in range(part // 100):
                pixels = (noise[i % 64] // 2 + k).astype(np.uint8)
                Image.fromarray(pixels).save(root / f"class-{k:02d}" / f"{i:05d}.png", compress_level=1)
        made = time.process_time() - started
        fields = TOY | {"data": str(root), "data_mode": "stream", "image_size": 12, "augmentation": "crop", "epochs": 1}
        before, started, wall = memory(), time.process_time(), time.monotonic()
        data = prepare_data(Recipe(**fields))
        prepared = {"cpu_seconds": time.process_time() - started, "seconds": time.monotonic() - wall,
                    "MiB_more": memory() - before}  # fmt: skip
        started, wall = time.process_time(), time.monotonic()
        metrics = train(Recipe(**fields), folder / f"run-{part}", data=data)
        results.append({
            "files": part, "making_cpu_seconds": made, "preparing": prepared,
            "training_and_measuring": {"cpu_seconds": time.process_time() - started, "seconds": time.monotonic() - wall},
            "peak_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "num_train": metrics["num_train"],
            "split.json_bytes": (folder / f"run-{part}" / "split.json").stat().st_size, "open_files": open_files(),
        })  # fmt: skip
        print(results[-1], flush=True)
    return {"runs": results}


def many_epochs(count: int, folder: Path) -> dict[str, object]:
    recipe = Recipe(**TOY | {"epochs": count, "class_counts": [20] * 10, "batch_size": 90, "ema": 0.9})
    seen: dict[str, list[float]] = {"MiB": [], "open_files": [], "epoch_cpu_ms": []}
    before = time.process_time()

    def watch(state: dict) -> None:
        nonlocal before
        if state.get("done"):
            now = time.process_time()
            seen["MiB"].append(memory())
            seen["open_files"].append(open_files())
            seen["epoch_cpu_ms"].append(1000 * (now - before))
            before = now

    data = prepare_data(recipe)
    before = time.process_time()
    train(recipe, folder / "run", data=data, progress=watch)
    history = folder / "run" / "history.jsonl"
    started = time.process_time()
    records = RunFolder(folder / "run").history()
    return {
        "epochs": len(records), "history_bytes": history.stat().st_size, "reading_history_cpu_seconds": time.process_time() - started,
        "slopes": {name: slope(values[10:]) for name, values in seen.items()},
        "every_100th": {name: [round(v, 3) for v in values[::100]] for name, values in seen.items()},
    }  # fmt: skip


def grid_command(out: Path, seeds: int) -> list[str]:
    flags = TOY | {"epochs": 2}
    words = [str(flags.pop("data"))]
    for name, value in flags.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    methods = "ce,etf-ce,etf-la,balanced-softmax"
    return ["compare", *words, "--width", "16", "--imbalance", "10", "--methods", methods, "--seeds",
            ",".join(map(str, range(seeds))), "--out", str(out), "--quiet"]  # fmt: skip


def result(run: Path) -> tuple:
    folder = RunFolder(run)
    metrics = {k: v for k, v in folder.read_json("metrics.json").items() if k not in TIMES}
    history = [{k: v for k, v in r.items() if k not in TIMES} for r in folder.history()]
    return (run / "model.safetensors").read_bytes(), metrics, history


def killed_grid(count: int, kills: int, folder: Path) -> dict[str, object]:
    choice, seeds, log = random.Random(0), count // 4, []
    code = "import sys; from equiframe.cli import main; sys.exit(main(sys.argv[1:]))"

    def start() -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", code, *grid_command(folder / "grid", seeds)],
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # fmt: skip

    def finished() -> list[Path]:
        return sorted(p.parent for p in (folder / "grid").rglob("metrics.json"))

    died = 0
    while died < kills:
        goal = len(finished()) + choice.randint(1, max(1, count // (kills + 2)))  # cells of this life
        process = start()
        while process.poll() is None and len(finished()) < goal:
            time.sleep(0.05)
        time.sleep(choice.random())
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        died += 1
        cells = [p.parent for p in (folder / "grid").rglob("recipe.yaml")]
        log.append({"finished": len(finished()), "begun": len(cells)})
        print(f"kill {died}: {log[-1]}", flush=True)
    process = start()
    said = process.communicate()[1]
    done = finished()
    sample = choice.sample(done, min(12, len(done)))
    different = []
    for run in sample:  # trained in peace, from its own recipe
        train(RunFolder(run).recipe(), folder / "peace")
        if result(run) != result(folder / "peace"):
            different.append(str(run.relative_to(folder)))
        shutil.rmtree(folder / "peace")
    return {"cells": len(done), "kills": died, "exit": process.returncode, "said": said[-500:] if process.returncode else "",
            "after_each_kill": log, "compared": len(sample), "different": different,
            "left_over": [p.name for p in (folder / "grid").rglob("*.tmp")]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("files", "epochs", "grid"))
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.what == "grid":
            measured = killed_grid(arguments.count, arguments.kills, folder)
        else:
            measured = {"files": many_files, "epochs": many_epochs}[arguments.what](arguments.count, folder)
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    record = {"date": date.today().isoformat(), "command": " ".join(sys.argv), "torch": str(torch.__version__),
              "cpu": cpu.partition(": ")[2], "cores": os.cpu_count(), **measured}  # fmt: skip
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({k: v for k, v in record.items() if k != "every_100th"}, indent=1))
    sys.exit(bool(measured.get("different") or measured.get("left_over")) or measured.get("exit", 0))


if __name__ == "__main__":
    main()
