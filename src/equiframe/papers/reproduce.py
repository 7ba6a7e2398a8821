"""Run any part of a table and set it beside what was published.

``DIR/COLUMN/common/METHOD/seed-N`` holds the rows that are a named method, ``DIR/COLUMN/ROW/METHOD/seed-N`` a row with
fields of its own; each ``common`` or ``ROW`` is a comparison (`equiframe.compare`). Results are read from the run folders
alone, and so is in what they differ from the table's setting.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from equiframe.compare import compare
from equiframe.data.sources import BUILTIN_NAMES
from equiframe.errors import InputError
from equiframe.method import METHOD_FIELDS, resolve_method
from equiframe.papers.grid import Claim, Column, Row, Table
from equiframe.papers.tables import DATA_SETS
from equiframe.papers.verdicts import UNTOLD, Verdict, judge, judge_all
from equiframe.recipe import Recipe
from equiframe.runs import MACHINE_FIELDS, RunFolder, atomic_write, settings_that_differ
from equiframe.summaries import Summary

JSON, MARKDOWN = "reproduction.json", "reproduction.md"


class _BudgetSpent(Exception):
    """No time is left to begin another cell."""


def reproduce(
    table: Table,
    columns: Sequence[Column],
    rows: Sequence[Row],
    seeds: Sequence[int],
    out: str | Path,
    *,
    changes: Mapping[str, object] | None = None,
    budget: float | None = None,
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[dict], None] = lambda state: None,
    on_cell: Callable[..., None] = lambda *cell: None,
) -> dict[str, object]:
    """Train the missing cells of a part of a table, column by column; finished ones are kept.

    Args:
        changes: recipe fields that take the place of the table's, such as epochs, or a stand-in for the data.
        budget: seconds after which no further cell begins.
        say, progress, on_cell: as `equiframe.compare.compare` calls them.

    Returns:
        the content of ``reproduction.json``: all finished cells of the folder, those of earlier calls too.

    Raises:
        InputError: wrong input; a folder that holds something else.
        equiframe.train.Interrupted: after Ctrl-C, with everything saved.
    """
    out, changes = Path(out), dict(changes or {})
    check_folder(table, out)
    for column in columns:
        for row in rows:
            recipe = plan(table, column, row, changes)
            resolve_method(row.method, {name: getattr(recipe, name) for name in METHOD_FIELDS})
    deadline = None if budget is None else time.monotonic() + budget

    def begin_cell(*cell: object) -> None:
        if deadline is not None and time.monotonic() >= deadline:
            raise _BudgetSpent
        on_cell(*cell)

    try:
        for column in columns:
            machine: dict[str, object] = {}  # the first cell's choice of numerics holds for the whole column
            for folder, group in _comparisons(out, column, rows):
                recipe = plan(table, column, group[0], {**changes, **machine})
                say(f"{column.name}: {', '.join(row.name for row in group)}")
                methods = [row.method for row in group]
                compare(recipe, methods, seeds, folder, say=say, progress=progress, on_cell=begin_cell)
                settled = RunFolder(folder / group[0].method / f"seed-{seeds[0]}").recipe()
                machine = {name: getattr(settled, name) for name in MACHINE_FIELDS}
    except _BudgetSpent:
        say("the budget is spent; the same command continues")
    finally:
        if any(out.glob("*/*/*/seed-*/metrics.json")):
            save(table, out)
    return collect(table, out)


def plan(table: Table, column: Column, row: Row, changes: Mapping[str, object]) -> Recipe:
    """The recipe of a cell with its data found: a built-in name stays one, other data lie under ``data_root``.

    Raises:
        InputError: where the data are not there, or a folder hides the built-in data set of that name.
    """
    recipe = _located(table.recipe(column, row, changes))
    if "data" in changes:
        return recipe
    if column.data in BUILTIN_NAMES:
        if Path(column.data).is_dir():
            raise InputError(
                f"a folder {column.data!r} lies here and would be taken for the data set {column.data!r}; run elsewhere, "
                f"or say --data {column.data} if it stands in"
            )
    elif not Path(recipe.data).is_dir():
        raise InputError(
            f"{DATA_SETS[column.data].label} must lie in {recipe.data} (--data-root says where); "
            f"--data PATH takes other images in its place"
        )
    return recipe


def _located(recipe: Recipe) -> Recipe:
    """Data of a table that are not built in lie under ``data_root``."""
    if recipe.data in BUILTIN_NAMES or recipe.data not in DATA_SETS:
        return recipe
    return recipe.with_(data=str(Path(recipe.data_root) / recipe.data))


def _comparisons(out: Path, column: Column, rows: Sequence[Row]) -> list[tuple[Path, list[Row]]]:
    """The rows of a column by the folder of the comparison that they share."""
    groups: dict[Path, list[Row]] = {}
    for row in rows:
        groups.setdefault(_comparison(out, column, row), []).append(row)
    return list(groups.items())


def _comparison(out: Path, column: Column, row: Row) -> Path:
    return out / column.name / (row.name if row.fields else "common")


def finished(out: Path, column: Column, row: Row) -> dict[int, RunFolder]:
    """Seed → run of the finished cells of a row in a column."""
    folders = (_comparison(out, column, row) / row.method).glob("seed-*")
    runs = {int(path.name.removeprefix("seed-")): RunFolder(path) for path in folders}
    return {seed: runs[seed] for seed in sorted(runs) if runs[seed].finished}


def check_folder(table: Table, out: Path) -> None:
    """Refuse a folder that holds something else than results of this table."""
    if not out.is_dir():
        return
    known = {JSON, MARKDOWN, *(c.name for c in table.columns)}
    other = sorted(p.name for p in out.iterdir() if p.name not in known and not p.name.startswith("."))
    if other:
        raise InputError(f"output folder {out} holds other files ({other[0]}); choose another --out")
    if (out / JSON).is_file():
        earlier = RunFolder(out).read_json(JSON).get("table")
        if earlier != table.name:
            raise InputError(f"{out} holds results of table {earlier!r}, not of {table.name!r}; choose another --out")


def departures(table: Table, column: Column, row: Row, run: RunFolder) -> str:
    """In what a run's recipe departs from the table's setting, as text; empty if in nothing. What was left to the method,
    the data or the machine does not count."""
    recipe = run.recipe()
    planned = table.recipe(column, row, {"data_root": recipe.data_root, "compile": recipe.compile})
    left_open = (*MACHINE_FIELDS, *run.read_json("environment.json").get("left_open", ()))
    open_fields = [name for name in left_open if getattr(planned, name) in ("auto", None)]
    planned = _located(planned).with_(seed=recipe.seed, **{name: getattr(recipe, name) for name in open_fields})
    return settings_that_differ(planned, recipe)


def collect(table: Table, out: str | Path) -> dict[str, object]:
    """All finished cells of a folder beside the published numbers, and the verdicts. Accuracies in percent.

    Raises:
        InputError: for a folder that holds something else, or a damaged run.
    """
    out = Path(out)
    check_folder(table, out)
    columns = [_column(table, column, out) for column in table.columns]
    return {
        "table": table.name,
        "paper": table.paper,
        "what": table.what,
        "measure": "top1, percent, last epoch",
        "notes": list(table.notes),
        "columns": columns,
        "claims": [_claim(claim, columns) for claim in table.claims],
    }


def _column(table: Table, column: Column, out: Path) -> dict[str, object]:
    rows = {row.name: _cell(table, column, row, out) for row in table.rows}
    run_with = dict.fromkeys(cell["settings"] for cell in rows.values() if cell["settings"])
    ran = any(cell["by_seed"] for cell in rows.values())
    return {
        "name": column.name,
        "what": column.what,
        "finished": ran,
        "departures": [*run_with, *column.departures, *table.departures] if ran else [],
        "rows": rows,
    }


def _cell(table: Table, column: Column, row: Row, out: Path) -> dict[str, object]:
    runs = finished(out, column, row)
    by_seed = {seed: 100 * run.read_json("metrics.json")["top1"] for seed, run in runs.items()}
    summary = Summary.of(list(by_seed.values()))
    published = table.cell(row, column)
    return {
        "what": row.what,
        "method": row.method,
        "published_as": row.published_as,
        "mean": summary.mean,
        "sd": summary.sd,
        "n": summary.n,
        "by_seed": {str(seed): value for seed, value in by_seed.items()},
        "settings": "; ".join(dict.fromkeys(filter(None, (departures(table, column, row, r) for r in runs.values())))),
        "published": [p.__dict__ for p in published] or ("unknown" if row.published_as else "no such row"),
        "published_text": "; ".join(p.text() for p in published) or ("unknown" if row.published_as else "–"),
    }


def _claim(claim: Claim, columns: Sequence[Mapping]) -> dict[str, object]:
    verdicts = {column["name"]: _judge_column(claim, column) for column in columns}
    overall = judge_all(verdicts)
    judged = [column for column in columns if verdicts[column["name"]].difference is not None]
    return {
        "claim": claim.text,
        "better": claim.better,
        "worse": claim.worse,
        "verdict": overall.verdict,
        "reason": overall.reason,
        "here_only": any(column["departures"] for column in judged),
        "columns": {
            column["name"]: _verdict_record(verdicts[column["name"]]) | {"here_only": bool(column["departures"])}
            for column in columns
        },
    }


def _judge_column(claim: Claim, column: Mapping) -> Verdict:
    missing = [name for name in (claim.better, claim.worse) if not column["rows"][name]["n"]]
    if missing:
        return Verdict(UNTOLD, None, f"no finished run of {' and '.join(missing)}")
    better, worse = (column["rows"][name] for name in (claim.better, claim.worse))
    if better["settings"] != worse["settings"]:
        return Verdict(UNTOLD, None, f"the rows were trained differently ({better['settings'] or worse['settings']})")
    return judge(better["by_seed"], worse["by_seed"])


def _verdict_record(verdict: Verdict) -> dict[str, object]:
    d = verdict.difference
    numbers = {name: getattr(d, name) if d is not None else None for name in ("mean", "low", "high")}
    return {"verdict": verdict.verdict, **numbers, "n": d.n if d is not None else 0, "reason": verdict.reason}


# --- text -------------------------------------------------------------------------------------------------------------


def here_text(cell: Mapping) -> str:
    """``71.3 ± 0.4 (n = 3)``; ``not run`` where nothing is finished."""
    if not cell["n"]:
        return "not run"
    return f"{cell['mean']:.1f}" + (f" ± {cell['sd']:.1f}" if cell["sd"] is not None else "") + f" (n = {cell['n']})"


def verdict_text(record: Mapping) -> str:
    """A claim, or a claim in a column: ``held here: +1.2 (0.3 to 2.1), n = 3``."""
    told = record["verdict"] + (" here" if record["here_only"] and record["verdict"] != UNTOLD else "")
    numbers = ""
    if record.get("mean") is not None:
        numbers = f"{record['mean']:+.1f}"
        numbers += f" (95 % {record['low']:.1f} to {record['high']:.1f})" if record["low"] is not None else ""
        numbers += f", n = {record['n']}"
    detail = "; ".join(filter(None, (numbers, record["reason"])))
    return told + (f": {detail}" if detail else "")


def verdict_lines(content: Mapping) -> list[str]:
    """A line a claim, and under it one for each column that was run."""
    ran = {column["name"] for column in content["columns"] if column["finished"]}
    lines = []
    for claim in content["claims"]:
        lines.append(f"{claim['claim']}: {verdict_text(claim)}")
        lines += [f"  {name}: {verdict_text(v)}" for name, v in claim["columns"].items() if name in ran]
    return lines


def setting_lines(content: Mapping) -> list[str]:
    """In what the columns that were run are not the paper's setting, a line for each kind of departure."""
    where: dict[str, list[str]] = {}
    for column in content["columns"]:
        for departure in column["departures"]:
            where.setdefault(departure, []).append(column["name"])
    return [f"not the paper's setting: {what} ({', '.join(names)})" for what, names in where.items()]


def markdown(content: Mapping) -> str:
    """``reproduction.md``."""
    lines = [f"# {content['table']}: {content['what']}", "", f"{content['paper']}. {content['measure']}.", ""]
    lines += ["| column | row | here | published |", "|---|---|---|---|"]
    for column in content["columns"]:
        for name, cell in column["rows"].items():
            if column["finished"] or isinstance(cell["published"], list):
                lines.append(f"| {column['name']} | {name} | {here_text(cell)} | {cell['published_text']} |")
    lines += ["", "Columns that are not listed were not run, and no published number of theirs is known to us.", ""]
    lines += [
        f"- {line.strip()}" if not line.startswith(" ") else f"  - {line.strip()}" for line in verdict_lines(content)
    ]
    lines += ["", *(f"- {line}" for line in (*setting_lines(content), *content["notes"]))]
    return "\n".join(lines) + "\n"


def save(table: Table, out: Path) -> None:
    """Write ``reproduction.json`` and ``reproduction.md``."""
    content = collect(table, out)
    atomic_write(out / JSON, json.dumps(content, indent=1, allow_nan=False) + "\n")
    atomic_write(out / MARKDOWN, markdown(content))
