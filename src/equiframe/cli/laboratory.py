"""The verb of the layer-peeled model."""

from __future__ import annotations

import argparse
import json

from equiframe.cli.flags import AddVerb, whole_numbers
from equiframe.cli.terminal import Reporter, print_table


def add_verbs(verb: AddVerb) -> None:
    sub = verb("peeled", _peeled, "solve the layer-peeled model, or judge a claim of the paper in it")
    sub.add_argument("--classes", type=int, default=10, metavar="K", help="number of classes [10]")
    sub.add_argument("--dim", type=int, metavar="D", help="feature width [64, or K-1 if that is more]")
    sub.add_argument(
        "--ratio", "--imbalance", type=float, default=100.0, metavar="R", help="largest over smallest class count [100]"
    )
    sub.add_argument("--profile", default="step", metavar="NAME", help="class counts: step, exp [step]")
    sub.add_argument("--num-minor", type=int, metavar="N", help="minor classes of the step profile [K // 2]")
    sub.add_argument("--class-counts", type=whole_numbers, metavar="N,N,…", help="class counts, in place of all these")
    sub.add_argument("--loss", default="ce", metavar="NAME", help="ce, dr, mse, balanced, adjusted [ce]")
    sub.add_argument("--tau", type=float, default=1.0, metavar="X", help="strength of the loss adjusted [1.0]")
    sub.add_argument(
        "--constraint", default="vector", metavar="NAME",
        help="limit on lengths: vector (each), average (over classes), penalty [vector]",
    )  # fmt: skip
    sub.add_argument("--energy-w", type=float, default=2.0, metavar="X", help="squared length of class vectors [2.0]")
    sub.add_argument("--energy-h", type=float, default=2.0, metavar="X", help="squared length of features [2.0]")
    sub.add_argument("--lambda-w", type=float, default=5e-3, metavar="X", help="penalty on class vectors [0.005]")
    sub.add_argument("--lambda-h", type=float, default=5e-3, metavar="X", help="penalty on features [0.005]")
    sub.add_argument("--claim", metavar="NAME", help="judge a claim instead: C1, C2, C3 (docs/theory.md)")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="of random starts and of the frame [0]")
    sub.add_argument("--figures", metavar="DIR", help="write each figure as PNG, SVG and PDF, animations as GIF")


def _peeled(arguments: argparse.Namespace) -> int:
    from equiframe.peeled import laboratory

    result = laboratory(
        num_classes=arguments.classes, dim=arguments.dim, ratio=arguments.ratio, profile=arguments.profile,
        num_minor=arguments.num_minor, counts=arguments.class_counts, energy_w=arguments.energy_w,
        energy_h=arguments.energy_h, loss=arguments.loss, tau=arguments.tau, constraint=arguments.constraint,
        lambda_w=arguments.lambda_w, lambda_h=arguments.lambda_h, claim=arguments.claim, seed=arguments.seed,
        figures=arguments.figures, say=Reporter(arguments.quiet).say,
    )  # fmt: skip
    if arguments.json:
        print(json.dumps(result))
        return 0
    columns = list(dict.fromkeys(key for row in result["rows"] for key in row))
    rows = [[_cell(row.get(name, "")) for name in columns] for row in result["rows"]]
    title = f"{result['claim']}: {result['statement']}" if result["claim"] else "layer-peeled model"
    print_table(title, [name.replace("_", " ") for name in columns], rows, "\n".join(result["notes"]))
    if result["claim"]:
        print(f"verdict: {result['verdict']}")
    for path in result["figures"]:
        print(f"wrote {path}")
    return 0


def _cell(value: object) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
