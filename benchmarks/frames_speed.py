"""Speed of a fixed frame against a learnable linear layer, for very many classes; and of the Walsh–Hadamard transform.

    nice python benchmarks/frames_speed.py --threads 1                  # K = 100,000, D = 1,024, B = 512: minutes
    python benchmarks/frames_speed.py --classes 3000 --dim 64 --batch 32 --out small.json

Three comparisons, each side by side in one run, alternating, after one untimed warm-up of the short ones:
1. a training step of head and loss, forward and backward to the features: linear + cross-entropy (gradients of the weights
   included, an optimiser's step not) against a Kerdock or Gold frame + dot regression;
2. the five best classes: product with a dense (K, D) matrix and topk, against the frame's own exact topk; the dense matrix holds
   the frame's vectors, so that both answers can be compared;
3. H x for D = 64 … 4,096: butterflies in plain torch (the fastest of three ways of writing them) against `walsh_hadamard`; and, where a
   caller keeps a matrix, those and one product with the whole of H against `walsh_hadamard` with its small block.

1 and 2 count the time that the processor spent (all threads), which other programs disturb least; wall time is recorded beside
it. 3 takes the best of many repetitions on the wall. Memory: bytes of weights and their gradients, against all buffers of the frame.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from equiframe import DotRegression, FrameHead, walsh_hadamard
from equiframe.frames.hadamard import block_bits, hadamard_matrix


def seconds(function: Callable) -> tuple[float, float]:
    """Processor and wall seconds of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    return time.process_time() - cpu, time.perf_counter() - wall


def strided(x: Tensor) -> Tensor:
    """Butterflies on neighbours, concatenated: after m rounds every index is back in its place."""
    y = x.reshape(-1, x.shape[-1])
    for _ in range(x.shape[-1].bit_length() - 1):
        even, odd = y[:, 0::2], y[:, 1::2]
        y = torch.cat([even + odd, even - odd], 1)
    return y.view(x.shape)


def stacked(x: Tensor) -> Tensor:
    y, half = x, 1
    while half < x.shape[-1]:
        pairs = y.reshape(-1, x.shape[-1] // (2 * half), 2, half)
        y = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2)
        half *= 2
    return y.reshape(x.shape)


def in_place(x: Tensor) -> Tensor:
    y, half = x.clone(), x.shape[-1] // 2
    while half:
        pairs = y.view(-1, x.shape[-1] // (2 * half), 2, half)
        difference = pairs[:, :, 0] - pairs[:, :, 1]
        pairs[:, :, 0] += pairs[:, :, 1]
        pairs[:, :, 1] = difference
        half //= 2
    return y


def best(function: Callable, budget: float) -> float:
    """Least wall microseconds of calls within ``budget`` seconds."""
    function()
    times, end = [], time.perf_counter() + budget
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return round(1e6 * min(times), 1)


def transforms(budget: float) -> list[dict]:
    rows = []
    for dim in (64, 256, 1024, 4096):
        whole = hadamard_matrix(dim)
        for batch in (1, 64, 1024):
            x = torch.randn(batch, dim)
            block = hadamard_matrix(1 << block_bits(dim.bit_length() - 1)[0])
            usual = {f.__name__: best(lambda f=f, x=x: f(x), budget) for f in (strided, stacked, in_place)}
            ours = best(lambda x=x: walsh_hadamard(x), budget)
            kept = best(lambda x=x, block=block: walsh_hadamard(x, block), budget)
            product = best(lambda x=x, whole=whole: x @ whole, budget)
            times = {**usual, "product with H kept": product, "ours": ours, "ours, block kept": kept}
            ratios = {"ratio": min(usual.values()) / ours, "ratio_kept": min(*usual.values(), product) / kept}
            rows.append(
                {"dim": dim, "batch": batch, "microseconds": times} | {n: round(r, 2) for n, r in ratios.items()}
            )
            print(rows[-1], flush=True)
    return rows


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=0.3, help="seconds for each timing of a transform")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "frames_speed.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    head, dr = FrameHead(args.dim, args.classes, logit_scale=1.0, norm="none"), DotRegression()
    features = torch.randn(args.batch, args.dim, requires_grad=True)
    targets = torch.randint(args.classes, (args.batch,))
    weight = head.frame.dense().requires_grad_()

    def frame_step() -> None:
        features.grad = None
        dr(head(features), targets).backward()

    def linear_step() -> None:
        features.grad = weight.grad = None
        F.cross_entropy(features @ weight.T, targets).backward()

    unit, answers = F.normalize(features.detach(), dim=1), {}

    @torch.no_grad()
    def dense_top() -> None:
        answers["dense"] = (unit @ weight.T).topk(5, dim=1)

    @torch.no_grad()
    def frame_top() -> None:
        answers["frame"] = head.frame.topk(unit, 5)

    ways = {
        "linear step": (linear_step, 1),
        "frame step": (frame_step, 20),
        "dense top5": (dense_top, 1),
        "frame top5": (frame_top, 2),
    }
    frame_step(), frame_top()
    rounds = []
    for _ in range(args.rounds):
        row = {}
        for name, (function, calls) in ways.items():
            each = [seconds(function) for _ in range(calls)]
            row[name] = {"cpu": statistics.median(c for c, _ in each), "wall": statistics.median(w for _, w in each)}
        rounds.append(row)
        print({name: round(t["cpu"], 5) for name, t in row.items()}, flush=True)

    def ratio(usual: str, ours: str) -> dict[str, float]:
        each = [r[usual]["cpu"] / r[ours]["cpu"] for r in rounds]
        return {"median": round(statistics.median(each), 1), "min": round(min(each), 1), "max": round(max(each), 1)}

    numbers = sum(b.numel() * b.element_size() for b in head.frame.buffers())
    result = {
        "what": "processor seconds; ratio = usual / ours in the same round",
        "sizes": {"classes": args.classes, "dim": args.dim, "batch": args.batch},
        "frame": repr(head.frame).splitlines()[0],
        "n": args.rounds,
        "ratio": {
            "training step of head and loss": ratio("linear step", "frame step"),
            "exact five best classes": ratio("dense top5", "frame top5"),
        },
        "goals": {"training step of head and loss": 500, "exact five best classes": 10},
        "same_five_classes": round((answers["dense"].indices == answers["frame"][1]).double().mean().item(), 6),
        "largest_difference_of_values": (answers["dense"].values - answers["frame"][0]).abs().max().item(),
        "megabytes": {
            "linear: weights": round(weight.numel() * 4 / 1e6, 1),
            "linear: gradients of the weights": round(weight.numel() * 4 / 1e6, 1),
            "linear: logits, their softmax and its gradient": round(3 * args.batch * args.classes * 4 / 1e6, 1),
            "frame: all buffers": round(numbers / 1e6, 3),
            "frame: state dict": round(sum(v.numel() * v.element_size() for v in head.state_dict().values()) / 1e6, 4),
        },
        "rounds": rounds,
        "transforms_best_wall": transforms(args.budget),
        "hardware": {"cpu": cpu_name(), "logical_cpus": os.cpu_count(), "threads": args.threads},
        "load_average_at_the_end": os.getloadavg(),
        "software": {"python": platform.python_version(), "torch": torch.__version__, "platform": platform.platform()},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({name: result[name] for name in ("ratio", "same_five_classes", "megabytes")}, indent=2))


if __name__ == "__main__":
    main()
