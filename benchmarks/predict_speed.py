"""Does `equiframe predict` on a folder of JPEG files keep all cores busy, and how far is it from decoding alone?

    python benchmarks/predict_speed.py

Generates photographs (smooth noise, 500x375, quality 85), trains one epoch of a ResNet-20 at 64x64 on a few of them, then in turn, in
one run, each as a process of its own: `predict` of all of them, and decoding all of them (Pillow, whole, then to 64x64) on as many threads as
there are cores. Counted are wall time and processor time less those of the same command on a single image (start-up); cores busy =
processor time / wall time. Needs an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from frames_speed import cpu_name
from PIL import Image

DECODE = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from PIL import Image
def decode(path):
    with Image.open(path) as image:
        image.convert("RGB").resize((64, 64))
with ThreadPoolExecutor(os.cpu_count()) as pool:
    list(pool.map(decode, sorted(Path(sys.argv[1]).rglob("*.jpg"))))
"""


def photographs(folder: Path, count: int) -> None:
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(count):
        noise = Image.fromarray(random.integers(0, 256, (47, 63, 3), dtype=np.uint8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        noise.save(folder / f"{i:05d}.jpg", quality=85)


def spent(*command: str) -> tuple[float, float]:
    """Seconds of the clock and of processors of a command."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - started, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default="benchmarks/results/predict_speed.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for name in ("a", "b"):
            photographs(root / "few" / name, 40)
        photographs(root / "all", arguments.images)
        photographs(root / "one", 1)
        equiframe = [sys.executable, "-m", "equiframe"]
        subprocess.run([*equiframe, "train", str(root / "few"), "--image-size", "64", "--backbone", "resnet20", "--epochs", "1",
                        "--out", str(root / "run"), "--quiet"], check=True, stdout=subprocess.DEVNULL)  # fmt: skip
        ways = {
            "predict": [*equiframe, "predict", str(root / "run"), "--out", str(root / "csv"), "--quiet"],
            "decode": [sys.executable, "-c", DECODE],
        }
        rows: list[dict[str, dict[str, float]]] = []
        for _ in range(arguments.rounds):
            rows.append({})
            for name, command in ways.items():
                (root / "csv").unlink(missing_ok=True)
                start = spent(*command, str(root / "one"))
                (root / "csv").unlink(missing_ok=True)
                wall, busy = (
                    whole - at_start for whole, at_start in zip(spent(*command, str(root / "all")), start, strict=True)
                )
                rows[-1][name] = {
                    "images_per_second": round(arguments.images / wall, 1), "cores_busy": round(busy / wall, 3),
                    "start_up_seconds": round(start[0], 2),
                }  # fmt: skip
                print(name, rows[-1][name], flush=True)
    medians = {name: {key: statistics.median(row[name][key] for row in rows) for key in rows[0][name]} for name in ways}
    record = {
        "command": " ".join(["python", "benchmarks/predict_speed.py", *sys.argv[1:]]), "rounds": rows, "median": medians,
        "cpu": cpu_name(), "cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }  # fmt: skip
    Path(arguments.out).write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(medians))


if __name__ == "__main__":
    main()
