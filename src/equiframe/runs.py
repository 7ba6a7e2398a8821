"""The run folder: what a training leaves behind. Every file is written whole or not at all.

``recipe.yaml`` (resolved), ``environment.json``, ``split.json`` (exact images and a hash), ``history.jsonl`` (one
line an epoch), ``checkpoints/last.pt``, ``model.safetensors`` + ``model.json``, ``metrics.json``.
"""

from __future__ import annotations

import io
import json
import os
import platform
import sys
from pathlib import Path

import torch

from equiframe.errors import InputError
from equiframe.recipe import Recipe, dump_recipe, load_recipe

_FILES = ("recipe.yaml", "environment.json", "split.json", "history.jsonl", "model.json", "metrics.json")


def atomic_write(path: Path, content: bytes | str) -> None:
    """Replace a file in one step: readers see the old content or the new, also after a crash."""
    if isinstance(content, str):
        content = content.encode()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class RunFolder:
    """One run's files."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    # --- claiming a folder --------------------------------------------------------------------------------------------

    def prepare(self, recipe: Recipe, *, resume: bool) -> bool:
        """Claim the folder for a recipe. Returns whether there is something to continue.

        Raises:
            InputError: if it holds another run, other files, or cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"output {self.path} is a file")
        if (self.path / "recipe.yaml").is_file():
            earlier = self.recipe()
            if not resume:
                raise InputError(f"{self.path} already holds a run; continue it with --resume, or choose another --out")
            difference = settings_that_differ(earlier, recipe)
            if difference:
                raise InputError(f"{self.path} holds a run of another recipe ({difference}); choose another --out")
            self._check_writable()
            return True
        if self.path.is_dir() and any(p for p in self.path.iterdir() if not p.name.startswith(".")):
            raise InputError(f"output folder {self.path} is not empty and not a run; choose another --out")
        if resume:
            raise InputError(f"nothing to resume: {self.path} holds no run")
        try:
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot create {self.path}: {error.strerror}") from error
        self._check_writable()
        return False

    def _check_writable(self) -> None:
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise InputError(f"no permission to write in {self.path}")
        try:
            (self.path / "checkpoints").mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot create {self.path / 'checkpoints'}: {error.strerror}") from error

    # --- writing ------------------------------------------------------------------------------------------------------

    def write(self, name: str, content: bytes | str) -> None:
        atomic_write(self.path / name, content)

    def write_json(self, name: str, content: object) -> None:
        self.write(name, json.dumps(content, indent=1, allow_nan=False) + "\n")

    def write_recipe(self, recipe: Recipe) -> None:
        self.write("recipe.yaml", dump_recipe(recipe))

    def append_history(self, record: dict) -> None:
        try:
            with open(self.path / "history.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"cannot write {self.path / 'history.jsonl'}: {error.strerror}") from error

    def save_checkpoint(self, state: dict) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self.write("checkpoints/last.pt", buffer.getbuffer())

    # --- reading ------------------------------------------------------------------------------------------------------

    def recipe(self) -> Recipe:
        return Recipe(**load_recipe(self.path / "recipe.yaml"))

    def read_json(self, name: str) -> dict:
        try:
            return json.loads((self.path / name).read_text())
        except FileNotFoundError as error:
            raise InputError(f"{self.path} has no {name}: not a finished run") from error
        except ValueError as error:
            raise InputError(f"{self.path / name} is damaged: {error}") from error

    def history(self) -> list[dict]:
        """The epochs so far. A last line that a crash cut short is left out."""
        path = self.path / "history.jsonl"
        records = []
        for line in path.read_text().splitlines() if path.is_file() else ():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        return records

    def rewind_history(self, epochs: int) -> None:
        """Forget epochs after the given number: those that the checkpoint does not have."""
        kept = [r for r in self.history() if r["epoch"] < epochs]
        self.write("history.jsonl", "".join(json.dumps(r) + "\n" for r in kept))

    def load_checkpoint(self) -> dict | None:
        path = self.path / "checkpoints" / "last.pt"
        if not path.is_file():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise InputError(f"checkpoint {path} cannot be read: {str(error).splitlines()[0]}") from error

    @property
    def finished(self) -> bool:
        return (self.path / "metrics.json").is_file()


_SETTLED = ("backbone", "image_size", "data_mode", "augmentation", "device", "precision", "memory_format")


def settings_that_differ(earlier: Recipe, asked: Recipe) -> str:
    """Fields in which two recipes differ, as text; a field that was asked as auto agrees with whatever it became."""
    from equiframe.method import METHOD_FIELDS

    differing = []
    for name, old in earlier.to_dict().items():
        new = asked.to_dict()[name]
        automatic = new is None if name in METHOD_FIELDS or name == "image_size" else new == "auto"
        if (
            name in ("workers", "data_root", "download")
            or old == new
            or (automatic and name in (*_SETTLED, *METHOD_FIELDS))
        ):
            continue
        differing.append(f"{name} was {old!r}, now {new!r}")
    return "; ".join(differing)


def environment(device: torch.device) -> dict[str, object]:
    """Versions and hardware, for the record."""
    import numpy

    from equiframe import __version__

    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "equiframe": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
