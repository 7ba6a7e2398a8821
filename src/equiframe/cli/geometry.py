"""Verbs without a run: collapse of any features, the named methods and recipes, the frame."""

from __future__ import annotations

import argparse
import json
import math

from equiframe.cli.flags import AddVerb
from equiframe.cli.terminal import print_table, print_values
from equiframe.errors import InputError
from equiframe.recipe import load_recipe, packaged_recipes


def add_verbs(verb: AddVerb) -> None:
    sub = verb("collapse", _collapse, "measure neural collapse of features from anywhere")
    sub.add_argument(
        "features",
        metavar="FEATURES.npz",
        help="arrays features (N, D) and labels (N,); optional class_vectors (K, D), bias (K,), logits (N, K)",
    )
    sub.add_argument(
        "--center", default="class", help="global mean: of the class means, or of all samples: class, sample"
    )
    verb("methods", _methods, "list the named methods")
    verb("recipes", _recipes, "list the recipes that --config knows by name")
    sub = verb("frame", _frame, "describe the fixed frame for K classes in D dimensions")
    sub.add_argument("num_classes", metavar="K", type=int)
    sub.add_argument("dim", metavar="D", type=int)
    sub.add_argument(
        "--geometry", default="auto", help="auto, simplex, orthoplex, kerdock, gold, embedded, code [auto]"
    )
    sub.add_argument("--plot", metavar="FILE", help="draw it (png, svg, pdf): arrows for D = 3, else the cosines")


def _collapse(arguments: argparse.Namespace) -> int:
    from equiframe.collapse.files import load_features, measure_features

    arrays = load_features(arguments.features)
    try:
        values = measure_features(arrays, center=arguments.center)
    except InputError as error:
        raise InputError(f"{arguments.features}: {error}") from error
    values = {name: value if math.isfinite(value) else None for name, value in values.items()}
    if arguments.json:
        print(json.dumps(values))
    else:
        print_values(values, f"{arguments.features}, global mean: {arguments.center}")
    return 0


def _methods(arguments: argparse.Namespace) -> int:
    from equiframe.method import METHODS

    if arguments.json:
        print(json.dumps({name: {"summary": m.summary, **m.fields} for name, m in METHODS.items()}))
    else:
        print_table("methods", ["name", "what it is"], [[name, m.summary] for name, m in METHODS.items()], left=True)
    return 0


def _recipes(arguments: argparse.Namespace) -> int:
    if arguments.json:
        print(json.dumps({name: load_recipe(name) for name in packaged_recipes()}))
    else:
        print_table("recipes", ["name", "what it is"], list(packaged_recipes().items()), left=True)
    return 0


def _frame(arguments: argparse.Namespace) -> int:
    from equiframe.frames import describe_frame, frame_text, make_frame

    frame = make_frame(arguments.num_classes, arguments.dim, geometry=arguments.geometry)
    described = describe_frame(frame)
    if arguments.plot:
        from equiframe.report.figures import save_frame_figure

        save_frame_figure(frame, arguments.plot)
    print(json.dumps(described) if arguments.json else frame_text(described))
    return 0
