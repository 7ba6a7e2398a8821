"""What is installed, and how fast the machine multiplies."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import time
from pathlib import Path

import torch

from equiframe.numerics import choose_device, fast_bfloat16
from equiframe.runs import environment

EXTRAS = {  # distribution → the extra that brings it
    "torchvision": "train", "timm": "train", "pillow": "train", "pyarrow": "train", "pyyaml": "train", "rich": "train",
    "scikit-learn": "train", "scipy": "train", "matplotlib": "train", "jinja2": "train", "tensorboard": "tensorboard",
    "datasets": "hub", "huggingface_hub": "hub", "onnx": "export", "onnxscript": "export", "onnxruntime": "export",
}  # fmt: skip
CPU_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "i8mm",
)
LITTLE_DISK = 2 << 30


def describe_machine(device: str = "auto", folder: str | Path = ".") -> dict[str, object]:
    """Versions, processor, memory, GPU, threads, disk, and which optional packages are missing (package → extra)."""
    where = choose_device(device)
    versions, missing = {}, {}
    for name, extra in EXTRAS.items():
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing[name] = extra
    gpu = None
    if where.type == "cuda":
        properties = torch.cuda.get_device_properties(where)
        gpu = {"name": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    known = environment(where)
    return {
        **{key: known[key] for key in ("equiframe", "python", "torch", "numpy", "platform", "cpu", "cpu_capability", "cores", "threads")},
        "cpu_flags": _cpu_flags(),
        "bfloat16_instructions": fast_bfloat16(where),
        "memory_bytes": _memory(),
        "load": load,
        "device": str(where),
        "gpu": gpu,
        "disk_free_bytes": shutil.disk_usage(folder).free,
        "disk_of": str(Path(folder).resolve()),
        "packages": versions,
        "missing": missing,
    }  # fmt: skip


def _cpu_flags() -> list[str]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.lower().startswith(("flags", "features")):
                there = set(line.partition(":")[2].split())
                return [flag for flag in CPU_FLAGS if flag in there]
    return []


def _memory() -> int | None:
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def matrix_speed(device: torch.device, dtype: torch.dtype = torch.float32, *, seconds: float = 0.3) -> float:
    """Operations a second of a product of two square matrices (2·n³ each), the best of as many as fit in ``seconds``."""
    n = 4096 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    b, best, until = a.T.contiguous(), float("inf"), time.perf_counter() + seconds
    rounds = 0
    while rounds < 3 or time.perf_counter() < until:
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best, rounds = min(best, time.perf_counter() - started), rounds + 1
    return 2 * n**3 / best
