"""Methods × seeds on the same images: a grid of runs, of which finished ones are kept, and a table of mean ± sd."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from equiframe.data.prepare import DATA_FIELDS, PreparedData, prepare_data
from equiframe.errors import InputError
from equiframe.method import METHOD_FIELDS, METHODS, resolve_method
from equiframe.recipe import Recipe
from equiframe.runs import MACHINE_FIELDS, RunFolder, atomic_write
from equiframe.summaries import Summary
from equiframe.train import train

COLUMNS = ("top1", "macro", "many", "medium", "few", "worst", "ece")


def compare(
    recipe: Recipe,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: str | Path,
    *,
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[dict], None] = lambda state: None,
    on_cell: Callable[[str, int, int, int], None] = lambda method, seed, number, total: None,
) -> dict[str, object]:
    """Train every method with every seed into ``out/METHOD/seed-N`` and summarise.

    All cells share the images, their cut and their validation split; cells that are finished are kept, an interrupted
    one continues. Seeds vary slowest, so that every method has a first result early.

    Returns:
        the content of ``comparison.json``: the recipe, and per method the measures of each seed and their summary. It
        covers all cells of the folder, those of earlier calls with other methods and seeds too.

    Raises:
        InputError: wrong input; a cell of ``out`` that another recipe made.
    """
    if not methods or not seeds:
        raise InputError("compare needs at least one method and one seed")
    for name, values in (("method", methods), ("seed", seeds)):
        twice = [v for v in values if list(values).count(v) > 1]
        if twice:
            raise InputError(f"{name} {twice[0]} is listed twice")
    overrides = {name: getattr(recipe, name) for name in METHOD_FIELDS}
    for method in methods:
        resolve_method(method, overrides)
    out = Path(out)
    cells = [(recipe.with_(method=m, seed=s), out / m / f"seed-{s}") for s in seeds for m in methods]
    _check_folder(out)
    for cell, path in cells:
        RunFolder(path).check(cell, resume=(path / "recipe.yaml").is_file())

    earlier = _earlier_cells(out)
    for (method, seed), folder in earlier.items():
        folder.agree(recipe.with_(method=method, seed=seed))

    data: PreparedData | None = None
    # the first cell's choice of numerics holds for all, so that methods differ in nothing else
    machine = {name: getattr(f.recipe(), name) for f in list(earlier.values())[:1] for name in MACHINE_FIELDS}
    for number, (cell, path) in enumerate(cells, 1):
        folder = RunFolder(path)
        if not folder.finished:
            data = data or prepare_data(recipe, say)
            on_cell(cell.method, cell.seed, number, len(cells))
            resume = (path / "recipe.yaml").is_file()
            train(cell.with_(**machine), path, resume=resume, data=data, say=say, progress=progress)
        machine = machine or {name: getattr(folder.recipe(), name) for name in MACHINE_FIELDS}
        content = _write(out, recipe, methods)
    return content


def _earlier_cells(out: Path) -> dict[tuple[str, int], RunFolder]:
    """(method, seed) → folder of all cells that a comparison's folder holds."""
    found = [path.parent for path in sorted(out.glob("*/seed-*/recipe.yaml"))]
    return {(path.parent.name, int(path.name.removeprefix("seed-"))): RunFolder(path) for path in found}


def _check_folder(out: Path) -> None:
    """Refuse a folder that holds something else than a comparison: its entries are named by methods."""
    known = {"comparison.json", "comparison.md", "report.html", *METHODS}
    if out.is_dir():
        other = sorted(p.name for p in out.iterdir() if p.name not in known and not p.name.startswith("."))
        if other:
            raise InputError(f"output folder {out} holds other files ({other[0]}); choose another --out")


def summarise(results: dict[str, dict[int, dict]]) -> dict[str, dict[str, Summary]]:
    """Method → measure → `Summary` over its seeds."""
    return {
        method: {key: Summary.of([m.get(key) for m in by_seed.values()]) for key in COLUMNS}
        for method, by_seed in results.items()
        if by_seed
    }


def _write(out: Path, recipe: Recipe, methods: Sequence[str]) -> dict[str, object]:
    """Summarise all finished cells of the folder, those of earlier calls too; the asked methods come first."""
    results: dict[str, dict[int, dict]] = {method: {} for method in methods}
    for (method, seed), folder in _earlier_cells(out).items():
        if folder.finished:
            results.setdefault(method, {})[seed] = folder.read_json("metrics.json")
    summary = summarise(results)
    content = {
        "recipe": {k: v for k, v in recipe.to_dict().items() if k not in ("method", "seed")},
        "data_fields": list(DATA_FIELDS),
        "seeds": {method: sorted(by_seed) for method, by_seed in results.items()},
        "summary": {m: {k: s.__dict__ for k, s in row.items()} for m, row in summary.items()},
        "runs": {
            m: {str(s): {k: v for k, v in r.items() if k != "classes"} for s, r in by.items()}
            for m, by in results.items()
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "comparison.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    atomic_write(out / "comparison.md", markdown_table(summary))
    return content


def markdown_table(summary: dict[str, dict[str, Summary]]) -> str:
    """The table as Markdown: percent, mean ± sd over n seeds."""
    lines = ["| method | n | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for method, row in summary.items():
        lines.append(f"| {method} | {row['top1'].n} | " + " | ".join(row[c].percent() for c in COLUMNS) + " |")
    return "\n".join(lines) + "\n"
