"""Kill training processes at random instants; continued, each must end as if nothing had happened.

    python benchmarks/kill_harness.py --kills 50 --out benchmarks/results/kill_harness.json

Small recipes on digits and on a tenth of long-tailed CIFAR-10 (the real images, where ``--cifar`` finds them) between them use
all that a checkpoint holds. Each is trained once in peace. Then, in turn, a process that trains one of them dies by SIGKILL

- at a random time (``time``), or at a random time within a random training step, evaluation or checkpoint (sent by the parent,
  which sees through shared memory where the child is);
- in a file operation: with half of a file written, before or after an fsync, before or after a rename (``between``: after the
  rename of a checkpoint and before the sync of its folder),

up to three times on one folder, before it is continued with ``resume`` to its end. Weights, history, metrics, predictions
and the last checkpoint (optimiser, average, generators, position) must equal those of the undisturbed run to the bit, times aside.
A control that forgets a single step must come out different. Processes are forks of one that has imported everything: a death is
real, only faster.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import json
import mmap
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["EQUIFRAME_CACHE"] = ""

import numpy as np
import PIL.Image  # noqa: F401  what a run would import itself
import pyarrow.parquet as pq
import sklearn.datasets  # noqa: F401
import torch
import torch._dynamo
import yaml  # noqa: F401

from equiframe.recipe import Recipe
from equiframe.runs import RunFolder
from equiframe.tracking import Tracker
from equiframe.train import Trainer, train

TIMES = ("seconds", "images_per_second")
MACHINE = {"device": "cpu", "precision": "float32", "memory_format": "contiguous"}
DIGITS = MACHINE | {"data": "digits", "backbone": "mlp", "width": 16, "epochs": 3, "batch_size": 64, "lr": 0.05}
CIFAR = MACHINE | {"imbalance": 50, "backbone": "resnet20", "width": 4, "epochs": 2, "batch_size": 64}
RECIPES = {
    "digits: average of weights, mixup": DIGITS | {"ema": 0.9},
    "digits: SAM, AdamW": DIGITS | {"sam": 0.05, "optimizer": "adamw", "lr": 0.001},
    "digits: progressive sampler, second stage": DIGITS
    | {"sampler": "progressive", "imbalance": 10, "method": "crt", "schedule": "cosine"},
    "digits: cutmix, remix, dot regression": DIGITS | {"cutmix": 1, "remix": True, "imbalance": 10, "method": "etf-dr"},
    "cifar10-lt: average of weights, mixup, frame": CIFAR | {"ema": 0.9},
    "cifar10-lt: SAM, balanced sampler, cutmix": CIFAR | {"sam": 0.05, "sampler": "class-balanced", "cutmix": 1},
    "cifar10-lt: streamed, RandAugment, nearest frame": CIFAR
    | {"data_mode": "stream", "augmentation": "crop-flip+randaugment+cutout", "method": "nearest-frame-la"},
}
# where a child is, in shared memory: a phase and how many phases of this kind began
PHASES = ("elsewhere", "step", "evaluation", "checkpoint")
OPERATIONS = ("write", "fsync", "replace")


# --- the child --------------------------------------------------------------------------------------------------------


def instrument(board: mmap.mmap, plan: dict) -> None:
    """Tell the parent where this process is; die in a file operation where the plan says so."""

    def told(owner: type, name: str, phase: int) -> None:
        call = getattr(owner, name)

        def telling(*arguments, **options):
            board[phase] = board[phase] % 255 + 1
            board[0] = phase
            try:
                return call(*arguments, **options)
            finally:
                board[0] = 0

        setattr(owner, name, telling)

    told(Trainer, "train_step", 1)
    told(Tracker, "record", 2)
    told(RunFolder, "save_checkpoint", 3)
    counts = Counter()

    def due(operation: str, side: str) -> bool:
        return (plan.get("operation"), plan.get("side")) == (operation, side) and counts[operation] == plan["number"]

    def deadly(name: str) -> None:
        call = getattr(os, name)

        def calling(*arguments, **options):
            if name == "replace" and plan.get("only", "") not in str(arguments[1]):
                return call(*arguments, **options)
            counts[name] += 1
            if due(name, "before"):
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*arguments, **options)
            if due(name, "after"):
                os.kill(os.getpid(), signal.SIGKILL)
            board[8 + OPERATIONS.index(name)] = min(counts[name], 255)
            return result

        setattr(os, name, calling)

    deadly("fsync")
    deadly("replace")
    opened = builtins.open

    def opening(file, mode="r", *arguments, **options):
        result = opened(file, mode, *arguments, **options)
        if mode == "wb" and str(file).endswith(".tmp"):
            counts["write"] += 1
            board[8] = min(counts["write"], 255)
            if due("write", "half"):
                write = result.write

                def half(content):
                    write(content[: len(content) // 2])
                    result.flush()
                    os.kill(os.getpid(), signal.SIGKILL)

                return _Half(result, half)
        return result

    builtins.open = opening


class _Half:
    """A file whose first write is its last."""

    def __init__(self, file, write) -> None:
        self.file, self.write = file, write

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.file.close()


def forget_a_step(out: Path) -> None:
    """The control's damage: the checkpoint claims one step more than was made."""
    folder = RunFolder(out)
    state = folder.load_checkpoint()
    state["progress"]["step"] += 1
    folder.save_checkpoint(state)


