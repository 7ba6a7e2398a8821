"""Flags: a parser whose errors are one line, and the recipe's fields as options."""

from __future__ import annotations

import argparse
import contextlib
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from equiframe.errors import InputError, unknown
from equiframe.recipe import FIELD_NAMES, Recipe, load_recipe, setting_from_text

_GROUPS = (
    ("data", "data"),
    ("method", "method"),
    ("backbone", "network"),
    ("epochs", "optimisation"),
    ("track", "records"),
    ("device", "machine"),
)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line that names the nearest option."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> typing.NoReturn:
        raise InputError(f"{message} (see: {self.prog} --help)")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            raise unknown("command" if action.dest == "verb" else action.dest, value, action.choices)

    def flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]


AddVerb = Callable[..., Parser]  # name, function, summary → the verb's parser


def recipe_flags(parser: argparse.ArgumentParser, *, without: Sequence[str] = ()) -> None:
    """A flag for every field of the recipe; flags that are not given leave no trace."""
    hints = typing.get_type_hints(Recipe)
    starts = dict(_GROUPS)
    group = parser
    for f in fields(Recipe):
        if f.name in starts:
            group = parser.add_argument_group(starts[f.name])
        if f.name == "data" or f.name in without:
            continue
        default = "" if f.default is None or f.default is False else f" [{f.default}]"
        options: dict = {
            "dest": f.name,
            "default": argparse.SUPPRESS,
            "help": (f.metadata["help"] + default).replace("%", "%%"),
        }
        kinds = typing.get_args(hints[f.name]) or (hints[f.name],)
        if f.name in ("class_counts", "class_tree"):
            options |= {"type": whole_numbers, "metavar": "N,N,…"}
        elif bool in kinds:
            options["action"] = argparse.BooleanOptionalAction
        else:
            kind = next(k for k in kinds if k is not type(None))
            metavar = {int: "N", float: "X", str: "NAME"}[kind]
            options |= {"type": kind, "metavar": "|".join(f.metadata["choices"]) or metavar}
        if f.name == "compile":  # --compile alone and --no-compile, as when it was a switch
            options |= {"nargs": "?", "const": "on"}
            group.add_argument("--no-compile", dest="compile", action="store_const", const="off",
                               default=argparse.SUPPRESS, help="--compile off")  # fmt: skip
        group.add_argument("--" + f.name.replace("_", "-"), **options)


def whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers with commas between") from error


def recipe_of(arguments: argparse.Namespace, *, saved: bool = False, data_needed: bool = True) -> Recipe:
    """Defaults, then the recipe file (or, with ``saved``, the recipe of the run in ``--out``), flags, and ``--set``."""
    given = {name: getattr(arguments, name) for name in FIELD_NAMES if name != "data" and hasattr(arguments, name)}
    stated = load_recipe(arguments.config) if arguments.config else {}
    if saved and arguments.out and not arguments.config and (Path(arguments.out) / "recipe.yaml").is_file():
        stated = load_recipe(Path(arguments.out) / "recipe.yaml")
    if arguments.data is not None:
        given["data"] = arguments.data
    settings = dict(map(setting_from_text, arguments.settings))
    if arguments.verb == "compare":
        for name in ("method", "seed"):
            if name in settings:
                raise InputError(f"--set {name}: a comparison takes --{name}s")
    recipe = Recipe(**{**stated, **given, **settings})
    if not recipe.data and data_needed:
        raise InputError(
            f"DATA is missing: equiframe {arguments.verb} DATA … (a folder of images, or a name such as digits)"
        )
    return recipe


def default_out(recipe: Recipe, *rest: str) -> Path:
    tail = [f"r{recipe.imbalance:g}"] if recipe.imbalance else []
    data = recipe.data.removeprefix("hf:").replace(":", "-") if recipe.data.startswith("hf:") else recipe.data
    path = Path(data).resolve()
    return Path("runs") / "-".join([path.stem if path.is_file() else path.name, *tail, *rest])


def seconds(text: str) -> float:
    """``90s``, ``30min``, ``1.5h``, ``2d`` → seconds."""
    match = re.fullmatch(r"([\d.]+)\s*(s|min|h|d)", text.strip())
    with contextlib.suppress(ValueError):
        if match:
            return float(match[1]) * {"s": 1, "min": 60, "h": 3600, "d": 86400}[match[2]]
    raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 90s, 30min, 2h or 1d")
