"""How long until something happens: `equiframe --help`, and `equiframe train digits` up to the end of its first step.

    python benchmarks/start_up.py

Each is a new process, in turn with what it cannot do without: importing torch, and torch with what every `torch.optim` optimiser
imports (torch._dynamo). Wall time of the whole process, files in the cache of the system; needs an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
from frames_speed import cpu_name

FIRST_STEP = """
import os, sys
from equiframe.cli import main
import equiframe.train as module
step = module.Trainer.train_step
def first(self, *arguments):
    step(self, *arguments)
    os._exit(0)
module.Trainer.train_step = first
main(["train", "digits", "--imbalance", "50", "--out", sys.argv[1]])
sys.exit("no step was taken")
"""


def wall(*command: str) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/start_up.json"))
    arguments = parser.parse_args()
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as place:
        for i in range(arguments.rounds + 1):
            rounds.append({
                "equiframe --help": wall(sys.executable, "-m", "equiframe", "--help"),
                "import torch": wall(sys.executable, "-c", "import torch"),
                "import torch, torch._dynamo": wall(sys.executable, "-c", "import torch, torch._dynamo"),
                "train digits to the end of the first step": wall(sys.executable, "-c", FIRST_STEP, f"{place}/{i}"),
            })  # fmt: skip
    rounds = rounds[1:]  # the first reads files from the disk
    found = {name: [row[name] for row in rounds] for name in rounds[0]}
    record = {
        "command": " ".join(["python", "benchmarks/start_up.py", *sys.argv[1:]]), "rounds": rounds,
        "seconds": {n: {"median": round(statistics.median(v), 2), "min": round(min(v), 2), "max": round(max(v), 2)} for n, v in found.items()},
        "cpu": cpu_name(), "cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }  # fmt: skip
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["seconds"], indent=1))


if __name__ == "__main__":
    main()
