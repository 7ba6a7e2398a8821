"""How cost grows with classes K, feature vectors N and feature width D; one figure, slopes in logarithms.

    python benchmarks/scaling.py --threads 1
    python benchmarks/scaling.py --classes 10 1000 --samples 10000 --dims 64 128 --batch 32 --out small.json

* K: forward and backward of head and loss, B features of width D. Frame + dot regression (nothing of size K is stored from
  K = D + 2 on) beside linear + cross-entropy with SGD and momentum, as far as ``--linear-up-to``.
* D: the same at 1,000 classes (a code or a simplex, by D).
* N: one streaming pass of `equiframe.collapse.ClassStatistics` over N generated features, K = 100, D = 128, with the
  process's largest memory after each.

Counted is processor time of all threads (median of ``--rounds``), which other programs disturb least. A slope is that of the
straight line through the logarithms of the last three points: 0 constant, 1 linear.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from frames_speed import cpu_name, seconds
from torch import nn
from torch.nn import functional as F

from equiframe import DotRegression, FrameHead
from equiframe.collapse import ClassStatistics


def frame_step(classes: int, dim: int, batch: int) -> Callable[[], None]:
    features = torch.randn(batch, dim, requires_grad=True)
    targets = torch.randint(classes, (batch,))
    head, loss = FrameHead(dim, classes, logit_scale=1.0, norm="none"), DotRegression()

    def step() -> None:
        features.grad = None
        loss(head(features), targets).backward()

    return step


def linear_step(classes: int, dim: int, batch: int) -> Callable[[], None]:
    features = torch.randn(batch, dim, requires_grad=True)
    targets = torch.randint(classes, (batch,))
    layer = nn.Linear(dim, classes)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3, momentum=0.9, foreach=True)

    def step() -> None:
        features.grad = None
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(layer(features), targets).backward()
        optimizer.step()

    return step


def median_seconds(step: Callable[[], None], rounds: int) -> float:
    """Median processor seconds of a call, after one that is not counted; short calls are repeated."""
    step()
    first, _ = seconds(step)
    calls = max(1, math.ceil(0.02 / max(first, 1e-6)))

    def several() -> None:
        for _ in range(calls):
            step()

    return statistics.median(seconds(several)[0] / calls for _ in range(rounds))


def pass_over(samples: int, classes: int = 100, dim: int = 128, block: int = 10_000) -> dict[str, float]:
    """One streaming pass over generated features; the generator's time is taken off."""
    random = torch.Generator().manual_seed(0)
    means = torch.randn(classes, dim, generator=random)
    noise, labels = torch.randn(block, dim, generator=random), torch.arange(block) % classes
    state, counted = ClassStatistics(classes, dim), 0.0
    for start in range(0, samples, block):
        shift = (start // block) % block
        features = means[labels] + noise.roll(shift, 0)[: min(block, samples - start)]
        began = time.process_time()
        state.update(features, labels[: len(features)])
        counted += time.process_time() - began
    began = time.process_time()
    value = state.within_trace
    counted += time.process_time() - began
    assert state.num_samples == samples
    assert abs(value - noise.var(0, correction=0).sum()) < 0.05 * value
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return {"samples": samples, "seconds": counted, "process_megabytes_at_most": round(largest, 1)}


def slope(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Slope of the logarithms over the last three points."""
    if len(xs) < 2:
        return None
    xs, ys = [math.log(x) for x in xs[-3:]], [math.log(y) for y in ys[-3:]]
    x, y = statistics.mean(xs), statistics.mean(ys)
    return round(sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs), 2)


def draw(result: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    blue, orange = "#0072B2", "#D55E00"

    def line(axis, xs, ys, label, color, marker):
        fit = slope(xs, ys)
        axis.loglog(xs, ys, marker=marker, ms=4.5, lw=1.4, color=color, label=f"{label} (slope {fit:+.2f})")

    sizes = result["sizes"]
    for axis, name, unit in ((axes[0], "classes", "classes K"), (axes[1], "dims", "feature width D")):
        for way, label, color, marker in (("linear", "linear + cross-entropy", orange, "s"),
                                          ("frame", "frame + dot regression", blue, "o")):  # fmt: skip
            rows = [r for r in result[name] if way in r]
            line(axis, [r[name] for r in rows], [1e3 * r[way] for r in rows], label, color, marker)
        axis.set(xlabel=unit, ylabel="ms a step")
    axes[0].set_title(f"B = {sizes['batch']}, D = {sizes['dim']:,}", fontsize=10)
    axes[1].set_title(f"B = {sizes['batch']}, K = 1,000", fontsize=10)
    rows = result["samples"]
    line(axes[2], [r["samples"] for r in rows], [r["seconds"] for r in rows], "one pass", blue, "o")
    axes[2].set(xlabel="feature vectors N", ylabel="s a pass")
    axes[2].set_title("class statistics, K = 100, D = 128", fontsize=10)
    for axis in axes:
        axis.grid(alpha=0.25, which="major")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, loc="upper left")
        low, high = axis.get_ylim()
        axis.set_ylim(low, high * 6)  # room for the legend
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100, 1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--linear-up-to", type=int, default=100_000, help="classes; a million need 12 GB and minutes")
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--samples", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 10_000_000])
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--figure", type=Path, default=Path(__file__).parents[1] / "docs" / "performance" / "scaling.png"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "scaling.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    result: dict = {"what": __doc__.splitlines()[0],
                    "sizes": {"dim": args.dim, "batch": args.batch}, "n": args.rounds}  # fmt: skip
    result["samples"] = [pass_over(samples) for samples in args.samples]
    result["classes"], result["dims"] = [], []
    for name, sizes in (("classes", [(k, args.dim) for k in args.classes]), ("dims", [(1_000, d) for d in args.dims])):
        for classes, dim in sizes:
            row = {name: classes if name == "classes" else dim}
            row["frame"] = median_seconds(frame_step(classes, dim, args.batch), args.rounds)
            if classes <= args.linear_up_to:
                rounds = args.rounds if classes <= 10_000 else 1
                row["linear"] = median_seconds(linear_step(classes, dim, args.batch), rounds)
            result[name].append(row)
            print(row, flush=True)
    result["slopes"] = {
        f"{way} by {name}": slope([r[name] for r in rows], [r[way] for r in rows])
        for name in ("classes", "dims") for way in ("frame", "linear")
        if (rows := [r for r in result[name] if way in r])
    } | {"pass by samples": slope([r["samples"] for r in result["samples"]], [r["seconds"] for r in result["samples"]])}  # fmt: skip
    result |= {
        "hardware": {"cpu": cpu_name(), "logical_cpus": os.cpu_count(), "threads": args.threads},
        "load_average_at_the_end": os.getloadavg(),
        "software": {"python": platform.python_version(), "torch": torch.__version__, "platform": platform.platform()},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, args.figure)
    print(json.dumps(result["slopes"], indent=1))


if __name__ == "__main__":
    main()
