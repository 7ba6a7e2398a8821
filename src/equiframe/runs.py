"""The run folder: what a training leaves behind. Every file is written whole or not at all.

``recipe.yaml`` (resolved), ``environment.json``, ``split.json`` (exact images and a hash), ``history.jsonl`` (one
line an epoch), ``checkpoints/last.pt``, ``model.safetensors`` + ``model.json``, ``predictions.npz``, ``metrics.json``.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import shlex
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from equiframe.errors import InputError
from equiframe.recipe import WITHOUT_EFFECT, Recipe, dump_recipe, load_recipe


def atomic_write(path: Path, content: bytes | str) -> None:
    """Replace a file in one step: readers see the old content or the new, also after a crash."""
    if isinstance(content, str):
        content = content.encode(errors="surrogateescape")  # file names may hold bytes that are not UTF-8
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    if hasattr(os, "O_DIRECTORY"):  # the new name, too, is on the disk; some file systems cannot promise it
        with contextlib.suppress(OSError):
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


class RunFolder:
    """One run's files."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._made: list[Path] = []  # folders that `begin` created, innermost first

    def __str__(self) -> str:
        return str(self.path)

    # --- claiming a folder --------------------------------------------------------------------------------------------

    def check(self, recipe: Recipe, *, resume: bool) -> Recipe | None:
        """Whether a run of this recipe may begin or continue here; nothing is written yet.

        Returns:
            the recipe of the run to continue (its ``auto`` fields settled), or None for a new run.

        Raises:
            InputError: if the folder holds another run or other files, or cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"output {self.path} is a file")
        earlier = None
        if (self.path / "recipe.yaml").is_file():
            if not resume:
                raise InputError(f"{self.path} already holds a run; continue it with --resume, or choose another --out")
            earlier = self.agree(recipe)
        elif resume:
            raise InputError(f"nothing to resume: {self.path} holds no run")
        elif self.path.is_dir() and any(p for p in self.path.iterdir() if not p.name.startswith(".")):
            raise InputError(f"output folder {self.path} is not empty and not a run; choose another --out")
        there = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not there.is_dir():
            raise InputError(f"cannot create {self.path}: {there} is a file")
        if not os.access(there, os.W_OK | os.X_OK):
            raise InputError(f"no permission to write in {there}")
        return earlier

    def agree(self, recipe: Recipe) -> Recipe:
        """The recipe of this run; an error if it is not what is asked."""
        earlier = self.recipe()
        with_file = (self.path / "environment.json").is_file()
        left_open = self.read_json("environment.json").get("left_open", ()) if with_file else ()
        difference = settings_that_differ(earlier, recipe, left_open)
        if difference:
            raise InputError(f"{self.path} holds a run of another recipe ({difference}); choose another --out")
        return earlier

    def check_split(self, split: dict) -> None:
        """An error if the run began with other images than these."""
        if (self.path / "split.json").is_file():
            earlier = self.read_json("split.json")
            if any(earlier.get(key) != split[key] for key in ("fingerprint", "hash")):
                raise InputError(f"the data changed since {self.path} began; choose another --out")

    def begin(self, asked: Recipe, settled: Recipe, split: dict, environment: dict) -> None:
        """Make the folder and write what is known before training. Killed at any point, it can be resumed: the recipe
        as asked comes first, and is replaced once the record of what was settled is there."""
        self._made = [p for p in (self.path, *self.path.absolute().parents) if not p.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write_recipe(asked)
            (self.path / "checkpoints").mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot create {self.path}: {error.strerror}") from error
        self.write_json("split.json", split)
        before, after = asked.to_dict(), settled.to_dict()
        left_open = [name for name in after if before[name] != after[name]]
        self.write_json("environment.json", environment | {"left_open": left_open})
        self.write_recipe(settled)

    def discard(self) -> None:
        """Take back `begin` if nothing was trained since: a run that failed at once leaves no folder behind."""
        if (self.path / "checkpoints" / "last.pt").exists():
            return
        for name in ("environment.json", "split.json", "history.jsonl", "recipe.yaml"):
            (self.path / name).unlink(missing_ok=True)
        for made in (self.path / "checkpoints", *self._made):
            with contextlib.suppress(OSError):  # not empty: somebody else's
                made.rmdir()

    # --- writing ------------------------------------------------------------------------------------------------------

    def write(self, name: str, content: bytes | str) -> None:
        atomic_write(self.path / name, content)

    def write_json(self, name: str, content: object) -> None:
        self.write(name, json.dumps(content, indent=1, allow_nan=False) + "\n")

    def write_arrays(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        self.write(name, buffer.getvalue())

    def write_recipe(self, recipe: Recipe) -> None:
        self.write("recipe.yaml", dump_recipe(recipe))

    def append_history(self, record: dict) -> None:
        try:
            with open(self.path / "history.jsonl", "a", encoding="utf-8") as file:
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
            content = json.loads((self.path / name).read_bytes())
        except FileNotFoundError as error:
            raise InputError(f"{self.path} has no {name}: not a finished run") from error
        except ValueError as error:
            raise InputError(f"{self.path / name} is damaged: {error}") from error
        if not isinstance(content, dict):
            raise InputError(f"{self.path / name} is damaged: not a record")
        return content

    def read_arrays(self, name: str) -> dict[str, np.ndarray] | None:
        """The arrays of a file that `write_arrays` wrote; None where there is none (runs of earlier versions)."""
        if not (self.path / name).is_file():
            return None
        try:
            with np.load(self.path / name, allow_pickle=False) as file:
                return dict(file)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise InputError(f"{self.path / name} is damaged: {error}") from error

    def history(self) -> list[dict]:
        """The epochs so far. A last line that a crash cut short is left out."""
        path = self.path / "history.jsonl"
        records = []
        for line in path.read_bytes().splitlines() if path.is_file() else ():
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
            raise InputError(
                f"checkpoint {path} cannot be read: {(str(error) or repr(error)).splitlines()[0]}"
            ) from error

    @property
    def finished(self) -> bool:
        return (self.path / "metrics.json").is_file()


MACHINE_FIELDS = ("device", "precision", "memory_format", "compile")


def settings_that_differ(earlier: Recipe, asked: Recipe, left_open: Sequence[str] = ()) -> str:
    """Fields in which a run's recipe and an asked one differ, as text; empty if they mean the same run.

    Args:
        left_open: fields that the run, too, had left to the method, the data or the machine; where they are left open
            again, they agree. What is left to the machine agrees with whatever was chosen.
    """
    from equiframe.method import METHOD_FIELDS, resolve_method

    def whole(recipe: Recipe) -> dict[str, object]:
        overrides = {name: getattr(recipe, name) for name in METHOD_FIELDS}
        return recipe.to_dict() | resolve_method(recipe.method, overrides)

    def same(name: str, one: object, two: object) -> bool:
        if name in ("data", "split") and None not in (one, two):  # one folder, however it is called
            one, two = (os.path.realpath(os.path.expanduser(str(path))) for path in (one, two))
        return one == two

    old, new = whole(earlier), whole(asked)
    return "; ".join(
        f"{name} was {old[name]!r}, now {new[name]!r}"
        for name in old
        if not same(name, old[name], new[name])
        and name not in WITHOUT_EFFECT
        and not (new[name] in ("auto", None) and name in (*MACHINE_FIELDS, *left_open))
    )


def environment(device: torch.device) -> dict[str, object]:
    """Versions and hardware, for the record."""
    from equiframe import __version__

    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "equiframe": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "command": shlex.join([Path(sys.argv[0]).name.replace("__main__.py", "equiframe"), *sys.argv[1:]]),
    }
