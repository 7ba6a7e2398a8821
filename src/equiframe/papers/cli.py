"""The verb ``equiframe reproduce``: list the papers' tables, or run any part of one beside its published numbers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from equiframe.errors import InputError
from equiframe.papers.grid import Column, Row, Table, choose
from equiframe.papers.tables import DATA_SETS, TABLES, find_table
from equiframe.recipe import setting_from_text

_DEFAULT_SEEDS = (0, 1, 2)
_OWN_OPTIONS = {"data": "data", "data_root": "data-root", "method": "rows", "seed": "seeds"}  # not for --set


def add_arguments(
    parser: argparse.ArgumentParser, whole_numbers: Callable[[str], tuple[int, ...]], seconds: Callable[[str], float]
) -> None:
    """The options of the verb, for the caller's parser; ``whole_numbers`` reads lists such as 0,1,2, ``seconds`` times such as 2h."""
    add = parser.add_argument
    add("table", metavar="TABLE", nargs="?", help="a table's name; without one, all tables are listed")
    add("--only", type=_words, metavar="COLUMN,…", help="only these columns; patterns such as 'cifar10-*' too")
    add("--rows", type=_words, metavar="ROW,…", help="only these rows")
    add("--seeds", type=whole_numbers, default=_DEFAULT_SEEDS, help="whole numbers, separated by commas [0,1,2]")
    add("--epochs", type=int, metavar="N", help="instead of the table's")
    add("--data-root", metavar="DIR", help="where the data sets lie [data]")
    add("--download", action="store_true", help="download a built-in data set that is missing")
    add("--data", metavar="DATA", help="other images in place of the table's (the verdict is then for them alone)")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="any other recipe field")
    add("--out", metavar="DIR", help="where to save, and what is finished [runs/reproduce-TABLE]")
    add("--budget", type=seconds, metavar="TIME", help="begin no further run after this time: 90s, 30min, 8h, 2d")
    add("--dry-run", action="store_true", help="tell what would be run and what it would cost")
    add("--show", action="store_true", help="print all that is finished, and train nothing")


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise argparse.ArgumentTypeError(f"{text!r} names nothing")
    return words


def run(arguments: argparse.Namespace, reporter: Any, print_table: Callable[..., None]) -> int:
    """The verb. ``reporter`` tells a person of progress on stderr, ``print_table`` prints a table to stdout."""
    if arguments.table is None:
        return _list(arguments, print_table)
    table = find_table(arguments.table)
    columns = choose("column", arguments.only, table.columns)
    rows = choose("row", arguments.rows, table.rows)
    out = Path(arguments.out) if arguments.out else Path("runs") / f"reproduce-{table.name}"
    if arguments.show:
        return _show(table, out, arguments, print_table)
    changes = _changes(arguments, columns)
    if arguments.dry_run:
        return _dry_run(table, columns, rows, changes, out, arguments, print_table)
    from equiframe.papers.reproduce import reproduce
    from equiframe.train import Interrupted

    try:
        content = reproduce(
            table, columns, rows, arguments.seeds, out, changes=changes, budget=arguments.budget,
            say=reporter.say, progress=reporter.progress, on_cell=reporter.cell,
        )  # fmt: skip
    except Interrupted:
        reporter.say(f"stopped and saved in {out}; the same command continues")
        return 130
    reporter.say(f"saved in {out}")
    print(json.dumps(content)) if arguments.json else _print(content, print_table)
    return 0


def _changes(arguments: argparse.Namespace, columns: Sequence[Column]) -> dict[str, object]:
    """The recipe fields that the command line gives in place of the table's."""
    changes: dict[str, object] = {}
    for name, value in map(setting_from_text, arguments.set):
        if name in _OWN_OPTIONS:
            raise InputError(f"--set cannot change {name!r}; use --{_OWN_OPTIONS[name]}")
        changes[name] = value
    for name in ("epochs", "data_root", "data"):
        if getattr(arguments, name) is not None:
            changes[name] = getattr(arguments, name)
    if arguments.download:
        changes["download"] = True
    needed = sorted({column.data for column in columns})
    if "data" in changes and len(needed) > 1:
        raise InputError(
            f"--data takes the place of one data set, and the columns need {', '.join(needed)}; choose some with --only"
        )
    return changes


