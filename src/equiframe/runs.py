"""The run folder: what a training leaves behind. Every file is written whole or not at all.

``recipe.yaml`` (resolved), ``environment.json``, ``split.json`` (exact images and a hash), ``history.jsonl`` (one
line an epoch), ``checkpoints/last.pt`` and the one before, ``previous.pt``, ``model.safetensors`` + ``model.json``,
``predictions.npz``, ``metrics.json``, and the ``checksums.json`` of them all.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import shlex
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from equiframe.errors import InputError
from equiframe.files import (
    CHECKSUMS,
    JSON_LIMIT,
    LOCK,
    announce,
    atomic_write,
    checksum,
    lock,
    read_checksums,
    read_limited,
    settle_checksums,
    verify,
    verify_lines,
    write_checksums,
)
from equiframe.recipe import WITHOUT_EFFECT, Recipe, dump_recipe, load_recipe

CHECKPOINTS = ("checkpoints/last.pt", "checkpoints/previous.pt")
HISTORY = "history.jsonl"
ARRAYS_LIMIT = 4 << 30  # bytes that predictions.npz may unpack to


def as_json(content: object) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def as_yaml(recipe: Recipe) -> bytes:
    return dump_recipe(recipe).encode(errors="surrogateescape")  # file names may hold bytes that are not UTF-8


def as_npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


class RunFolder:
    """One run's files."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._made: list[Path] = []  # folders that `begin` created, innermost first
        self._claimed = False
        self._lock: BinaryIO | None = None
        self._history = hashlib.sha256()  # of the lines that this process wrote or left

    def __del__(self) -> None:
        self.release()

    def __str__(self) -> str:
        return str(self.path)

    # --- claiming a folder --------------------------------------------------------------------------------------------

    def check(self, recipe: Recipe, *, resume: bool, resumable: bool = True) -> Recipe | None:
        """Whether a run of this recipe may begin or continue here; nothing is written yet.

        Args:
            resumable: whether the caller could continue a run at all; the message says so.

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
                more = "" if self.finished or not resumable else f"continue it with --out {self.path} --resume, or "
                kind = "a finished run" if self.finished else "a run"
                raise InputError(f"{self.path} already holds {kind}; {more}choose another --out")
            earlier = self.agree(recipe)
        elif resume:
            raise InputError(f"nothing to resume: {self.path} holds no run")
        elif self.path.is_dir() and any(
            p for p in self.path.iterdir() if not p.name.startswith(".") and p.name != CHECKSUMS
        ):  # a run that was killed before its recipe was written has nothing else
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
            same = all(earlier.get(key) == split[key] for key in ("fingerprint", "hash"))
            if not same or earlier.get("skipped", []) != split.get("skipped", []):
                raise InputError(f"the data changed since {self.path} began; choose another --out")

    def claim(self) -> None:
        """Keep other processes out until `release` or the end of this one, and tidy up after one that was killed.

        Raises:
            InputError: if another process trains here.
        """
        self._lock, self._claimed = lock(self.path), True
        for folder in (self.path, self.path / "checkpoints"):
            for left in folder.glob(".*.tmp"):
                left.unlink(missing_ok=True)

    def release(self) -> None:
        if self._lock is not None:
            self._lock.close()
        self._lock, self._claimed = None, False

    def begin(self, asked: Recipe, settled: Recipe, split: dict, environment: dict) -> None:
        """Make the folder and write what is known before training. Killed at any point, it can be resumed: the recipe
        as asked comes first, and is replaced once the record of what was settled is there."""
        self._made = [p for p in (self.path, *self.path.absolute().parents) if not p.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not self._claimed:
                self.claim()
                if (self.path / "recipe.yaml").exists():
                    self.release()
                    raise InputError(f"{self.path} was taken by another run meanwhile; choose another --out")
            self.write_files({"recipe.yaml": as_yaml(asked)})
            (self.path / "checkpoints").mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot create {self.path}: {error.strerror}") from error
        before, after = asked.to_dict(), settled.to_dict()
        left_open = [name for name in after if before[name] != after[name]]
        self.write_files(
            {
                "split.json": as_json(split),
                "environment.json": as_json(environment | {"left_open": left_open}),
                "recipe.yaml": as_yaml(settled),
            }
        )

    def discard(self) -> None:
        """Take back `begin` if nothing was trained since: a run that failed at once leaves no folder behind."""
        if not self._claimed or any((self.path / name).exists() for name in CHECKPOINTS):
            return
        for name in ("environment.json", "split.json", HISTORY, CHECKSUMS, "recipe.yaml", LOCK):
            (self.path / name).unlink(missing_ok=True)
        for made in (self.path / "checkpoints", *self._made):
            with contextlib.suppress(OSError):  # not empty: somebody else's
                made.rmdir()

    # --- writing ------------------------------------------------------------------------------------------------------

    def write(self, name: str, content: bytes | str) -> None:
        atomic_write(self.path / name, content)

    def write_files(self, files: Mapping[str, bytes]) -> None:
        """Write files in the given order, their checksums before all."""
        with self._telling_what_is_kept():
            announce(self.path, files)
            for name, content in files.items():
                self.write(name, content)

    def write_json(self, name: str, content: object) -> None:
        self.write_files({name: as_json(content)})

    def append_history(self, record: dict) -> None:
        """Add a line. Its part in the file's checksum is recorded with the next checkpoint, or by `keep_history`."""
        line = (json.dumps(record) + "\n").encode()
        with self._telling_what_is_kept():
            try:
                with open(self.path / HISTORY, "ab") as file:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise InputError(f"cannot write {self.path / HISTORY}: {error.strerror}") from error
        self._history.update(line)

    def keep_history(self, records: Sequence[dict]) -> None:
        """Write all lines anew."""
        content = "".join(json.dumps(record) + "\n" for record in records).encode()
        self.write_files({HISTORY: content})
        self._history = hashlib.sha256(content)

    def save_checkpoint(self, state: dict) -> None:
        """Save as ``last.pt``; the one that was last stays as ``previous.pt``. A failure leaves both as they are."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        last, previous = CHECKPOINTS
        with self._telling_what_is_kept():
            table = read_checksums(self.path)
            now = table.get(last, [])[:1]
            table[previous] = now + table.get(previous, [])[:1]
            table[last] = [checksum(buffer.getbuffer()), *now]
            table[HISTORY] = [self._history.hexdigest()]
            write_checksums(self.path, table)
            atomic_write(self.path / last, buffer.getbuffer(), keep=self.path / previous)

    @property
    def _kept(self) -> str | None:
        """The checkpoint that is there."""
        return next((name for name in CHECKPOINTS if (self.path / name).is_file()), None)

    @contextlib.contextmanager
    def _telling_what_is_kept(self) -> Iterator[None]:
        """A write that fails says which checkpoint is there, if one is."""
        try:
            yield
        except InputError as error:
            raise InputError(f"{error}; {self._kept} is kept" if self._kept else str(error)) from error

    def keep_divergence(self, record: Mapping[str, object]) -> str:
        """Write which step was not finite, on which images, beside the last good checkpoint; returns where, for a person."""
        kept = self._kept
        if kept is None:
            return "There is no checkpoint yet"
        self.write_json("nonfinite.json", {**record, "checkpoint": kept})
        return f"The last good checkpoint is {self.path / kept}; {self.path / 'nonfinite.json'} lists all images of the step"

    def drop_previous_checkpoint(self) -> None:
        """Once all results are written the last checkpoint is enough."""
        (self.path / CHECKPOINTS[1]).unlink(missing_ok=True)

    # --- reading ------------------------------------------------------------------------------------------------------

    def recipe(self) -> Recipe:
        fields = load_recipe(self.path / "recipe.yaml")
        verify(self.path, "recipe.yaml", (self.path / "recipe.yaml").read_bytes())
        return Recipe(**fields)

    def read_json(self, name: str) -> dict:
        try:
            raw = read_limited(self.path / name, JSON_LIMIT)
            content = json.loads(raw)
        except FileNotFoundError as error:
            raise InputError(f"{self.path} has no {name}: not a finished run") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.path / name} is damaged: {error}") from error
        if not isinstance(content, dict):
            raise InputError(f"{self.path / name} is damaged: not a record")
        verify(self.path, name, raw)
        return content

    def read_arrays(self, name: str) -> dict[str, np.ndarray] | None:
        """The arrays of a file that `as_npz` made; None where there is none (runs of earlier versions)."""
        if not (self.path / name).is_file():
            return None
        raw = (self.path / name).read_bytes()
        try:
            with zipfile.ZipFile(io.BytesIO(raw)) as archive:
                unpacked = sum(member.file_size for member in archive.infolist())
            if unpacked > ARRAYS_LIMIT:
                raise InputError(f"{self.path / name} would unpack to {unpacked:,} bytes; refused")
            verify(self.path, name, raw)
            with np.load(io.BytesIO(raw), allow_pickle=False) as file:
                arrays = dict(file)
            if not all(isinstance(array, np.ndarray) for array in arrays.values()):
                raise ValueError("a member of the archive is no array")
            return arrays
        except InputError:
            raise
        except Exception as error:  # a damaged archive makes zipfile and NumPy raise all sorts; none runs code
            reason = (str(error) or repr(error)).splitlines()[0]
            raise InputError(f"{self.path / name} is damaged: {reason}") from error

    def history(self) -> list[dict]:
        """The epochs so far. A last line that a crash cut short is left out; a damaged one before it is an error."""
        path = self.path / HISTORY
        records, content = [], read_limited(path, JSON_LIMIT) if path.is_file() else b""
        lines = content.splitlines()
        for number, line in enumerate(lines, 1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                if number < len(lines):
                    raise InputError(f"{path} is damaged: line {number} is no record") from error
        verify_lines(self.path, HISTORY, content)
        return records

    def rewind_history(self, epochs: int) -> None:
        """Forget epochs after the given number, those that the checkpoint does not have, and announcements of files that were
        never written: from here on the run goes on."""
        with self._telling_what_is_kept():
            settle_checksums(self.path)
        (self.path / "nonfinite.json").unlink(missing_ok=True)
        self.keep_history([r for r in self.history() if r["epoch"] < epochs])

    def load_checkpoint(self, say: Callable[[str], None] = lambda text: None) -> dict | None:
        """The last checkpoint, or the one before where the last is damaged (it is set aside as ``damaged.pt``) or a crash
        came between the two; None where there is neither. ``say`` is told.

        Raises:
            InputError: if the last is damaged and there is no other.
        """
        last, previous = (self.path / name for name in CHECKPOINTS)
        if last.is_file():
            try:
                return self._read_checkpoint(CHECKPOINTS[0])
            except InputError as error:
                if not previous.is_file():
                    raise
                state, why = self._read_checkpoint(CHECKPOINTS[1]), str(error)
                os.replace(last, last.with_name("damaged.pt"))
        elif previous.is_file():
            state, why = self._read_checkpoint(CHECKPOINTS[1]), f"{last} was not written to the end"
        else:
            return None
        say(f"note: {why}; continuing from the checkpoint before it, {previous.name}")
        return state

    def _read_checkpoint(self, name: str) -> dict:
        path = self.path / name
        try:
            content = path.read_bytes()
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                if sum(member.file_size for member in archive.infolist()) > len(content):
                    raise InputError("it would unpack to more than it holds")
            verify(self.path, name, content)
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file makes unpicklers raise all sorts; weights_only: none runs code
            reason = (str(error) or repr(error)).splitlines()[0]
            raise InputError(f"checkpoint {path} cannot be read: {reason}") from error

    def verify(self) -> None:
        """Raises `InputError` that names the first file that is not what was written."""
        for name in read_checksums(self.path):
            if name == HISTORY:
                self.history()
            elif (self.path / name).is_file():
                verify(self.path, name, (self.path / name).read_bytes())

    @property
    def begun(self) -> bool:
        return (self.path / "recipe.yaml").is_file()

    @property
    def finished(self) -> bool:
        return (self.path / "metrics.json").is_file()


MACHINE_FIELDS = ("device", "precision", "memory_format", "compile")


def resolved(recipe: Recipe) -> dict[str, object]:
    """All fields of a recipe, those that it leaves to its method as the method has them."""
    from equiframe.method import METHOD_FIELDS, resolve_method

    overrides = {name: getattr(recipe, name) for name in METHOD_FIELDS}
    return recipe.to_dict() | resolve_method(recipe.method, overrides)


def same_training(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes train the same network, whatever their methods are called and a second stage makes of it."""
    without = ("method", "second_stage", "stage_tau", *WITHOUT_EFFECT)
    first, second = ({k: v for k, v in resolved(recipe).items() if k not in without} for recipe in (one, other))
    return first == second


def settings_that_differ(earlier: Recipe, asked: Recipe, left_open: Sequence[str] = ()) -> str:
    """Fields in which a run's recipe and an asked one differ, as text; empty if they mean the same run.

    Args:
        left_open: fields that the run, too, had left to the method, the data or the machine; where they are left open
            again, they agree. What is left to the machine agrees with whatever was chosen.
    """

    def same(name: str, one: object, two: object) -> bool:
        if name in ("data", "split") and None not in (one, two):  # one folder, however it is called
            one, two = (os.path.realpath(os.path.expanduser(str(path))) for path in (one, two))
        return one == two

    old, new = resolved(earlier), resolved(asked)
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