def start(fields: dict, out: Path, board: mmap.mmap, plan: dict) -> int:
    """Train in a process of its own, continuing where there is something to continue."""
    board[:] = bytes(len(board))
    child = os.fork()
    if child:
        return child
    code = 3
    try:
        with open(out.with_suffix(".log"), "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        instrument(board, plan)
        train(Recipe(**fields), out, resume=(out / "recipe.yaml").is_file())
        code = 0
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
    finally:
        os._exit(code)


# --- the parent -------------------------------------------------------------------------------------------------------


def ended(child: int, wait: bool = False) -> int | None:
    """How a process ended: its exit code, or minus the signal; None while it runs."""
    done, status = os.waitpid(child, 0 if wait else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def finish(fields: dict, out: Path, board: mmap.mmap) -> float:
    """Train to the end; returns the seconds that it took."""
    started = time.monotonic()
    code = ended(start(fields, out, board, {}), wait=True)
    if code:
        raise SystemExit(f"a run could not be continued (exit {code}): {out.with_suffix('.log').read_text()}")
    return time.monotonic() - started


def kill(fields: dict, out: Path, board: mmap.mmap, plan: dict, seconds: float) -> str:
    """Start or continue a run that dies as planned; returns where it died, or that it was faster."""
    child = start(fields, out, board, plan)
    if "operation" in plan:
        code = ended(child, wait=True)
        return plan["operation"] if code == -signal.SIGKILL else "ended before"
    deadline = time.monotonic() + (plan["share"] * seconds if plan["phase"] == 0 else 60)
    while (code := ended(child)) is None and time.monotonic() < deadline:
        if plan["phase"] and board[0] == plan["phase"] and board[plan["phase"]] >= plan["number"]:
            time.sleep(plan["share"] * plan["length"])
            break
        time.sleep(0.0002)
    if code is not None:
        return "ended before"
    where = PHASES[board[0]]
    os.kill(child, signal.SIGKILL)
    return where if ended(child, wait=True) == -signal.SIGKILL else "ended before"


def plan_of(kind: str, choice: random.Random, counts: dict[str, int]) -> dict:
    """A random plan of a kind, within what an undisturbed run does."""
    if kind in PHASES[1:]:
        lengths = {"step": 0.01, "evaluation": 0.1, "checkpoint": 0.005}
        return {"phase": PHASES.index(kind), "number": choice.randint(1, max(1, counts[kind])), "share": choice.random(),
                "length": lengths[kind]}  # fmt: skip
    if kind == "between":
        return {"operation": "replace", "side": "after", "only": "last.pt",
                "number": choice.randint(1, max(1, counts["checkpoint"]))}  # fmt: skip
    if kind in OPERATIONS:
        side = "half" if kind == "write" else choice.choice(["before", "after"])
        return {"operation": kind, "side": side, "number": choice.randint(1, max(1, counts[kind]))}
    return {"phase": 0, "share": choice.random()}


def result(out: Path) -> dict[str, object]:
    """What must be the same: the bytes of the results, and the last checkpoint."""
    folder = RunFolder(out)
    without = lambda record: {k: v for k, v in record.items() if k not in TIMES}  # noqa: E731
    files = ("model.safetensors", "model.json", "predictions.npz", "details.json", "split.json")
    checkpoint = folder.load_checkpoint()
    checkpoint["progress"] = without(checkpoint["progress"])
    return {
        **{name: (out / name).read_bytes() for name in files},
        "history": [without(record) for record in folder.history()],
        "metrics": without(folder.read_json("metrics.json")),
        "checkpoint": flat(checkpoint),
    }


def flat(value: object) -> object:
    """Tensors as bytes, so that == means equal to the bit."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    return [flat(item) for item in value] if isinstance(value, list | tuple) else value


def differences(one: dict, two: dict) -> list[str]:
    return [name for name in one if one[name] != two[name]]


def small_cifar(source: Path, target: Path) -> None:
    """A tenth of CIFAR-10 (the first 500 training and 20 test images of each class) as a folder like the whole."""
    import pyarrow as pa

    for split, per_class in (("train", 500), ("test", 20)):
        table = pa.concat_tables([pq.read_table(f) for f in sorted(source.glob(f"{split}-*.parquet"))])
        labels = table["label"].to_numpy()
        rows = np.sort(np.concatenate([np.flatnonzero(labels == k)[:per_class] for k in range(10)]))
        target.mkdir(exist_ok=True)
        pq.write_table(table.take(rows), target / f"{split}-00000-of-00001.parquet")


def in_a_fork(function, *arguments) -> None:
    """Run a function whose libraries start threads, which must not be there when this process forks again."""
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            function(*arguments)
            os._exit(0)
        os._exit(1)
    if ended(child, wait=True):
        raise SystemExit(f"{function.__name__}{arguments} failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only recipes whose names begin so")
    parser.add_argument("--epochs", type=int, help="instead of a recipe's own")
    parser.add_argument("--cifar", type=Path, default=Path(__file__).parents[2] / "shared" / "data" / "cifar10")
    parser.add_argument("--out", type=Path, help="write what happened as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    choice, board = random.Random(arguments.seed), mmap.mmap(-1, 16)
    kinds = ["time", "step", "evaluation", "checkpoint", "between", *OPERATIONS]
    events, kills, number = [], 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recipes = {name: fields for name, fields in RECIPES.items() if name.startswith(arguments.only)}
        if any(name.startswith("cifar10-lt") for name in recipes):
            in_a_fork(small_cifar, arguments.cifar, folder / "cifar10")
        recipes = {name: {"data": str(folder / "cifar10")} | fields for name, fields in recipes.items()}
        if arguments.epochs:
            recipes = {name: fields | {"epochs": arguments.epochs} for name, fields in recipes.items()}
        whole, seconds, counts = {}, {}, {}
        for name, fields in recipes.items():
            seconds[name] = finish(fields, folder / "whole", board)
            counts[name] = {kind: board[i] for i, kind in enumerate(PHASES)}
            counts[name] |= {kind: board[8 + i] for i, kind in enumerate(OPERATIONS)}
            whole[name] = result(folder / "whole")
            shutil.rmtree(folder / "whole")
            print(f"{name}: {seconds[name]:.1f} s, {counts[name]}", flush=True)
        while kills < arguments.kills:
            name = list(recipes)[len(events) % len(recipes)]
            out, deaths = folder / "killed", []
            for _ in range(min(arguments.kills - kills, choice.randint(1, 3))):
                kind = kinds[number % len(kinds)]
                plan = plan_of(kind, choice, counts[name])
                where = kill(recipes[name], out, board, plan, seconds[name])
                deaths.append({"kind": kind, **plan, "died in": where})
                if where == "ended before":
                    break  # the run is finished: nothing more dies in this folder
                number, kills = number + 1, kills + 1
            resumed = (out / "recipe.yaml").is_file()
            took = finish(recipes[name], out, board)
            seconds[name] = min(seconds[name], took) if not resumed else seconds[name]
            different = differences(whole[name], result(out))
            events.append({"recipe": name, "deaths": deaths, "resumed": resumed, "different": different})
            told = ", ".join(f"{d['kind']} ({d['died in']})" for d in deaths)
            print(f"{kills}: {name}: {told}: {different or 'the same'}", flush=True)
            shutil.rmtree(out)
        name = next(iter(recipes))  # the control
        out = folder / "control"
        plan = {"phase": 1, "number": 3 * counts[name]["step"] // 4, "share": 0.5, "length": 0.01}
        while not (out / "checkpoints" / "last.pt").exists():
            shutil.rmtree(out, ignore_errors=True)
            kill(recipes[name], out, board, plan, seconds[name])
        forget_a_step(out)
        finish(recipes[name], out, board)
        control = differences(whole[name], result(out))
    failed = [event for event in events if event["different"]]
    died = [d for event in events for d in event["deaths"] if d["died in"] != "ended before"]
    summary = {
        "date": date.today().isoformat(), "command": " ".join(sys.argv), "torch": str(torch.__version__),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "recipes": {name: fields | {"data": Path(fields["data"]).name} for name, fields in recipes.items()},
        "kills": len(died), "by kind": Counter(d["kind"] for d in died), "died in": Counter(d["died in"] for d in died),
        "plans that came too late": sum(len(e["deaths"]) for e in events) - len(died),
        "runs continued": len(events), "different": len(failed), "control came out different in": control,
        "events": events,
    }  # fmt: skip
    if arguments.out:
        arguments.out.write_text(json.dumps(summary, indent=1) + "\n")
    print({k: dict(v) if isinstance(v, Counter) else v for k, v in summary.items() if k not in ("events", "recipes")})
    sys.exit(1 if failed or not control or "model.safetensors" not in control else 0)


if __name__ == "__main__":
    main()