def _list(arguments: argparse.Namespace, print_table: Callable[..., None]) -> int:
    records = [_describe(table) for table in TABLES.values()]
    if arguments.json:
        print(json.dumps(records))
        return 0
    rows = [
        [
            r["name"], r["what"], f"{len(r['rows'])} x {len(r['columns'])}", ", ".join(r["data"]),
            f"{r['known']} / {r['unknown']}", _millions(r["image_passes"]),
        ]
        for r in records
    ]  # fmt: skip
    caption = (
        "known / unknown: the paper's cells by whether any published number is known to us; passes: training images x "
        "epochs of all rows, columns and 3 seeds, in millions. equiframe reproduce TABLE --dry-run tells more"
    )
    columns = ["table", "what", "rows x columns", "data", "known / unknown", "M passes"]
    print_table("tables of the papers", columns, rows, caption, left=True)
    return 0


def _describe(table: Table) -> dict[str, object]:
    return {
        "name": table.name,
        "paper": table.paper,
        "what": table.what,
        "rows": {row.name: row.what for row in table.rows},
        "columns": {column.name: column.what for column in table.columns},
        "claims": [claim.text for claim in table.claims],
        "data": {c.data: DATA_SETS[c.data].how for c in table.columns},
        "known": table.num_known,
        "unknown": table.num_unknown,
        "image_passes": table.image_passes(table.columns, table.rows, len(_DEFAULT_SEEDS), DATA_SETS),
    }


def _millions(passes: int) -> str:
    return f"{passes / 1e6:,.0f}" if passes >= 1e7 else f"{passes / 1e6:.2g}"


def _dry_run(
    table: Table, columns: Sequence[Column], rows: Sequence[Row], changes: Mapping[str, object], out: Path,
    arguments: argparse.Namespace, print_table: Callable[..., None],
) -> int:  # fmt: skip
    from equiframe.papers.reproduce import check_folder, finished

    check_folder(table, out)
    plan = []
    for column in columns:
        left = {row.name: [s for s in arguments.seeds if s not in finished(out, column, row)] for row in rows}
        cost = sum(table.image_passes([column], [r], len(left[r.name]), DATA_SETS, **changes) for r in rows)
        data = DATA_SETS[column.data]
        plan.append({
            "column": column.name, "what": column.what, "data": changes.get("data", column.data),
            "data_needed": f"{data.label}: {data.how}", "to_run": left, "image_passes": cost,
            "published": {row.name: [p.__dict__ for p in table.cell(row, column)] or "unknown" for row in rows},
        })  # fmt: skip
    if arguments.json:
        print(json.dumps({"table": table.name, "out": str(out), "changes": changes, "columns": plan}))
        return 0
    total = len(rows) * len(arguments.seeds)
    lines = [
        [p["column"], p["what"], str(p["data"]), f"{sum(map(len, p['to_run'].values()))} of {total}",
         _millions(p["image_passes"])]
        for p in plan
    ]  # fmt: skip
    needed = "; ".join(dict.fromkeys(p["data_needed"] for p in plan))
    caption = f"rows: {', '.join(row.name for row in rows)}\nthe paper's data: {needed}\nresults in {out}"
    print_table(
        f"{table.name}: {table.what}", ["column", "what", "data", "to run", "M passes"], lines, caption, left=True
    )
    return 0


def _show(table: Table, out: Path, arguments: argparse.Namespace, print_table: Callable[..., None]) -> int:
    from equiframe.papers.reproduce import collect

    if not out.is_dir():
        raise InputError(f"no such folder: {out}; --out says where the results of {table.name} lie")
    content = collect(table, out)
    print(json.dumps(content)) if arguments.json else _print(content, print_table)
    return 0


def _print(content: Mapping, print_table: Callable[..., None]) -> None:
    from equiframe.papers.reproduce import here_text, setting_lines, verdict_lines

    lines = [
        [column["name"], name, here_text(cell), cell["published_text"]]
        for column in content["columns"]
        if column["finished"]
        for name, cell in column["rows"].items()
    ]
    title = f"{content['table']}: {content['what']}"
    if not lines:
        print(f"{title}: nothing is finished")
        return
    print_table(title, ["column", "row", "here", "published"], lines, content["measure"], left=True)
    print("\n".join(["", *verdict_lines(content), *setting_lines(content), *(f"note: {n}" for n in content["notes"])]))
