"""Device, precision, memory format, compilation: the fastest of what the machine offers, by a short measured trial.

The trial's speeds are kept in a file for each question (machine, model, sizes, candidates), so that the next run on the same
machine asks no more and chooses the same. The folder is ``EQUIFRAME_CACHE``, else ``XDG_CACHE_HOME/equiframe``, else
``~/.cache/equiframe``; ``EQUIFRAME_CACHE=`` (empty) keeps nothing.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from equiframe.errors import InputError
from equiframe.heads import LinearHead
from equiframe.losses import cross_entropy
from equiframe.model import Classifier
from equiframe.parallel import ALONE, World
from equiframe.runs import atomic_write, environment

# seconds of eager training: compiling saves about a sixth of them and takes minutes on a small CPU (docs/performance.md)
COMPILING_PAYS_AFTER = 1800.0
SHORT_STEP = 0.005  # seconds: below, a training is short anyway and a trial measures the machine's other work
_FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def choose_device(name: str) -> torch.device:
    """``auto`` is a CUDA or Apple GPU where there is one, else the CPU."""
    if name == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise InputError(f"device {name!r} cannot be used here: {reason}") from error
    return device


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16 products (without them it is many times slower)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and (
            torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")
        )
    return False


@dataclass(frozen=True)
class Numerics:
    """How a model computes on this machine, and with which other processes."""

    device: torch.device
    precision: str  # "float32" | "bfloat16" | "float16"
    memory_format: str  # "contiguous" | "channels-last"
    trial: dict[str, float]  # images per second of each candidate that was tried
    compile: bool = False  # whether training compiles the backbone
    note: str = field(default="", compare=False)  # how the choice came about, for a person
    world: World = field(default=ALONE, compare=False)

    def __str__(self) -> str:
        return f"{self.precision} {self.memory_format}{' compiled' if self.compile else ''}"

    @property
    def torch_memory_format(self) -> torch.memory_format:
        return _FORMATS[self.memory_format]

    def autocast(self):
        """The context in which the backbone runs."""
        if self.precision != "float32":
            return torch.autocast(self.device.type, getattr(torch, self.precision))
        return contextlib.nullcontext()

    def scaler(self) -> torch.amp.GradScaler | None:
        """What scales the loss so that small gradients do not vanish in float16; None for other precisions."""
        return torch.amp.GradScaler(self.device.type) if self.precision == "float16" else None


@contextmanager
def reproducible(on: bool) -> Iterator[None]:
    """Inside, torch takes only algorithms that give the same bits each time; with ``on=False``, whatever it took before.

    On CPU ours are of that kind anyway. cuBLAS reads its setting when CUDA starts, so it must be made before the first use
    of a GPU in the process (as the command line does).

    Raises:
        InputError: for an operation that has no such algorithm.
    """
    if not on:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" in str(error):
            raise InputError(f"--deterministic cannot work here: {str(error).split('. ')[0]}") from error
        raise
    finally:
        torch.use_deterministic_algorithms(before)


def choose_numerics(
    model: Classifier,
    image_size: int,
    batch_size: int,
    *,
    device: str,
    precision: str,
    memory_format: str,
    compile: str = "off",
    steps: int = 0,
    world: World = ALONE,
) -> Numerics:
    """Settle ``auto`` fields: time training steps of the model itself in each candidate and keep the fastest.

    A fixed choice is taken without a trial. The trial works on a copy and leaves the model and torch's random state as
    they were. A later candidate is taken only if it is more than 1.1 times as fast as an earlier one; where a step of the
    first (float32) takes less than `SHORT_STEP`, none is.

    Args:
        compile: ``on``, ``off``, or ``auto``: the fastest candidate is tried compiled, too, if the run is long enough.
        steps: training steps of the whole run, by which ``auto`` judges whether compiling earns its time back: it is
            tried where these steps would take more than `COMPILING_PAYS_AFTER` seconds without.
        world: the processes that share each batch: the first makes the trial, with its share of the batch, for all.

    Raises:
        InputError: if the device cannot be used, or ``compile`` is ``on`` and nothing can be compiled here.
    """
    where = world.each(lambda: _device_of(world, device))
    batch = max(1, batch_size // world.size)
    found = world.first(lambda: _choose(model, image_size, batch, where, precision, memory_format, compile, steps))
    return replace(found, device=where, world=world)


def _device_of(world: World, name: str) -> torch.device:
    device = choose_device(name)
    if world.size > 1 and (device.index is not None or device.type not in ("cpu", "cuda")):
        raise InputError(
            f"device {name!r} cannot be shared by {world.size} processes; --device cuda gives each its own GPU"
        )
    return device


def _choose(
    model: Classifier,
    image_size: int,
    batch_size: int,
    where: torch.device,
    precision: str,
    memory_format: str,
    compile: str,
    steps: int,
) -> Numerics:
    """`choose_numerics` of one process."""
    precisions = [precision] if precision != "auto" else ["float32", *(["bfloat16"] if fast_bfloat16(where) else [])]
    formats = [memory_format] if memory_format != "auto" else list(_FORMATS)
    candidates = [Numerics(where, p, f, {}) for p in precisions for f in formats]
    batch = min(batch_size, 128)
    best, trial, notes = candidates[0], {}, []
    if len(candidates) > 1 or compile == "auto":
        trial, kept = _speeds(model, candidates, image_size, batch)
        short = batch / trial[str(best)] < SHORT_STEP
        best = best if short else _fastest(candidates, trial)
        notes.append("kept from an earlier trial" if kept else "")
        notes.append("steps this short need no choice" if short else "")
    if compile == "auto":
        seconds = steps * batch_size / trial[str(best)]
        if seconds <= COMPILING_PAYS_AFTER:
            notes.append(f"not compiled: {seconds:.0f} s of training would not earn it back")
        elif problem := compiling_fails(where):
            notes.append(f"not compiled: {problem}")
        else:
            pair = [best, replace(best, compile=True)]
            compared, _ = _speeds(model, pair, image_size, batch)
            best, trial = _fastest(pair, compared), trial | compared
    elif compile == "on":
        if problem := compiling_fails(where):
            raise InputError(f"--compile on cannot work here: {problem}; take --compile off or auto")
        best = replace(best, compile=True)
    return replace(best, trial=trial, note="; ".join(filter(None, notes)))


def compiling_fails(device: torch.device) -> str | None:
    """Why torch.compile cannot work on a device, in one line; None if it can. It is put to the test with a tiny function."""
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever a missing compiler, Triton or header makes of it
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return (lines or [type(error).__name__])[0][:200]
    return None


def _fastest(candidates: Sequence[Numerics], speeds: dict[str, float]) -> Numerics:
    """An earlier candidate stays unless a later one is clearly faster: noise must not choose, or equal runs would differ."""
    best = candidates[0]
    for candidate in candidates[1:]:
        if speeds[str(candidate)] > 1.1 * speeds[str(best)]:
            best = candidate
    return best


def _speeds(
    model: Classifier, candidates: Sequence[Numerics], image_size: int, batch: int
) -> tuple[dict[str, float], bool]:
    """Images per second of training steps in each candidate, and whether they were known from an earlier trial."""
    names = [str(c) for c in candidates]
    machine = environment(candidates[0].device)
    shapes = hashlib.sha256(str(model.backbone).encode()).hexdigest()  # the layers and their sizes: backbone and width
    question = {key: machine[key] for key in ("cpu", "cpu_capability", "cores", "threads", "device", "torch")}
    question |= {"backbone": shapes, "image_size": image_size, "batch": batch, "candidates": names}
    file = _cache_file(question)
    if (known := _known(file, question)) is not None:
        return known, True
    with torch.random.fork_rng([candidates[0].device] if candidates[0].device.type == "cuda" else []):
        steps = [_trial_step(model, candidate, image_size, batch) for candidate in candidates]
        for candidate, step in zip(candidates, steps, strict=True):
            if candidate.compile:
                step()  # compiles
        seconds: list[list[float]] = [[] for _ in steps]
        rounds = 0  # in turn, so that a busy moment of the machine does not decide; the best of each counts
        while rounds < 3 or (rounds < 20 and sum(map(sum, seconds)) < 0.2 * len(steps)):
            rounds += 1
            for times, step in zip(seconds, steps, strict=True):
                started = time.perf_counter()
                step()
                times.append(time.perf_counter() - started)
    speeds = {name: round(batch / min(times), 1) for name, times in zip(names, seconds, strict=True)}
    if file is not None:
        with contextlib.suppress(OSError, InputError):  # a cache that cannot be written is none
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(file, json.dumps({"question": question, "images_per_second": speeds}, indent=1) + "\n")
    return speeds, False


def _cache_file(question: dict[str, object]) -> Path | None:
    """Where the answer to a question is kept; None if nothing is to be kept."""
    folder = os.environ.get("EQUIFRAME_CACHE")
    if folder is None:
        base = os.environ.get("XDG_CACHE_HOME")
        folder = Path(base) / "equiframe" if base else Path("~/.cache/equiframe").expanduser()
    elif not folder:
        return None
    key = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:16]
    return Path(folder) / f"trial-{key}.json"


def _known(file: Path | None, question: dict[str, object]) -> dict[str, float] | None:
    """The speeds in a cache file; None if there is none, it is damaged, or it answers another question."""
    try:
        content = json.loads(file.read_bytes()) if file is not None else {}
        speeds = content["images_per_second"] if content.get("question") == question else {}
        whole = list(speeds) == question["candidates"]
        return speeds if whole and all(0 < float(v) < math.inf for v in speeds.values()) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _trial_step(model: Classifier, numerics: Numerics, size: int, batch: int) -> Callable[[], None]:
    """A forward and a backward pass of a copy of the backbone, as a function."""
    backbone = copy.deepcopy(model.backbone).to(numerics.device, memory_format=numerics.torch_memory_format).train()
    head = LinearHead(backbone.num_features, 2).to(numerics.device)
    images = torch.randn(batch, 3, size, size, device=numerics.device)
    images = images.contiguous(memory_format=numerics.torch_memory_format)
    targets = torch.arange(batch, device=numerics.device) % 2
    run = torch.compile(backbone) if numerics.compile else backbone

    def step() -> None:
        with numerics.autocast():
            features = run(images)
        cross_entropy(head(features).logits, targets).mean().backward()
        if numerics.device.type == "cuda":
            torch.cuda.synchronize(numerics.device)

    return step


def keep_memory() -> bool:
    """Tell glibc to keep freed memory for the next step instead of handing each large tensor back to the system.

    A training step frees and takes the same activations again; by default each of them is mapped, cleared and faulted in anew,
    thousands of pages a step (docs/performance.md). Changes no result; the process stays as large as its largest step.

    Returns:
        whether it could be done; False without glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # musl, macOS, Windows
        return False
    trim_threshold, mmap_threshold = -1, -3  # glibc's malloc.h
    return bool(mallopt(mmap_threshold, 1 << 30) and mallopt(trim_threshold, (1 << 31) - 1))
