"""Kill training processes at random instants; continued, each must end as if nothing had happened.

    python benchmarks/kill_harness.py --kills 50 --out results.json

Each kill starts a run of a small recipe on digits in a process of its own, sends SIGKILL after a random time (or within a
file operation: after the n-th `os.replace` or `os.fsync`, which is between a rename and the sync of its directory), and
repeats that up to three times on the same folder. Then the run is continued to its end. Its weights, history and metrics
must equal, times aside, those of a run that was left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TIMES = ("seconds", "images_per_second")
SMALL = [
    "--backbone",
    "mlp",
    "--width",
    "16",
    "--epochs",
    "3",
    "--batch-size",
    "64",
    "--lr",
    "0.05",
    "--device",
    "cpu",
    "--precision",
    "float32",
    "--memory-format",
    "contiguous",
    "--quiet",
]
RECIPES = {
    "ema": ["--ema", "0.9"],
    "sam": ["--sam", "0.05"],
    "progressive": ["--sampler", "progressive", "--imbalance", "10"],
    "cutmix": ["--cutmix", "1", "--method", "etf-dr"],
    "second-stage": ["--method", "ce", "--imbalance", "10", "--second-stage", "crt"],
}
# the process ends within the n-th call of a function of `os`, before or after the call's work is done
WITHIN = """
import os, signal, sys
name, number, after = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "after"
call, count = getattr(os, name), 0
def deadly(*arguments, **options):
    global count
    count += 1
    if count == number and not after:
        os.kill(os.getpid(), signal.SIGKILL)
    result = call(*arguments, **options)
    if count == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(os, name, deadly)
from equiframe.cli import main
sys.exit(main(sys.argv[4:]))
"""
PLAIN = "import sys; from equiframe.cli import main; sys.exit(main(sys.argv[1:]))"


def command(fields: list[str], out: Path) -> list[str]:
    """`equiframe train`, continued where there is something to continue."""
    resume = ["--resume"] if (out / "recipe.yaml").is_file() else []
    return ["train", "digits", *SMALL, *fields, "--out", str(out), *resume]


def run(code: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(fields: list[str], out: Path) -> float:
    """Train to the end; returns the seconds that it took."""
    started = time.monotonic()
    process = run(PLAIN, *command(fields, out))
    said = process.communicate()[1]
    if process.returncode:
        raise SystemExit(f"a run could not be continued (exit {process.returncode}): {said}")
    return time.monotonic() - started


def kill_once(fields: list[str], out: Path, seconds: float, choice: random.Random) -> str:
    """Kill a run, or let it end where it is faster; returns where it was meant to die."""
    if choice.random() < 0.5:
        name, number, side = (
            choice.choice(["replace", "fsync"]),
            choice.randint(1, 20),
            choice.choice(["before", "after"]),
        )
        process = run(WITHIN, name, str(number), side, *command(fields, out))
        process.communicate()
        return f"{side} os.{name} {number}"
    after = choice.uniform(0.3, 1.0) * seconds
    process = run(PLAIN, *command(fields, out))
    try:
        process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    return f"after {after:.2f} s"


def result(out: Path) -> dict[str, object]:
    """What must be the same: the bytes of the weights, history and metrics without times."""
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    metrics = json.loads((out / "metrics.json").read_text())
    return {
        "weights": (out / "model.safetensors").read_bytes(),
        "history": [{k: v for k, v in record.items() if k not in TIMES} for record in history],
        "metrics": {k: v for k, v in metrics.items() if k not in TIMES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipes", default=",".join(RECIPES), help="of " + ", ".join(RECIPES))
    parser.add_argument("--out", type=Path, help="write what happened as JSON")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    choice, names, events = random.Random(arguments.seed), arguments.recipes.split(","), []
    with tempfile.TemporaryDirectory() as folder:
        whole, seconds = {}, {}
        for name in names:
            seconds[name] = finish(RECIPES[name], Path(folder, f"{name}-whole"))
            whole[name] = result(Path(folder, f"{name}-whole"))
        while sum(len(event["kills"]) for event in events) < arguments.kills:
            name, out = names[len(events) % len(names)], Path(folder, "killed")
            left = arguments.kills - sum(len(event["kills"]) for event in events)
            kills = [
                kill_once(RECIPES[name], out, seconds[name], choice) for _ in range(min(left, choice.randint(1, 3)))
            ]
            finish(RECIPES[name], out)
            same = result(out) == whole[name]
            events.append({"recipe": name, "kills": kills, "same": same})
            print(f"{name}: killed {', '.join(kills)}: {'the same' if same else 'DIFFERENT'}", flush=True)
            shutil.rmtree(out)
    if arguments.out:
        arguments.out.write_text(json.dumps(events, indent=1) + "\n")
    different = sum(not event["same"] for event in events)
    print(f"{arguments.kills} kills, {len(events)} runs continued, {different} different")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
