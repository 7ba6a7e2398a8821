"""What a person sees: progress on stderr, tables on stdout."""

from __future__ import annotations

import os
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
            known = f", knew {100 * state['mix_share']:.0f} % of its images before" if state.get("mix_share") else ""
            text = (
                f"{prefix}epoch {state['epoch'] + 1}/{state['epochs']}: loss {state['loss']:.4f}{validation}{known}, "
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
    from rich.table import Table

    console = _console()
    widths = [max(len(cell) for cell in cells) for cells in zip(columns, *rows, strict=True)]
    for k, part in enumerate([range(len(columns))] if left else _parts(widths, console.width)):
        table = Table(
            title=title if k == 0 else None,
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        for i in part:
            side = "left" if i == 0 or left else "right"
            table.add_column(columns[i], justify=side, no_wrap=not left or i == 0, overflow="fold")
        for row in rows:
            table.add_row(*(row[i] for i in part))
        console.print(table)
    if caption:
        print_note(caption)


def print_note(text: str) -> None:
    """Small print below a table."""
    _console().print(text, style="dim", highlight=False)


def _console():
    """As wide as the terminal; of a pipe, as COLUMNS says or 120."""
    from rich.console import Console

    told = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()
    return Console(width=None if told else 120)


def _parts(widths: Sequence[int], room: int) -> list[list[int]]:
    """The columns of tables that fit into the room one below the other; each begins with the first, and has at least one more."""
    parts = [[0]]
    for i, width in enumerate(widths[1:], start=1):
        if len(parts[-1]) > 1 and sum(widths[j] + 3 for j in parts[-1]) + width + 2 > room:
            parts.append([0])
        parts[-1].append(i)
    return parts


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def print_metrics(metrics: dict, title: str) -> None:
    from equiframe.compare import COLUMNS

    caption = (
        f"percent on {metrics['num_test']:,} {metrics['evaluated_on']} images; "
        f"temperature {metrics['temperature']:.3g} from {metrics['temperature_from']}"
    )
    if doubt := temperature_doubt(metrics):
        caption += f" ({doubt})"
    untested = [c["name"] for c in metrics["classes"] if not c["num_test"]]
    if untested:
        caption += f"; {len(untested)} of {len(metrics['classes'])} classes have no images there and do not count"
    columns = [c for c in COLUMNS if metrics[c] is not None]
    print_table(title, columns, [[percent(metrics[c]) for c in columns]], caption)


def temperature_doubt(metrics: dict) -> str:
    """Why a fitted temperature, or the model that needs it, should not be trusted; empty if nothing speaks against it."""
    if metrics["temperature"] > 500:
        return "at its limit: the model is no better than chance where it was fitted"
    if metrics["temperature"] > 10:
        return "very high: logits say next to nothing about the class; often a run that was too short"
    if metrics.get("val_top1") == 1 and metrics["temperature_from"] == "validation":
        return "all right there: no error tells how sure it may be; do not trust probabilities near 1"
    return ""


def print_export(record: dict) -> None:
    """What an exported file is, whether it computes what the run does, and what int8 cost."""
    parity, int8 = record["parity"], record.get("int8")
    size = f"{record['bytes'] / 1e6:,.2f} MB"
    print(f"{record['path']}: {record['format']}{', int8' if int8 else ''}, {size}")
    if parity is None:
        print("not checked on any image")
    else:
        print(
            f"{parity['num_images']:,} {parity['of']}: the same class as the run in {100 * parity['argmax_agreement']:.2f} %, "
            f"probabilities differ by at most {parity['max_abs_probabilities']:.2g}, logits by {parity['max_abs_logits']:.2g} "
            f"(largest {parity['largest_logit']:.3g})"
        )
    if int8:
        keys = [key for key in int8["before"] if key != "nll" and int8["before"][key] is not None]
        before, after = ([percent(int8[side][key]) for key in keys] for side in ("before", "after"))
        change = [f"{100 * (int8['after'][key] - int8['before'][key]):+.1f}" for key in keys]
        rows = [["float32", *before], ["int8", *after], ["change", *change]]
        ratio = int8["bytes_float32"] / int8["bytes_int8"]
        print_table(
            f"int8, {int8['kind']}", ["", *keys], rows,
            f"percent on {int8['num_images']:,} {int8['of']} images; {ratio:.1f} times smaller than float32",
        )  # fmt: skip


def print_values(values: dict[str, float | None], title: str) -> None:
    rows = [[name, "–" if value is None else f"{value:.6g}"] for name, value in values.items()]
    print_table(title, ["measure", "value"], rows)


def write_page(folder: Path, reference: str | None = None) -> Path:
    """The report on the runs of a folder, into it."""
    from equiframe.report import find_runs, write_report

    return write_report(find_runs([folder]), folder / "report.html", reference=reference)
