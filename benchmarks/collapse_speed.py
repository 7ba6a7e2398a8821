"""Speed of the class statistics: one pass of ours against the usual three passes, side by side in one run.

    nice python benchmarks/collapse_speed.py --threads 1           # K=1,000, D=2,048, N=50,000: minutes
    python benchmarks/collapse_speed.py --classes 50 --dim 128 --samples 5000 --out small.json

The usual way is written as the package neural-collapse does it, in its default dtype float32: (1) class means by a one-hot
product; (2) the covariance, X − M[y] and a D×D product, and the classes' variances by a one-hot product; (3) decisions of
the classifier and of the nearest class mean, a B×K product each. Its SHA-256 of M in every call is timed apart and is
not part of the ratio. Ours: (1) `ClassStatistics.update`; (2) `LinearAgreement` with the means of (1). Both ways are given
the same features, labels and class vectors, look at the features as often as they need, and answer the same questions; the
run stops if they do not agree on how many samples are decided alike. An evaluation knows the classifier's decisions already:
then `NearestMean.agrees` takes the place of (2), which is timed too, and given as a ratio of its own.

Features are made batch by batch from a seed, which is not timed: random class means plus Gaussian noise, of sd 0.5
("collapsed": NC4's short cut decides) and of sd 1 ("not collapsed": it never does). Repetitions alternate between the ways.
What is compared is the time that the processor spent (all threads), which other programs on the machine disturb least; the
time on the wall is recorded beside it, and the two agree on a quiet machine with one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path

# NumPy's BLAS reads its number of threads when it is loaded.
if "--threads" in sys.argv:
    os.environ["OPENBLAS_NUM_THREADS"] = sys.argv[sys.argv.index("--threads") + 1]

import torch
from torch import Tensor

from equiframe.collapse import ClassStatistics, LinearAgreement, NearestMean, nc1, nc1_standard_error

COLLAPSED, SPREAD = 0.5, 1.0


class Data:
    """N features of K classes in batches; the same ones whenever they are asked for."""

    def __init__(self, args: argparse.Namespace, num: int | None = None) -> None:
        self.args, self.num = args, num or args.samples
        generator = torch.Generator().manual_seed(0)
        self.means = torch.randn(args.classes, args.dim, generator=generator)
        self.vectors = self.means + 0.1 * torch.randn(args.classes, args.dim, generator=generator)

    def batches(self, noise: float = COLLAPSED) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        for start in range(0, self.num, self.args.batch):
            y = torch.arange(start, min(start + self.args.batch, self.num)) % self.args.classes
            yield torch.randn(len(y), self.args.dim, generator=generator).mul_(noise).add_(self.means[y]), y


class Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)  # of the processor
        self.wall: dict[str, float] = defaultdict(float)

    def __call__(self, name: str, function: Callable):
        started, wall = time.process_time(), time.perf_counter()
        value = function()
        self.seconds[name] += time.process_time() - started
        self.wall[name] += time.perf_counter() - wall
        return value


def three_passes(data: Data, clock: Clock) -> tuple[float, int]:
    """Means, then scatter, then decisions; returns NC1 and how many samples are decided alike."""
    num_classes, dim = data.args.classes, data.args.dim
    labels = torch.arange(num_classes)
    counts, totals = torch.zeros(num_classes), torch.zeros(num_classes, dim)

    def add_means(x: Tensor, y: Tensor) -> None:
        one_hot = (y[:, None] == labels).T.float()
        counts.add_(one_hot.sum(1))
        totals.add_(one_hot @ x)

    for x, y in data.batches():
        clock("three/means", lambda x=x, y=y: add_means(x, y))
    means = totals / counts[:, None]

    scatter, variances = torch.zeros(dim, dim), torch.zeros(num_classes)

    def add_scatter(x: Tensor, y: Tensor) -> None:
        gaps = x - means[y]
        scatter.add_(gaps.T @ gaps)

    def add_variances(x: Tensor, y: Tensor) -> None:
        one_hot = (y[:, None] == labels).T.float()
        variances.add_((one_hot @ (x - means[y]) ** 2).sum(1))

    for x, y in data.batches():
        clock("three/covariance", lambda x=x, y=y: add_scatter(x, y))
        clock("three/variances", lambda x=x, y=y: add_variances(x, y))

    agreed = torch.zeros(num_classes, dtype=torch.int64)

    def add_decisions(x: Tensor, y: Tensor) -> None:
        dots = x @ means.T
        nearest = (x.norm(dim=1)[:, None] ** 2 + means.norm(dim=1) ** 2 - 2 * dots).argmin(1)
        linear = (x @ data.vectors.T).argmax(1)
        agreed.scatter_add_(0, y, (linear == nearest).long())

    for x, y in data.batches():
        clock("three/decisions", lambda x=x, y=y: add_decisions(x, y))

    def finish() -> float:
        centred = means - means.mean(0)
        between = centred.T @ centred / num_classes
        return float(torch.trace(torch.linalg.pinv(between) @ (scatter / counts.sum()))) / num_classes

    return clock("three/nc1", finish), int(agreed.sum())


def one_pass(data: Data, clock: Clock, within: str) -> ClassStatistics:
    name = f"one-{within}"
    seen = clock(f"{name}/update", lambda: ClassStatistics(data.args.classes, data.args.dim, within=within))
    for x, y in data.batches():
        clock(f"{name}/update", lambda x=x, y=y: seen.update(x, y))
    clock(f"{name}/update", lambda: seen.state)  # the last block
    clock(f"{name}/nc1", lambda: nc1(seen))
    return seen


def decisions(data: Data, clock: Clock, seen: ClassStatistics) -> int:
    """How many samples the classifier and the nearest mean decide alike; timed once more for features that have not
    collapsed, and where the classifier's decisions are known."""
    agreement = clock("agreement/collapsed", lambda: LinearAgreement(seen.class_means, data.vectors))
    nearest = clock("known/collapsed", lambda: NearestMean(seen.class_means))
    agreed = 0
    for x, y in data.batches():
        agreed += int(clock("agreement/collapsed", lambda x=x, y=y: agreement(x, y)).sum())
        clock("known/collapsed", lambda x=x, y=y: nearest.agrees(x, y))
    agreement = clock("agreement/spread", lambda: LinearAgreement(seen.class_means, data.vectors))
    nearest = clock("known/spread", lambda: NearestMean(seen.class_means))
    for x, y in data.batches(SPREAD):
        clock("agreement/spread", lambda x=x, y=y: agreement(x, y))
        clock("known/spread", lambda x=x, y=y: nearest.agrees(x, y))
    return agreed


