"""Running many runs: one after another or several at a time, within a budget of time, continued by the same call.

Each cell is a run folder. What is finished is kept, what was interrupted continues, a cell that fails is named and does
not stop the others. A cell that is another one with a second stage waits for it, and takes its network instead of training
the same once more.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from equiframe.data.prepare import PreparedData, prepare_data
from equiframe.errors import InputError
from equiframe.loop import Interrupted, stop_on_signals
from equiframe.recipe import Recipe
from equiframe.runs import MACHINE_FIELDS, RunFolder, resolved, same_training
from equiframe.train import apply_second_stage, train
from equiframe.words import counted


@dataclass(frozen=True)
class Cell:
    """A run of a grid: what, where, and how a person calls it."""

    recipe: Recipe
    path: Path
    label: str

    @property
    def finished(self) -> bool:
        return RunFolder(self.path).finished

    @property
    def begun(self) -> bool:
        return (self.path / "recipe.yaml").is_file()

    @property
    def stage(self) -> str:
        """Its second stage, or ``none``."""
        return str(resolved(self.recipe)["second_stage"])

    def first_stage(self, cells: Sequence[Cell]) -> Cell | None:
        """Among the cells, the one with the same training and no second stage, if this one has a second stage and has not
        begun to train by itself."""
        if self.stage == "none" or self.begun:
            return None
        return next((c for c in cells if c.stage == "none" and same_training(c.recipe, self.recipe)), None)


@dataclass(frozen=True)
class Failure:
    """Why a cell has no result: a line for a person, and whether the input is to blame (else it is our bug)."""

    text: str
    by_input: bool


@dataclass
class Grid:
    """Runs cells; one object for all cells that share their images and their machine.

    Args:
        jobs: how many cells at once; above 1 each is a process of its own with its share of the cores.
        until: `time.monotonic` at which no cell may begin any more, and running ones are stopped and saved.
        machine: device, precision and memory format for all cells; empty: those that the first cell settles.
        say, progress: as in `train`; a state has the cell's name as ``state["cell"]``.
        on_cell: is told label, number and total when a cell begins.
    """

    jobs: int = 1
    until: float | None = None
    machine: dict[str, object] = field(default_factory=dict)
    say: Callable[[str], None] = lambda text: None
    progress: Callable[[dict], None] = lambda state: None
    on_cell: Callable[[str, int, int], None] = lambda label, number, total: None
    failures: dict[str, Failure] = field(default_factory=dict)
    _data: PreparedData | None = None
    _first_stages: dict[Path, Cell | None] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        """Whether the budget is used up."""
        return self.until is not None and time.monotonic() >= self.until

    def run(self, cells: Sequence[Cell], done: Callable[[], None] = lambda: None) -> None:
        """Train all cells that are not finished; ``done`` is called after each.

        Raises:
            Interrupted: after Ctrl-C or SIGTERM, with everything saved.
            InputError: if the images cannot be had.
        """
        self._first_stages = {cell.path: cell.first_stage(cells) for cell in cells}
        place = {cell.path: n for n, cell in enumerate(cells)}

        def turn(cell: Cell) -> tuple[int, bool]:  # a second stage comes right after its first
            first = self._first_stages[cell.path]
            return (place[cell.path], False) if first is None else (place[first.path], True)

        in_turn = sorted(cells, key=turn)
        waiting = [(n, cell) for n, cell in enumerate(in_turn, 1) if not cell.finished]
        if self.jobs > 1 and len(waiting) > 1:
            return self._side_by_side(deque(waiting), len(cells), done)
        if waiting and not self.over:
            self.data(
                waiting[0][1].recipe
            )  # images that cannot be had are no cell's own trouble: said once, and the end
        for number, cell in waiting:
            if self.over:
                return None
            self.on_cell(cell.label, number, len(cells))
            try:
                self._train(cell, f"[{number}/{len(cells)}] {cell.label}")
            except InputError as error:
                self._failed(cell, Failure(str(error), True))
            except Interrupted:
                if not self.over:
                    raise
            except Exception:  # one cell's trouble (no memory left, say) is not the others'
                self._failed(cell, Failure(traceback.format_exc().strip(), False))
            else:
                self.machine = self.machine or _settled_machine(cell)
                done()

    def data(self, recipe: Recipe) -> PreparedData:
        """The images, prepared once."""
        self._data = self._data or prepare_data(recipe, self.say)
        return self._data

    def _train(self, cell: Cell, name: str) -> None:
        _finish_cell(
            cell.recipe.with_(**self.machine), cell.path, self._network(cell), resume=cell.begun, data=self.data(cell.recipe),
            say=self.say, progress=lambda state: self.progress(state | {"cell": name}), stop=lambda: self.over,
        )  # fmt: skip

    def _network(self, cell: Cell) -> Path | None:
        """The finished run whose network a second stage takes over."""
        first = self._first_stages.get(cell.path)
        return first.path if first is not None and first.finished else None

    def _may_begin(self, cell: Cell) -> bool:
        """Whether nothing that the cell could take over is still to come."""
        first = self._first_stages.get(cell.path)
        return first is None or first.finished or first.label in self.failures

    def _failed(self, cell: Cell, failure: Failure) -> None:
        self.failures[cell.label] = failure
        self.say(f"{cell.label} failed: {failure.text}")

    # --- several at a time --------------------------------------------------------------------------------------------

    def _side_by_side(self, waiting: deque[tuple[int, Cell]], total: int, done: Callable[[], None]) -> None:
        events: queue.Queue[tuple[_Worker, dict | None]] = queue.Queue()
        running: list[_Worker] = []
        told: set[str] = set()  # all cells say the same of data and machine: once is enough
        threads = _share_of_cores(self.jobs)
        self.say(f"{self.jobs} cells at a time, {counted(threads, 'thread')} each")
        with stop_on_signals() as interrupted:
            try:
                while waiting or running:
                    if self.over or interrupted():
                        waiting.clear()
                        for worker in running:
                            worker.stop()
                    while len(running) < self.jobs and (not running or self._knows_machine(running[0])):
                        ready = next((entry for entry in waiting if self._may_begin(entry[1])), None)
                        if ready is None:
                            break
                        waiting.remove(ready)
                        number, cell = ready
                        self.on_cell(cell.label, number, total)
                        name = f"[{number}/{total}] {cell.label}"
                        running.append(_Worker(cell, name, self._network(cell), self.machine, threads, events))
                    try:
                        worker, message = events.get(timeout=0.2)
                    except queue.Empty:
                        continue
                    if message is None:
                        running.remove(worker)
                        self._ended(worker, done)
                    elif "progress" in message:
                        self.progress(message["progress"] | {"cell": worker.name})
                    elif message.get("say") not in told:
                        told.add(message["say"])
                        self.say(message["say"])
            finally:
                for worker in running:  # only where something went wrong here
                    worker.stop()
            if interrupted():
                raise Interrupted

    def _knows_machine(self, first: _Worker) -> bool:
        """Whether a new cell may begin: all take the numerics that the first one found fastest."""
        self.machine = self.machine or _settled_machine(first.cell)
        return bool(self.machine)

    def _ended(self, worker: _Worker, done: Callable[[], None]) -> None:
        failure = worker.failure()
        if failure is not None:
            self._failed(worker.cell, failure)
        elif worker.cell.finished:
            self.machine = self.machine or _settled_machine(worker.cell)
            done()


def _finish_cell(
    recipe: Recipe, out: str | Path, network: str | Path | None, *, say: Callable[[str], None], **options: Any
) -> None:
    """Train a cell, or give the network of a finished run the cell's second stage: the result is the same."""
    if network is None:
        train(recipe, out, say=say, **options)
        return
    fields = resolved(recipe)
    say(f"{recipe.method} takes the network of {network}")
    apply_second_stage(
        network, str(fields["second_stage"]), out, method=recipe.method, tau=fields["stage_tau"],
        device=RunFolder(network).recipe().device, say=say,
    )  # fmt: skip


