"""Methods × seeds on the same images: a grid of runs, of which finished ones are kept, and what it says of the methods."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from equiframe import tune as tuning
from equiframe.data.sources import load_dataset
from equiframe.errors import InputError, unknown
from equiframe.files import tidy
from equiframe.grid import Cell, Failure, Grid
from equiframe.method import METHODS
from equiframe.recipe import DATA_FIELDS, Recipe
from equiframe.runs import MACHINE_FIELDS, RunFolder, atomic_write
from equiframe.summaries import Summary
from equiframe.variants import Variant, parse_variants
from equiframe.verdicts import (
    DIFFERENCE_COLUMNS,
    Comparison,
    Verdicts,
    difference_note,
    difference_row,
    in_words,
    judge_runs,
)

COLUMNS = ("top1", "macro", "many", "medium", "few", "worst", "ece")


def compare(
    recipe: Recipe,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: str | Path,
    *,
    reference: str | None = None,
    jobs: int = 1,
    budget: float | None = None,
    tune: int = 0,
    tune_epochs: int | None = None,
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[dict], None] = lambda state: None,
    on_cell: Callable[[str, int, int], None] = lambda label, number, total: None,
) -> dict[str, object]:
    """Train every method with every seed into ``out/METHOD/seed-N`` and summarise.

    All cells share the images, their cut and their validation split; cells that are finished are kept, an interrupted
    one continues. Seeds vary slowest, so that every method has a first result early.

    Args:
        methods: names, perhaps with fields of their own: ``etf-la:tau=0.5`` (`Variant`).
        reference: the row that all others are held against, beside the best; default: the first method.
        jobs: cells at a time, each a process of its own if more than one.
        budget: seconds after which no cell begins and running ones are stopped and saved.
        tune: trials of a random search on validation images for each method (`equiframe.tune`); 0: none.
        tune_epochs: epochs of a trial; default: the recipe's.
        say, progress, on_cell: as `Grid` calls them.

    Returns:
        the content of ``comparison.json``: the recipe, per method the measures of each seed and their summary, the
        verdicts, and which of the asked cells failed or are missing. It covers all cells of the folder, those of
        earlier calls with other methods and seeds too.

    Raises:
        InputError: wrong input; a cell of ``out`` that another recipe made; every cell failed.
        Interrupted: after Ctrl-C or SIGTERM, with everything saved.
    """
    if not methods or not seeds:
        raise InputError("compare needs at least one method and one seed")
    for seed in seeds:
        if list(seeds).count(seed) > 1:
            raise InputError(f"seed {seed} is listed twice")
    _check_numbers(jobs, budget, tune, tune_epochs)
    variants, out = parse_variants(methods), Path(out)
    _check_folder(out)
    earlier = _earlier_cells(out)
    rows = {v.name: v for v in (*variants, *(variant for variant, _ in earlier))}
    reference = variants[0].name if reference is None else Variant.parse(reference).name
    if reference not in rows:
        raise unknown("reference", reference, rows)
    _check_tuning(recipe, rows, out, tune)
    trials = tuning.trial_cells(variants, recipe, out, num=tune, epochs=tune_epochs) if tune else []
    cells = _cells(recipe, variants, seeds, out)
    for cell in trials or cells:
        RunFolder(cell.path).check(cell.recipe, resume=cell.begun)
    asked = {v.name for v in variants} if trials else set()
    for (variant, seed), folder in earlier.items():
        if variant.name not in asked:  # tuned ones are checked once their settings are known
            folder.agree(_tuned(recipe, variant, out).with_(seed=seed))

    grid = Grid(
        jobs=jobs, until=None if budget is None else time.monotonic() + budget, machine=_machine(earlier, trials),
        say=say, progress=progress, on_cell=on_cell,
    )  # fmt: skip
    chosen: dict[str, dict] | None = {}
    if trials:
        chosen = _tune(grid, trials, variants, recipe, out, tune)
        cells = _cells(recipe, variants, seeds, out)
        for cell in cells if chosen is not None else ():
            RunFolder(cell.path).check(cell.recipe, resume=cell.begun)

    def write() -> dict[str, object]:
        return _write(out, recipe, variants, reference, cells, grid.failures)

    if chosen is not None:
        grid.run(cells, lambda: write() and None)
    failed = [f for label, f in grid.failures.items() if label in {cell.label for cell in cells}]
    if failed and not any(cell.finished for cell in cells):
        raise InputError(failed[0].text) if failed[0].by_input else RuntimeError(failed[0].text)
    return write()


def _check_numbers(jobs: int, budget: float | None, tune: int, tune_epochs: int | None) -> None:
    if jobs < 1:
        raise InputError(f"jobs must be at least 1, got {jobs}")
    if budget is not None and not budget > 0:
        raise InputError(f"budget must be more than 0 seconds, got {budget:g}")
    if tune < 0:
        raise InputError(f"tune must be at least 1 trial a method, got {tune}")
    if tune_epochs is not None and not tune:
        raise InputError("tune epochs need tune: how many trials each method gets")


def _check_tuning(recipe: Recipe, rows: Mapping[str, Variant], out: Path, num: int) -> None:
    """Refuse what would make tuning unfair: unequal budgets, and choosing on the images that are measured."""
    for name, variant in rows.items():
        trained = any((out / variant.folder).glob("seed-*"))
        record = _tuning_record(out, variant)
        of = len(record["trials"]) if record else 0
        if (trained or record) and of != num:
            raise InputError(
                f"{out} holds {name} tuned with {of} trials, and now there are to be {num}: a fair comparison gives each "
                f"method the same; use {f'--tune {of}' if of else 'no --tune'}, or another --out"
            )
    if num and load_dataset(recipe.data, data_root=recipe.data_root, download=recipe.download).test is None:
        raise InputError(
            f"{recipe.data} has no test split, so the results are those of the validation images: tuning would choose "
            "settings on the very images that are measured"
        )


def _cells(recipe: Recipe, variants: Sequence[Variant], seeds: Sequence[int], out: Path) -> list[Cell]:
    return [
        Cell(_tuned(recipe, v, out).with_(seed=seed), out / v.folder / f"seed-{seed}", f"{v.name}, seed {seed}")
        for seed in seeds
        for v in variants
    ]


def _tuned(recipe: Recipe, variant: Variant, out: Path) -> Recipe:
    """The recipe of a row, with the settings that tuning chose for it, if it was tuned."""
    record = _tuning_record(out, variant)
    return variant.recipe(recipe, **(record["fields"] if record else {}))


def _machine(earlier: Mapping[tuple[Variant, int], RunFolder], trials: Sequence[Cell]) -> dict[str, object]:
    """The first cell's choice of numerics holds for all, so that methods differ in nothing else."""
    begun = [*earlier.values(), *(RunFolder(cell.path) for cell in trials if cell.begun)]
    for recipe in (folder.recipe() for folder in begun):
        machine = {name: getattr(recipe, name) for name in MACHINE_FIELDS}
        if "auto" not in machine.values():
            return machine
    return {}


