"""Where the time of a training step goes, and how far it is from the machine's limit."""

from __future__ import annotations

import copy
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

SKIPPED, PROFILED = 3, 6  # steps: the first ones fill caches and allocators
PHASES = ("features", "head and loss", "backward", "optimiser")  # the ranges of `Trainer.train_step`
_KINDS = (  # of work inside the backbone, by parts of operators' names
    ("fused kernels", ("compiled", "triton", "inductor")),
    ("convolutions", ("conv",)),
    ("normalisation", ("norm",)),
    ("matrix products", ("mm", "linear", "bmm", "attention")),
    ("activations and sums", ("relu", "clamp", "threshold", "add", "gelu", "silu", "mul", "pool", "cat", "copy_")),
    ("taking memory", ("empty", "resize", "strided")),
)


def phase(name: str) -> record_function:
    """A named range of a step, one of `PHASES`; costs a microsecond where nobody profiles."""
    return record_function(f"equiframe: {name}")


def flop_per_image(backbone: nn.Module, image_size: int) -> float:
    """Floating-point operations of forward and backward for one image (2 a multiply-add), counted without computing.

    Matrix products and convolutions, as `torch.utils.flop_counter` counts them; the gradient with respect to the image is not
    needed and not counted.
    """
    from torch.utils.flop_counter import FlopCounterMode

    twin = copy.deepcopy(backbone).to("meta").train()
    images = torch.empty(2, 3, image_size, image_size, device="meta")
    with FlopCounterMode(display=False) as counter:
        twin(images).sum().backward()
    return counter.get_total_flops() / 2


def product_speed(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """Floating-point operations a second of a (size, size) matrix product here, best of 5."""
    left = torch.randn(size, size, device=device).to(dtype)
    times = []
    for _ in range(6):
        _wait(device)
        started = time.perf_counter()
        left @ left
        _wait(device)
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Profile:
    """What a few training steps were made of.

    Attributes:
        seconds: of a step, on the wall, with the profiler on.
        shares: kind of work → its share of the step, largest first; they sum to 1.
        flop: operations of forward and backward for one image.
        product_speed: operations a second of a matrix product on this machine, in the run's precision.
        bytes: the most memory that the process has taken so far.
    """

    steps: int
    images: int
    seconds: float
    shares: dict[str, float]
    flop: float
    product_speed: float
    bytes: int
    machine: str
    trace: Path

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    @property
    def limit(self) -> float:
        """Images per second, were a step nothing but products at the speed of a large matrix product."""
        return self.product_speed / self.flop if self.flop else math.inf

    def lines(self) -> list[str]:
        """Five lines for a person."""
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in self.shares.items() if share >= 0.005)
        products = sum(self.shares.get(kind, 0.0) for kind in ("convolutions", "matrix products"))
        reached = self.images_per_second / self.limit if self.flop else 0.0
        within = f"; {reached / products:.0%} while in convolutions and matrix products" if products > 0.01 else ""
        return [
            f"profile of {self.steps} steps of {self.images} images: {self.trace} (chrome://tracing or Perfetto opens it)",
            f"  step    {1e3 * self.seconds:.1f} ms, {self.images_per_second:,.0f} images/s, with the profiler on",
            f"  time    {shares}",
            f"  limit   {self.flop / 1e9:.3g} GFlop an image at {self.product_speed / 1e9:,.0f} GFlop/s ({self.machine}, a "
            f"matrix product): {self.limit:,.0f} images/s; reached {reached:.0%}{within}",
            f"  memory  the process has taken {self.bytes / 1e6:,.0f} MB at most",
        ]


class StepProfiler:
    """Watches up to `PROFILED` training steps of an epoch after its first `SKIPPED`, writes ``trace.json.gz`` and
    ``summary.txt`` into a folder and tells a `Profile`. It changes no result, and does nothing once it has told.

    Args:
        say: receives the lines of the summary.
    """

    def __init__(
        self, folder: Path, backbone: nn.Module, image_size: int, batch_size: int, *, device: torch.device,
        dtype: torch.dtype, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.folder, self.backbone, self.image_size, self.batch_size = folder, backbone, image_size, batch_size
        self.device, self.dtype, self.say = device, dtype, say
        self.told = False

    def begin(self, steps: int) -> None:
        """An epoch begins (or goes on) with so many steps to come."""
        if self.told or not steps:
            return
        self.first = min(SKIPPED, steps - 1)
        self.profiled = min(PROFILED, steps - self.first)
        self.seen = 0
        if self.first == 0:
            self._watch()

    def step(self) -> None:
        """A training step has ended."""
        if self.told:
            return
        _wait(self.device)
        self.seen += 1
        if self.seen == self.first:
            self._watch()
        elif self.seen == self.first + self.profiled:
            seconds = (time.perf_counter() - self.started) / self.profiled
            self.watched.stop()
            self.told = True
            self._tell(seconds)

    def _watch(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library talks on stderr
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])
        self.watched = profile(activities=activities, acc_events=True)
        self.watched.start()
        self.started = time.perf_counter()

    def _tell(self, seconds: float) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / "trace.json.gz"
        self.watched.export_chrome_trace(str(trace))
        name = str(self.dtype).removeprefix("torch.")
        threads = torch.get_num_threads()
        where = f"{self.device.type}, {name}"
        if self.device.type == "cpu":
            where += f", {threads} thread{'s' * (threads > 1)}"
        found = Profile(
            self.profiled, self.batch_size, seconds, shares_of(self.watched.events(), self.device.type == "cuda"),
            flop_per_image(self.backbone, self.image_size), product_speed(self.device, self.dtype),
            memory_taken(self.device), where, trace,
        )  # fmt: skip
        text = "\n".join(found.lines())
        (self.folder / "summary.txt").write_text(text + "\n", encoding="utf-8")
        self.say(text)


def kind_of(name: str, ancestors: Iterable[str]) -> str:
    """The kind of work of an operator, from its name and those of the ranges around it."""
    around = [a.removeprefix("equiframe: ") for a in ancestors if a.startswith("equiframe: ")]
    if not around:
        return "batches"
    if around[-1] in ("optimiser", "head and loss"):
        return around[-1]
    return next((kind for kind, parts in _KINDS if any(p in name.lower() for p in parts)), "other")


def shares_of(events: Iterable, on_device: bool) -> dict[str, float]:
    """Kind of work → share of the time that operators spent themselves, largest first."""
    totals: dict[str, float] = {}
    for event in events:
        if event.name.startswith("ProfilerStep") or event.device_type != torch.autograd.DeviceType.CPU:
            continue
        ancestors, parent = [], event
        while parent is not None:
            ancestors.append(parent.name)
            parent = parent.cpu_parent
        spent = event.self_device_time_total if on_device else event.self_cpu_time_total
        kind = kind_of(event.name, ancestors)
        totals[kind] = totals.get(kind, 0.0) + spent
    whole = sum(totals.values()) or 1.0
    return {kind: spent / whole for kind, spent in sorted(totals.items(), key=lambda item: -item[1])}


def memory_taken(device: torch.device) -> int:
    """The most bytes that the process has held at once: on the GPU by tensors, on the CPU altogether."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
