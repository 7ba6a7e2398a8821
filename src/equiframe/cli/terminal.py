"""What a person sees: progress on stderr, tables on stdout."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


class Reporter:
    """Tells a person what happens, on stderr: a live line on a terminal, one line an epoch elsewhere."""

    def __init__(self, quiet: bool, *, live: bool = True) -> None:
        self.quiet = quiet
        self.live = live and sys.stderr.isatty() and not quiet

    def say(self, text: str) -> None:
        if not self.quiet:
            self._clear()
            print(text, file=sys.stderr, flush=True)

    def cell(self, label: str, number: int, total: int) -> None:
        self.say(f"[{number}/{total}] {label}")

    def progress(self, state: dict) -> None:
        if self.quiet:
            return
        prefix = f"{state['cell']}: " if "cell" in state else ""
        if state.get("done"):
            validation = f", validation macro {100 * state['val_macro']:.1f} %" if "val_macro" in state else ""
            text = (
                f"{prefix}epoch {state['epoch'] + 1}/{state['epochs']}: loss {state['loss']:.4f}{validation}, "
                f"{state['images_per_second']:.0f} images/s"
            )
            if self.live:
                self._clear()
                print(text, end="", file=sys.stderr, flush=True)
            else:
                print(text, file=sys.stderr, flush=True)
        elif self.live:
            self._clear()
            step = f"epoch {state['epoch'] + 1}, step {state['step']}/{state['steps']}"
            text = f"{prefix}{step}: loss {state['loss']:.4f}"
            print(text, end="", file=sys.stderr, flush=True)

    def _clear(self) -> None:
        if self.live:
            print("\r\x1b[K", end="", file=sys.stderr)


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", *, left=False
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 or left else "right", no_wrap=not left)
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    if caption:
        console.print(caption, style="dim", highlight=False)


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def print_metrics(metrics: dict, title: str) -> None:
    from equiframe.compare import COLUMNS

    caption = (
        f"percent on {metrics['num_test']:,} {metrics['evaluated_on']} images; "
        f"temperature {metrics['temperature']:.3g} from {metrics['temperature_from']}"
    )
    if metrics["temperature"] > 500:
        caption += " (at its limit: the model is no better than chance where it was fitted)"
    untested = [c["name"] for c in metrics["classes"] if not c["num_test"]]
    if untested:
        caption += f"; {len(untested)} of {len(metrics['classes'])} classes have no images there and do not count"
    print_table(title, COLUMNS, [[percent(metrics[c]) for c in COLUMNS]], caption)


def print_values(values: dict[str, float | None], title: str) -> None:
    rows = [[name, "–" if value is None else f"{value:.6g}"] for name, value in values.items()]
    print_table(title, ["measure", "value"], rows)


def write_page(folder: Path, reference: str | None = None) -> Path:
    """The report on the runs of a folder, into it."""
    from equiframe.report import find_runs, write_report

    return write_report(find_runs([folder]), folder / "report.html", reference=reference)
