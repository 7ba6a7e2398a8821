"""Device, precision and memory format: the fastest of what the machine offers, by a short measured trial."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from equiframe.errors import InputError
from equiframe.heads import LinearHead
from equiframe.losses import cross_entropy
from equiframe.model import Classifier

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
    """How a model computes on this machine."""

    device: torch.device
    precision: str  # "float32" | "bfloat16"
    memory_format: str  # "contiguous" | "channels-last"
    trial: dict[str, float]  # images per second of each candidate that was tried

    @property
    def torch_memory_format(self) -> torch.memory_format:
        return _FORMATS[self.memory_format]

    def autocast(self):
        """The context in which the backbone runs."""
        if self.precision == "bfloat16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()


def choose_numerics(
    model: Classifier, image_size: int, batch_size: int, *, device: str, precision: str, memory_format: str
) -> Numerics:
    """Settle ``auto`` fields: time training steps of the model itself in each candidate and keep the fastest.

    A fixed choice is taken without a trial. The trial works on a copy and leaves the model and torch's random state as
    they were.
    """
    where = choose_device(device)
    precisions = [precision] if precision != "auto" else ["float32", *(["bfloat16"] if fast_bfloat16(where) else [])]
    formats = [memory_format] if memory_format != "auto" else list(_FORMATS)
    candidates = [Numerics(where, p, f, {}) for p in precisions for f in formats]
    if len(candidates) == 1:
        return candidates[0]
    with torch.random.fork_rng([where] if where.type == "cuda" else []):
        batch = min(batch_size, 128)
        steps = [_trial_step(model, candidate, image_size, batch) for candidate in candidates]
        seconds: list[list[float]] = [[] for _ in steps]
        for _ in range(3):  # in turn, so that a busy moment of the machine does not decide; the best of each counts
            for times, step in zip(seconds, steps, strict=True):
                started = time.perf_counter()
                step()
                times.append(time.perf_counter() - started)
    speeds = [batch / min(times) for times in seconds]
    # an earlier candidate stays unless a later one is clearly faster: noise must not choose, or equal runs would differ
    best, fastest = candidates[0], speeds[0]
    for candidate, speed in zip(candidates[1:], speeds[1:], strict=True):
        if speed > 1.1 * fastest:
            best, fastest = candidate, speed
    trial = {f"{c.precision} {c.memory_format}": round(s, 1) for c, s in zip(candidates, speeds, strict=True)}
    return Numerics(where, best.precision, best.memory_format, trial)


def _trial_step(model: Classifier, numerics: Numerics, size: int, batch: int) -> Callable[[], None]:
    """A forward and a backward pass of a copy of the backbone, as a function."""
    backbone = copy.deepcopy(model.backbone).to(numerics.device, memory_format=numerics.torch_memory_format).train()
    head = LinearHead(backbone.num_features, 2).to(numerics.device)
    images = torch.randn(batch, 3, size, size, device=numerics.device)
    images = images.contiguous(memory_format=numerics.torch_memory_format)
    targets = torch.arange(batch, device=numerics.device) % 2

    def step() -> None:
        with numerics.autocast():
            features = backbone(images)
        cross_entropy(head(features).logits, targets).mean().backward()
        if numerics.device.type == "cuda":
            torch.cuda.synchronize(numerics.device)

    return step
