"""torchrun for real: processes die, machines' launchers are told to stop, runs go on with other numbers of processes.

    python benchmarks/torchrun_harness.py --out benchmarks/results/torchrun.json

Each case trains ``digits`` on the CPU (gloo) by ``torchrun -m equiframe train`` and is held against a run of two processes that nobody
disturbs: files, weights (largest difference), accuracy. What the processes print is counted: lines that begin with ``equiframe:``, and
tracebacks of ours.

* death: SIGKILL to process 1 in the second epoch; no restart. Then ``--resume`` with 1, 2 and 3 processes.
* elastic: the same with ``--max-restarts 1`` and ``--resume-or-start``; torchrun starts all again.
* stop: SIGTERM to torchrun in the second epoch; then ``--resume-or-start``.
* shard: death and elastic restart of a sharded backbone, continued by 3 processes unsharded.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
from safetensors.torch import load_file

from equiframe.runs import RunFolder, environment

RUN = [
    "train", "digits", "--imbalance", "10", "--backbone", "resnet20", "--width", "4", "--epochs", "5", "--batch-size", "60",
    "--device", "cpu", "--precision", "float32", "--memory-format", "contiguous", "--track", "none",
]  # fmt: skip


def torchrun(processes: int, out: Path, *words: str, restarts: int = 0) -> subprocess.Popen:
    """Start a run; what it says goes into a file beside its folder."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--max-restarts", str(restarts), "-m", "equiframe", *RUN, "--out", str(out), *words]
    with open(out.with_suffix(".said"), "w") as said:
        variables = os.environ | {"OMP_NUM_THREADS": "1", "EQUIFRAME_CACHE": ""}
        return subprocess.Popen(command, stdout=said, stderr=said, env=variables)


def finish(*arguments: object, **options: object) -> None:
    if code := torchrun(*arguments, **options).wait(300):
        raise SystemExit(f"a run ended with {code}: {arguments[1].with_suffix('.said').read_text()}")


def worker(launcher: subprocess.Popen, rank: int) -> int:
    """The process id of a rank."""
    for process in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if f"RANK={rank}" in Path(f"/proc/{process}/environ").read_text().split("\0"):
            return int(process)
    raise SystemExit(f"no process of rank {rank} is left")


def in_second_epoch(launcher: subprocess.Popen, out: Path) -> None:
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / "last.pt").is_file():
        if launcher.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the run was not there to be disturbed: {out.with_suffix('.said').read_text()}")
        time.sleep(0.002)


def kill(launcher: subprocess.Popen, out: Path) -> float:
    """SIGKILL to process 1 in the second epoch; returns the seconds until torchrun is back, or has finished."""
    in_second_epoch(launcher, out)
    killed = time.monotonic()
    os.kill(worker(launcher, 1), signal.SIGKILL)
    launcher.wait(300)
    return round(time.monotonic() - killed, 1)


def heard(out: Path) -> dict[str, object]:
    text = out.with_suffix(".said").read_text()
    ours = [line.strip().replace(str(out), "OUT") for line in text.splitlines() if line.startswith("equiframe: ")]
    return {"our_lines": ours, "our_tracebacks": text.count("equiframe/src") + text.count("src/equiframe/")}


def held_against(out: Path, whole: Path) -> dict[str, object]:
    one, two = (load_file(path / "model.safetensors") for path in (out, whole))
    metrics, metrics_ = (RunFolder(path).read_json("metrics.json") for path in (out, whole))
    history, history_ = (RunFolder(path).history() for path in (out, whole))
    return {
        "largest_difference_of_weights": max(float((one[n].double() - two[n].double()).abs().max()) for n in two),
        "epochs": len(history),
        "epochs_of_the_undisturbed": len(history_),
        "macro": metrics["macro"],
        "macro_of_the_undisturbed": metrics_["macro"],
    }


def death(folder: Path, whole: Path, report) -> None:
    out = folder / "death"
    launcher = torchrun(2, out)
    report("death", {"seconds_to_the_end": kill(launcher, out), "exit": launcher.returncode, **heard(out)})
    for processes in (1, 2, 3):
        again = folder / f"again-{processes}"
        shutil.copytree(out, again)
        finish(processes, again, "--resume")
        report(f"death, then {processes} process(es)", held_against(again, whole))


def elastic(folder: Path, whole: Path, report, name: str = "elastic", *words: str) -> None:
    out = folder / name
    launcher = torchrun(2, out, *words, "--resume-or-start", restarts=1)
    took = kill(launcher, out)
    report(name, {"seconds_to_the_end": took, "exit": launcher.returncode, **heard(out), **held_against(out, whole)})


def stop(folder: Path, whole: Path, report) -> None:
    out = folder / "stop"
    launcher = torchrun(2, out, "--resume-or-start")
    in_second_epoch(launcher, out)
    launcher.send_signal(signal.SIGTERM)
    launcher.wait(120)
    said = heard(out) | {"finished": RunFolder(out).finished}
    finish(2, out, "--resume-or-start")
    report("stop", said | held_against(out, whole))


def shard(folder: Path, whole: Path, report) -> None:
    elastic(folder, whole, report, "shard", "--shard")
    out = folder / "shard-3"
    launcher = torchrun(2, out, "--shard")
    kill(launcher, out)
    finish(3, out, "--resume", "--no-shard")
    report("shard, then 3 processes unsharded", held_against(out, whole))


CASES = {"death": death, "elastic": elastic, "stop": stop, "shard": shard}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, help="JSON; cases that are not run anew stay in it")
    arguments = parser.parse_args()
    known = arguments.out and arguments.out.is_file()
    results = json.loads(arguments.out.read_text())["cases"] if known else {}

    machine = environment(torch.device("cpu"))
    machine = {name: machine[name] for name in ("torch", "python", "cpu", "cpu_capability", "cores")}
    record = {"command": "python benchmarks/torchrun_harness.py", **machine, "cases": results}

    def report(name: str, result: dict[str, object]) -> None:
        results[name] = {"date": datetime.now(timezone.utc).date().isoformat(), **result}
        print(f"{name}: {result}", flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        finish(2, whole)
        for name in arguments.only:
            CASES[name](Path(folder), whole, report)


if __name__ == "__main__":
    main()
