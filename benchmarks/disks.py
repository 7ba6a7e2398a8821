"""Real disks that refuse: full (tmpfs), read-only and over quota (btrfs), each in the middle of a run. Needs root and mkfs.btrfs.

    python benchmarks/disks.py --out benchmarks/results/disks.json

A run on digits is trained; after its second epoch the disk is filled by another file, or made read-only. The run must end in one line, its
checkpoint be readable, and, once the disk takes writes again, the continued run equal one in peace to the bit, times aside.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["EQUIFRAME_CACHE"] = ""

import torch

from equiframe.data.prepare import prepare_data
from equiframe.errors import InputError
from equiframe.recipe import Recipe
from equiframe.runs import RunFolder
from equiframe.train import train

TIMES = ("seconds", "images_per_second")
RECIPE = Recipe(data="digits", backbone="mlp", width=16, epochs=6, batch_size=64, lr=0.05, ema=0.9, device="cpu", precision="float32",
                memory_format="contiguous")  # fmt: skip


def run(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True)


def fill(ballast: Path) -> None:
    """Write until the disk refuses, in ever smaller pieces."""
    with open(ballast, "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1 << 9):
            try:
                while True:
                    file.write(bytes(size))
                    os.fsync(file.fileno())
            except OSError:
                continue


def full(mount: Path, image: Path) -> tuple[Path, Callable, Callable]:
    run("mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", mount)
    return mount, lambda: fill(mount / "ballast"), lambda: (mount / "ballast").unlink()


def subvolume(mount: Path, image: Path) -> Path:
    with open(image, "wb") as file:
        file.truncate(120 << 20)
    run("mkfs.btrfs", "-q", "-f", image)
    run("mount", "-o", "loop", image, mount)
    run("btrfs", "subvolume", "create", mount / "user")
    return mount / "user"


def read_only(mount: Path, image: Path) -> tuple[Path, Callable, Callable]:
    user = subvolume(mount, image)
    become = lambda value: run("btrfs", "property", "set", "-ts", user, "ro", value)  # noqa: E731
    return user, lambda: become("true"), lambda: become("false")


def quota(mount: Path, image: Path) -> tuple[Path, Callable, Callable]:
    user = subvolume(mount, image)
    run("btrfs", "quota", "enable", mount)
    run("btrfs", "qgroup", "limit", "2M", user)

    def lift() -> None:
        (user / "ballast").unlink()
        run("btrfs", "filesystem", "sync", mount)

    return user, lambda: fill(user / "ballast"), lift


def result(path: Path) -> tuple:
    folder = RunFolder(path)
    history = [{k: v for k, v in r.items() if k not in TIMES} for r in folder.history()]
    metrics = {k: v for k, v in folder.read_json("metrics.json").items() if k not in TIMES}
    return (path / "model.safetensors").read_bytes(), history, metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, data = [], prepare_data(RECIPE)
    with tempfile.TemporaryDirectory() as temporary:
        train(RECIPE, Path(temporary) / "peace", data=data)
        for make in (full, read_only, quota):
            mount = Path(temporary) / make.__name__
            mount.mkdir()
            place, refuse, lift = make(mount, Path(temporary) / "image")
            try:
                said, epochs = None, []

                def at_epoch(state: dict, epochs: list = epochs, refuse: Callable = refuse) -> None:
                    if state.get("done"):
                        epochs.append(state["epoch"])
                        if len(epochs) == 2:
                            refuse()

                try:
                    train(RECIPE, place / "run", data=data, progress=at_epoch)
                except InputError as error:
                    said = str(error).replace(str(mount), "DISK")
                kept = RunFolder(place / "run").load_checkpoint()["progress"]["epoch"]
                lift()
                train(RECIPE, place / "run", data=data, resume=True)
                same = result(place / "run") == result(Path(temporary) / "peace")
            finally:
                run("umount", mount)
            rows.append(
                {"disk": make.__name__, "said": said, "epochs_in_the_checkpoint": kept, "continued_the_same": same}
            )
            print(rows[-1], flush=True)
    record = {
        "date": date.today().isoformat(),
        "command": " ".join(sys.argv),
        "system": os.uname().release,
        "rows": rows,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(not all(r["said"] and "\n" not in r["said"] and r["continued_the_same"] for r in rows))


if __name__ == "__main__":
    main()