def _settled_machine(cell: Cell) -> dict[str, object]:
    """The machine fields of a cell; empty while they are not settled."""
    recipe = RunFolder(cell.path).recipe() if cell.begun else cell.recipe
    machine = {name: getattr(recipe, name) for name in MACHINE_FIELDS}
    return {} if "auto" in machine.values() else machine


def _share_of_cores(jobs: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, torch.get_num_threads()) // jobs)


class _Worker:
    """A cell in a process of its own. It stops and saves when its standard input closes: on request, or because this
    process died. Ctrl-C does not reach it (it has a session of its own)."""

    def __init__(
        self, cell: Cell, name: str, network: Path | None, machine: dict, threads: int, events: queue.Queue
    ) -> None:
        self.cell, self.name, self._stopped, self._refused = cell, name, False, None
        job = {
            "recipe": cell.recipe.with_(**machine).to_dict(), "out": str(cell.path), "network": None if network is None else str(network),
            "resume": cell.begun, "threads": threads, "command": sys.argv,
        }  # fmt: skip
        source = str(Path(__file__).parents[1])
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "PYTHONSAFEPATH": "1",
            "PYTHONPATH": os.pathsep.join(p for p in (source, os.environ.get("PYTHONPATH")) if p),
        }  # fmt: skip
        self._errors: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from equiframe.grid import work; work()"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._errors, env=environment, start_new_session=True,
        )  # fmt: skip
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()

    def _listen(self, events: queue.Queue) -> None:
        for line in self._process.stdout:
            message = json.loads(line)
            if "refused" in message:
                self._refused = message["refused"]
            else:
                events.put((self, message))
        self._process.wait()
        events.put((self, None))

    def stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            self._process.stdin.close()

    def failure(self) -> Failure | None:
        """What went wrong, after the end; None if it finished, or stopped as it was told."""
        code = self._process.returncode
        self._process.stdout.close()
        self._process.stdin.close()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip()
        self._errors.close()
        if code == 0 or (code == 130 and self._stopped):
            return None
        if self._refused is not None:
            return Failure(self._refused, True)
        how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        return Failure(said or f"its process {how}", False)


def work() -> None:
    """The process of a `_Worker`: a job as a line of JSON on standard input, messages as lines of JSON on standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(0, "rb", buffering=0, closefd=False) as lines:  # raw: a thread that waits in a buffer could hang the end
        job = json.loads(lines.readline())
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no message
    sys.argv = job["command"]
    torch.set_num_threads(job["threads"])
    closed = threading.Event()

    def wait_for_end() -> None:
        while os.read(0, 1):
            pass
        closed.set()

    threading.Thread(target=wait_for_end, daemon=True).start()

    def tell(**message: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody listens any more: what counts is that the run is saved
            channel.write(json.dumps(message) + "\n")
            channel.flush()

    def progress(state: dict) -> None:
        if state.get("done"):
            tell(progress=state)

    try:
        _finish_cell(
            Recipe(**job["recipe"]), job["out"], job["network"], resume=job["resume"], say=lambda text: tell(say=text),
            progress=progress, stop=closed.is_set,
        )  # fmt: skip
    except InputError as error:
        tell(refused=str(error))
        sys.exit(2)
    except Interrupted:
        sys.exit(130)