def _tune(
    grid: Grid, trials: Sequence[Cell], variants: Sequence[Variant], recipe: Recipe, out: Path, num: int
) -> dict[str, dict] | None:
    """Run all trials and write ``tuning/METHOD/tuning.json``; None while trials are missing."""
    if any(not trial.finished for trial in trials):
        for variant in variants:
            grid.say(tuning.describe_space(variant, recipe, num))
    grid.run(trials)
    found = {v: tuning.choose(v, recipe, out, num, grid.failures) for v in variants}
    if None in found.values():
        return None
    for variant, choice in found.items():
        RunFolder(tuning.folder_of(out, variant)).write_json("tuning.json", choice)
        grid.say(tuning.describe_choice(variant, choice))
    return {variant.name: choice for variant, choice in found.items()}


def _earlier_cells(out: Path) -> dict[tuple[Variant, int], RunFolder]:
    """(variant, seed) → folder of all cells that a comparison's folder holds; what else lies beside one (``seed-0-crt``, a second stage's run) is none."""
    found = [path.parent for path in sorted(out.glob("*/seed-*/recipe.yaml"))]
    cells = [(p, p.name.removeprefix("seed-")) for p in found]
    return {(Variant.from_folder(p.parent.name), int(n)): RunFolder(p) for p, n in cells if n.isdecimal()}


def _check_folder(out: Path) -> None:
    """Refuse a folder that holds something else than a comparison: its entries are named by methods."""
    known = {"comparison.json", "comparison.md", "report.html", "tuning", *METHODS}
    for path in sorted(out.iterdir()) if out.is_dir() else ():
        name = path.name
        if name not in known and not name.startswith(".") and Variant.from_folder(name) is None:
            raise InputError(f"output folder {out} holds other files ({name}); choose another --out")


def summarise(results: dict[str, dict[int, dict]]) -> dict[str, dict[str, Summary]]:
    """Method → measure → `Summary` over its seeds."""
    return {
        method: {key: Summary.of([m.get(key) for m in by_seed.values()]) for key in COLUMNS}
        for method, by_seed in results.items()
        if by_seed
    }


