"""Verbs on grids of runs: compare, reproduce."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from equiframe.cli.flags import AddVerb, default_out, recipe_of, seconds, whole_numbers
from equiframe.cli.terminal import Reporter, print_note, print_table, temperature_doubt, write_page
from equiframe.papers import cli as papers
from equiframe.recipe import Recipe
from equiframe.words import listed


def add_verbs(verb: AddVerb) -> None:
    sub = verb("compare", _compare, "train several methods with several seeds and compare them", recipe=True)
    sub.add_argument(
        "--methods",
        default="ce,crt-adjusted,balanced-softmax,cosine-la,sqrt-blend,etf-crt,etf-mix-la,etf-mix-blend",
        help="names, separated by commas, each perhaps with fields of its own: etf-la:tau=0.5:lr=0.05 [%(default)s]",
    )
    sub.add_argument(
        "--seeds", type=whole_numbers, default=(0, 1, 2), help="whole numbers, separated by commas [0,1,2]"
    )
    sub.add_argument("--reference", metavar="METHOD", help="hold all others against this one too [the first method]")
    sub.add_argument("--jobs", metavar="N", type=int, default=1, help="runs at a time, in processes of their own [1]")
    sub.add_argument(
        "--budget",
        metavar="TIME",
        type=seconds,
        help="stop and save after 90s, 30min, 2h, …; the same command continues",
    )
    sub.add_argument(
        "--tune", metavar="N", type=int, default=0, help="tune each method by N trials on validation images [0: do not]"
    )
    sub.add_argument("--tune-epochs", metavar="N", type=int, help="epochs of a trial [--epochs]")
    sub = verb("reproduce", _reproduce, "rerun a table of a paper beside its published numbers, or list the tables")
    papers.add_arguments(sub, whole_numbers, seconds)


def _compare(arguments: argparse.Namespace) -> int:
    recipe = recipe_of(arguments)
    methods = [name.strip() for name in arguments.methods.split(",") if name.strip()]
    out = Path(arguments.out) if arguments.out else default_out(recipe, "compare")
    from equiframe.compare import compare
    from equiframe.train import Interrupted

    reporter = Reporter(arguments.quiet, live=arguments.jobs == 1)
    try:
        content = compare(
            recipe, methods, arguments.seeds, out, reference=arguments.reference, jobs=arguments.jobs,
            budget=arguments.budget, tune=arguments.tune, tune_epochs=arguments.tune_epochs,
            say=reporter.say, progress=reporter.progress, on_cell=reporter.cell,
        )  # fmt: skip
    except Interrupted:
        reporter.say(f"stopped and saved in {out}; the same command continues")
        return 130
    if content["summary"]:
        reporter.say(f"report: {write_page(out, content['verdicts']['reference'])}")
    reporter.say(f"saved in {out}")
    if arguments.json:
        print(json.dumps(content))
    else:
        _print_comparison(content, recipe, asked=methods)
    for label, failure in content["failed"].items():
        line = failure["text"].splitlines()[-1]
        print(f"equiframe: {label} failed: {line}", file=sys.stderr)
    if not content["failed"]:
        return 0
    return 2 if all(failure["by_input"] for failure in content["failed"].values()) else 1


def _reproduce(arguments: argparse.Namespace) -> int:
    return papers.run(arguments, Reporter(arguments.quiet), print_table)


def _print_comparison(content: dict, recipe: Recipe, *, asked: list[str]) -> None:
    """The table, what is missing in it, how methods were tuned, and who is better than whom."""
    from equiframe.compare import Summary, families, measured_columns, verdicts_from
    from equiframe.variants import Variant
    from equiframe.verdicts import DIFFERENCE_COLUMNS, difference_note, difference_row, in_words

    seeds = sorted({seed for of_method in content["seeds"].values() for seed in of_method})
    caption = f"percent, mean ± sd over seeds {','.join(map(str, seeds))}"
    if len(seeds) < 2:
        caption = "percent" + (f", seed {seeds[0]}" if seeds else "")
    if content["missing"]:
        num, total = len(content["missing"]), len(content["missing"]) + sum(map(len, content["seeds"].values()))
        caption += f"; {num} of {total} runs are missing (the budget is used up; the same command continues)"
    for name, tuned in content["tuning"].items():
        fields = ", ".join(f"{field} {value:g}" for field, value in tuned["fields"].items()) or "its defaults"
        caption += f"; {name} tuned by {len(tuned['trials'])} trials: {fields}"
    earlier = [name for name in content["summary"] if name not in {Variant.parse(method).name for method in asked}]
    if earlier:
        caption += f"; {listed(earlier)} from earlier calls in this folder"
    summary = {m: {c: Summary(**value) for c, value in row.items()} for m, row in content["summary"].items()}
    columns = measured_columns(summary)
    rows = [[m, *(row[c].percent() for c in columns)] for m, row in summary.items()]
    title = f"{recipe.data}" + (f", imbalance ratio {recipe.imbalance:g}" if recipe.imbalance else "")
    print_table(title, ["method", *columns], rows, caption) if rows else print(f"{title}: {caption}")
    for line in _doubts(content["runs"]):
        print_note(line)
    verdicts = verdicts_from(content)
    if verdicts is None or not verdicts.to_best:
        return
    told = families(verdicts)
    for against, family, _ in told:
        rows = [[c.method, *difference_row(c)] for c in family]
        columns = ["method", *DIFFERENCE_COLUMNS]
        used = [i for i in range(len(columns)) if any(row[i] != "–" for row in rows)]
        print_table(f"against {against}", [columns[i] for i in used], [[row[i] for i in used] for row in rows])
    note = difference_note([c for _, family, _ in told for c in family], *(num for _, _, num in told))
    print_note(note)
    print(in_words(verdicts, summary[verdicts.best]["macro"].mean))


def _doubts(runs: dict[str, dict[str, dict]]) -> list[str]:
    """What speaks against the temperatures of a comparison's runs: one line a doubt, with the runs that have it."""
    found: dict[str, list[str]] = {}
    for method, by_seed in runs.items():
        for seed, metrics in by_seed.items():
            if doubt := temperature_doubt(metrics):
                found.setdefault(doubt, []).append(f"{method} seed {seed}")
    return [f"temperature of {listed(labels)}: {doubt}" for doubt, labels in found.items()]
