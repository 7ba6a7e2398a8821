"""The verb compare."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from equiframe.cli.flags import AddVerb, default_out, recipe_of, whole_numbers
from equiframe.cli.terminal import Reporter, print_table, write_page


def add_verbs(verb: AddVerb) -> None:
    sub = verb("compare", _compare, "train several methods with several seeds and compare them", recipe=True)
    sub.add_argument(
        "--methods", default="ce,balanced-softmax,etf-ce,etf-la", help="names, separated by commas [%(default)s]"
    )
    sub.add_argument(
        "--seeds", type=whole_numbers, default=(0, 1, 2), help="whole numbers, separated by commas [0,1,2]"
    )


def _compare(arguments: argparse.Namespace) -> int:
    recipe = recipe_of(arguments)
    methods = [name.strip() for name in arguments.methods.split(",") if name.strip()]
    out = Path(arguments.out) if arguments.out else default_out(recipe, "compare")
    from equiframe.compare import COLUMNS, Summary, compare
    from equiframe.train import Interrupted

    reporter = Reporter(arguments.quiet)
    try:
        content = compare(
            recipe, methods, arguments.seeds, out,
            say=reporter.say, progress=reporter.progress, on_cell=reporter.cell,
        )  # fmt: skip
    except Interrupted:
        reporter.say(f"stopped and saved in {out}; the same command continues")
        return 130
    reporter.say(f"report: {write_page(out)}")
    reporter.say(f"saved in {out}")
    if arguments.json:
        print(json.dumps(content))
        return 0
    seeds = sorted({seed for of_method in content["seeds"].values() for seed in of_method})
    caption = (
        f"percent, mean ± sd over seeds {','.join(map(str, seeds))}" if len(seeds) > 1 else f"percent, seed {seeds[0]}"
    )
    rows = [[m, *(Summary(**row[c]).percent() for c in COLUMNS)] for m, row in content["summary"].items()]
    title = f"{recipe.data}" + (f", imbalance ratio {recipe.imbalance:g}" if recipe.imbalance else "")
    print_table(title, ["method", *COLUMNS], rows, caption)
    return 0