def _write(
    out: Path,
    recipe: Recipe,
    asked: Sequence[Variant],
    reference: str,
    cells: Sequence[Cell],
    failures: Mapping[str, Failure],
) -> dict[str, object]:
    """Summarise all finished cells of the folder, those of earlier calls too; the asked methods come first."""
    results: dict[str, dict[int, dict]] = {variant.name: {} for variant in asked}
    judged: dict[str, dict[int, tuple]] = {variant.name: {} for variant in asked}
    variants = {variant.name: variant for variant in asked}
    for (variant, seed), folder in _earlier_cells(out).items():
        if folder.finished:
            variants.setdefault(variant.name, variant)
            metrics = folder.read_json("metrics.json")
            results.setdefault(variant.name, {})[seed] = metrics
            judged.setdefault(variant.name, {})[seed] = metrics["macro"], folder.read_arrays("predictions.npz")
    summary, verdicts = summarise(results), None
    if summary:
        verdicts = judge_runs(judged, reference=reference if judged.get(reference) else None)
    tuned = {name: _tuning_record(out, variant) for name, variant in variants.items()}
    content = {
        "recipe": {k: v for k, v in recipe.to_dict().items() if k not in ("method", "seed")},
        "data_fields": list(DATA_FIELDS),
        "variants": {name: dict(variant.fields) for name, variant in variants.items()},
        "tuning": {name: record for name, record in tuned.items() if record is not None},
        "seeds": {method: sorted(by_seed) for method, by_seed in results.items()},
        "summary": {m: {k: s.__dict__ for k, s in row.items()} for m, row in summary.items()},
        "verdicts": None if verdicts is None else json.loads(json.dumps(asdict(verdicts))),
        "failed": {c.label: asdict(failures[c.label]) for c in cells if c.label in failures},
        "missing": [c.label for c in cells if not c.finished and c.label not in failures],
        "runs": {
            m: {str(s): {k: v for k, v in r.items() if k != "classes"} for s, r in by.items()}
            for m, by in results.items()
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    tidy(out)
    atomic_write(out / "comparison.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    atomic_write(out / "comparison.md", markdown(summary, verdicts))
    return content


def _tuning_record(out: Path, variant: Variant) -> dict | None:
    folder = RunFolder(tuning.folder_of(out, variant))
    return folder.read_json("tuning.json") if (folder.path / "tuning.json").is_file() else None


def families(verdicts: Verdicts) -> list[tuple[str, list[Comparison], int]]:
    """What is to be told of the verdicts: against whom, the comparisons, and how many Holm's correction is for. A single
    pair is told once, of the best against the reference."""
    told = [(verdicts.best, verdicts.to_best, verdicts.num_pairs)]
    if verdicts.reference not in (None, verdicts.best):
        told.append((verdicts.reference, verdicts.to_reference, len(verdicts.to_reference)))
    if verdicts.num_pairs == 1:
        told = told[-1:]
    return [family for family in told if family[1]]


def verdicts_from(content: Mapping[str, object]) -> Verdicts | None:
    """The verdicts of a ``comparison.json``."""
    record = content["verdicts"]
    if record is None:
        return None
    lists = {key: [Comparison(**c) for c in record[key]] for key in ("to_best", "to_reference")}
    return Verdicts(**(record | lists))


def markdown(summary: dict[str, dict[str, Summary]], verdicts: Verdicts | None) -> str:
    """``comparison.md``: the table, what it says, and the differences with their intervals."""
    text = markdown_table(summary)
    if verdicts is None or len(summary) < 2:
        return text
    text += f"\n{in_words(verdicts, summary[verdicts.best]['macro'].mean)}\n"
    for against, family, num in families(verdicts):
        lines = [f"| against {against} | " + " | ".join(DIFFERENCE_COLUMNS) + " |"]
        lines += ["|---" * (len(DIFFERENCE_COLUMNS) + 1) + "|"]
        lines += [f"| {c.method} | " + " | ".join(difference_row(c)) + " |" for c in family]
        text += "\n" + "\n".join([*lines, "", difference_note(family, num)]) + "\n"
    return text


def measured_columns(summary: Mapping[str, Mapping[str, Summary]]) -> list[str]:
    """Those of `COLUMNS` that some method has a value of: of classes that are all rare there are no ``many``."""
    return [c for c in COLUMNS if any(row[c].mean is not None for row in summary.values())]


def markdown_table(summary: dict[str, dict[str, Summary]]) -> str:
    """The table as Markdown: percent, mean ± sd over n seeds."""
    columns = measured_columns(summary)
    lines = ["| method | n | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for method, row in summary.items():
        lines.append(f"| {method} | {row['top1'].n} | " + " | ".join(row[c].percent() for c in columns) + " |")
    return "\n".join(lines) + "\n"