def peak_memory(args: argparse.Namespace, way: str) -> float:
    """Megabytes that a way needs beyond torch and the data, from a few batches in a process of its own."""
    command = [sys.executable, __file__, "--peak-of", way, "--classes", str(args.classes), "--dim", str(args.dim)]
    command += ["--batch", str(args.batch), "--threads", str(args.threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def memory(field: str) -> float:
    """Megabytes of this process, from Linux."""
    return (
        next(float(s.split()[1]) for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(field))
        / 1024
    )


def peak_of(args: argparse.Namespace) -> float:
    data = Data(args, num=20 * args.batch)
    for x, _ in data.batches():
        (x[:8] @ x[:8].T).sum()
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest memory so far, that of importing torch
    before = memory("VmRSS")
    if args.peak_of == "three":
        three_passes(data, Clock())
    else:
        seen = one_pass(data, Clock(), args.peak_of.removeprefix("one-"))
        agreement = LinearAgreement(seen.class_means, data.vectors)
        for x, y in data.batches():
            agreement(x, y)
    return round(memory("VmHWM") - before, 1)


def float32_error(args: argparse.Namespace) -> float:
    """Relative error of NC1 from float32 products, on up to 8,192 samples."""
    data = Data(args, num=min(8192, args.samples))
    single, double = (ClassStatistics(args.classes, args.dim) for _ in range(2))
    for x, y in data.batches():
        single.update(x, y)
        double.update(x.double(), y)
    return abs(nc1(single) / nc1(double) - 1)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "collapse_speed.json")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print(peak_of(args))
        return

    data, runs, walls = Data(args), [], []
    for repeat in range(args.repeats):
        clock = Clock()
        usual, alike = three_passes(data, clock)
        full = one_pass(data, clock, "full")
        sketch = one_pass(data, clock, "sketch")
        if decisions(data, clock, full) != alike:
            sys.exit("the two ways count other decisions")
        digest = clock("hash/one", lambda: hashlib.sha256(data.means.numpy().tobytes()).hexdigest())
        runs.append(dict(clock.seconds))
        walls.append(dict(clock.wall))
        print(
            f"{repeat + 1}/{args.repeats} {digest[:4]}", {k: round(v, 3) for k, v in clock.seconds.items()}, flush=True
        )

    calls = 4 * -(-args.samples // args.batch)  # one of M in covariance and variances, M and W in decisions
    full_pass = ["one-full/update", "agreement/collapsed"]
    passes = ["three/means", "three/covariance", "three/variances", "three/decisions"]

    def ratios(ours: list[str], usual: list[str] = passes, hashes: int = 0) -> dict[str, float]:
        each = [(sum(r[p] for p in usual) + hashes * r["hash/one"]) / sum(r[p] for p in ours) for r in runs]
        return {"median": round(statistics.median(each), 2), "min": round(min(each), 2), "max": round(max(each), 2)}

    result = {
        "what": "processor seconds of the passes; ratio = usual three passes / ours, in the same repetition",
        "sizes": {k: getattr(args, k) for k in ("classes", "dim", "samples", "batch")},
        "n": args.repeats,
        "ratio": {
            "exact NC1, collapsed features": ratios(full_pass),
            "the same, the usual way with the package's hashing": ratios(full_pass, hashes=calls),
            "the same, with NC1 itself computed from the statistics": ratios(
                [*full_pass, "one-full/nc1"], [*passes, "three/nc1"]
            ),
            "exact NC1, collapsed features, classifier's decisions known to ours": ratios(
                ["one-full/update", "known/collapsed"]
            ),
            "exact NC1, features not collapsed": ratios(["one-full/update", "agreement/spread"]),
            "exact NC1, features not collapsed, classifier's decisions known to ours": ratios(
                ["one-full/update", "known/spread"]
            ),
            "sketched NC1, collapsed features": ratios(["one-sketch/update", "agreement/collapsed"]),
        },
        "median_seconds": {k: round(statistics.median(r[k] for r in runs), 4) for k in runs[0]},
        "usual_hashing_seconds_not_in_the_ratio": round(calls * statistics.median(r["hash/one"] for r in runs), 2),
        "gflop_of_the_usual_passes": round(2e-9 * args.samples * args.dim * (4 * args.classes + args.dim), 1),
        "gflop_of_the_symmetric_product": round(1e-9 * args.samples * args.dim**2, 1),
        "nc1": {
            "usual, float32": usual,
            "ours": nc1(full),
            "sketch": nc1(sketch),
            "sketch standard error": nc1_standard_error(sketch),
            "relative error of float32 products": float32_error(args),
        },
        "peak_megabytes_beyond_the_data": {w: peak_memory(args, w) for w in ("three", "one-full", "one-sketch")},
        "dtype": "features float32; usual: all float32; ours: float32 products, float64 sums",
        "hardware": {"cpu": cpu_name(), "logical_cpus": os.cpu_count(), "threads": args.threads},
        "load_average_at_the_end": os.getloadavg(),
        "software": {"python": platform.python_version(), "torch": torch.__version__, "platform": platform.platform()},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "runs": runs,
        "wall_runs": walls,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(
        json.dumps(
            {k: result[k] for k in ("ratio", "median_seconds", "nc1", "peak_megabytes_beyond_the_data")}, indent=2
        )
    )


if __name__ == "__main__":
    main()
