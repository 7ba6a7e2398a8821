"""Speed and memory of head and loss: dot regression on a frame against a learnable linear layer with cross-entropy.

    nice python benchmarks/head_speed.py --threads 1
    python benchmarks/head_speed.py --classes 1000 10000 --no-compile

A step is forward, backward to the features and, for the linear layer, to its weights and SGD with momentum on them; a frame has nothing
to optimise. B = 512, D = 1,024, K = 1,000 and 10,000, float32. All step in turn in one run after an untimed warm-up; counted is the
processor time of all threads, which other programs disturb least, with wall time beside it; ratio = usual / ours in the same round.
Memory: the largest sum of tensors alive in a step beyond features and parameters, from torch's profiler, and the state between steps.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch
from frames_speed import cpu_name, seconds
from torch import nn
from torch.nn import functional as F

from equiframe import DotRegression, FrameHead


def peak_bytes(step: Callable[[], None]) -> int:
    """The most bytes that a step holds at once, beyond features, targets, parameters and the optimiser's state."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    held = least = peak = 0  # the gradients of the step before are freed first: the rise from there counts
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            least = min(least, held)
            peak = max(peak, held - least)
    return peak


def steps_for(classes: int, dim: int, batch: int, *, compiled: bool) -> tuple[dict[str, Callable[[], None]], dict]:
    """The steps by name, and bytes of state (parameters, their gradients and the optimiser's) by name."""
    torch.manual_seed(0)
    features = torch.randn(batch, dim, requires_grad=True)
    targets = torch.randint(classes, (batch,))
    head, dr = FrameHead(dim, classes, logit_scale=1.0, norm="none"), DotRegression()

    def frame() -> None:
        features.grad = None
        dr(head(features), targets).backward()

    def linear(compile: bool) -> tuple[Callable[[], None], nn.Linear, torch.optim.Optimizer]:
        layer = nn.Linear(dim, classes)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3, momentum=0.9, foreach=True)

        def loss(x, y):
            return F.cross_entropy(layer(x), y)

        run = torch.compile(loss) if compile else loss

        def step() -> None:
            features.grad = None
            optimizer.zero_grad(set_to_none=True)
            run(features, targets).backward()
            optimizer.step()

        return step, layer, optimizer

    step, layer, _ = linear(False)
    steps = {"frame": frame, "linear": step}
    if compiled:
        steps["linear compiled"] = linear(True)[0]
    size = sum(p.numel() for p in layer.parameters()) * 4
    state = {"linear: weights, gradients, momentum": 3 * size,
             "frame: buffers, nothing to optimise": sum(b.numel() * b.element_size() for b in head.buffers())}  # fmt: skip
    assert not list(head.parameters())
    return steps, state


def measure(classes: int, args: argparse.Namespace) -> dict:
    steps, state = steps_for(classes, args.dim, args.batch, compiled=args.compile)
    for step in steps.values():
        step()
    rounds = []
    for _ in range(args.rounds):
        times = {name: seconds(step) for name, step in steps.items()}
        rounds.append({name: {"processor": cpu, "wall": wall} for name, (cpu, wall) in times.items()})
    ratios = {
        f"{name} / frame, {kind}": [r[name][kind] / r["frame"][kind] for r in rounds]
        for name in steps if name != "frame" for kind in ("processor", "wall")
    }  # fmt: skip
    return {
        "classes": classes, "frame": "simplex" if classes <= args.dim + 1 else "Kerdock or Gold", "n": args.rounds,
        "seconds_median": {f"{name}, {kind}": statistics.median(r[name][kind] for r in rounds)
                           for name in steps for kind in ("processor", "wall")},
        "ratio": {name: {"median": round(statistics.median(v), 2), "min": round(min(v), 2), "max": round(max(v), 2)}
                  for name, v in ratios.items()},
        "megabytes_of_state": {name: round(value / 1e6, 3) for name, value in state.items()},
        "megabytes_at_most_in_a_step": {name: round(peak_bytes(step) / 1e6, 2) for name, step in steps.items()},
        "rounds": rounds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "head_speed.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = [measure(classes, args) for classes in args.classes]
    record = {
        "what": __doc__.splitlines()[0],
        "sizes": {"dim": args.dim, "batch": args.batch},
        "goal": "at least 20 at K = 10,000",
        "results": results,
        "hardware": {"cpu": cpu_name(), "logical_cpus": os.cpu_count(), "threads": args.threads},
        "load_average_at_the_end": os.getloadavg(),
        "software": {"python": platform.python_version(), "torch": torch.__version__, "platform": platform.platform()},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    for result in results:
        print(json.dumps({k: result[k] for k in ("classes", "ratio", "megabytes_at_most_in_a_step")}, indent=1))


if __name__ == "__main__":
    main()
