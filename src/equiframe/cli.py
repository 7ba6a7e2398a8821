"""The command line: a verb a function. Progress goes to stderr, results to stdout.

Exit 0 done, 2 wrong input (one clear line), 130 interrupted after saving, 1 our bug (with a traceback).
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import signal
import sys
import time
import typing
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from equiframe.errors import InputError, unknown
from equiframe.recipe import FIELD_NAMES, Recipe, load_recipe

_GROUPS = (
    ("data", "data"),
    ("method", "method"),
    ("backbone", "network"),
    ("epochs", "optimisation"),
    ("track", "records"),
    ("device", "machine"),
)


class _Parser(argparse.ArgumentParser):
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


def _recipe_flags(parser: argparse.ArgumentParser, *, without: Sequence[str] = ()) -> None:
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
        if f.name == "class_counts":
            options |= {"type": _whole_numbers, "metavar": "N,N,…"}
        elif bool in kinds:
            options["action"] = argparse.BooleanOptionalAction
        else:
            kind = next(k for k in kinds if k is not type(None))
            metavar = {int: "N", float: "X", str: "NAME"}[kind]
            options |= {"type": kind, "metavar": "|".join(f.metadata["choices"]) or metavar}
        group.add_argument("--" + f.name.replace("_", "-"), **options)


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers with commas between") from error


def _parser() -> _Parser:
    parser = _Parser(
        prog="equiframe",
        description="Classify imbalanced images on a fixed frame: train, compare, evaluate, predict.",
        epilog="equiframe VERB --help tells a verb's options. Start with: equiframe compare digits --imbalance 50",
    )
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)
    data_help = (
        "built-in name (digits, cifar10, cifar100, svhn, svhn-extra, stl10), folder of class folders, or Parquet folder"
    )

    def verb(name: str, function: Callable, summary: str, *, recipe: bool = False) -> _Parser:
        sub = verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        sub.set_defaults(function=function, parser=sub)
        if recipe:
            sub.add_argument("data", metavar="DATA", nargs="?", help=data_help)
            sub.add_argument("--config", metavar="FILE", help="recipe in YAML; flags override it")
            sub.add_argument("--out", metavar="DIR", help="where to save [runs/…, named by data and method]")
        sub.add_argument("--json", action="store_true", help="machine-readable results on stdout")
        sub.add_argument("--quiet", action="store_true", help="no progress")
        if recipe:
            _recipe_flags(sub, without=("method", "seed") if name == "compare" else ())
        return sub

    sub = verb("train", _train, "train one model into a run folder", recipe=True)
    sub.add_argument("--resume", action="store_true", help="continue an interrupted run")
    sub = verb("compare", _compare, "train several methods with several seeds and compare them", recipe=True)
    sub.add_argument(
        "--methods", default="ce,balanced-softmax,etf-ce,etf-la", help="names, separated by commas [%(default)s]"
    )
    sub.add_argument(
        "--seeds", type=_whole_numbers, default=(0, 1, 2), help="whole numbers, separated by commas [0,1,2]"
    )
    sub = verb("evaluate", _evaluate, "measure a finished run again, on its own test images")
    sub.add_argument("run", metavar="RUN", help="a run folder")
    sub.add_argument("--collapse", action="store_true", help="also every measure of neural collapse (training images)")
    sub.add_argument("--data", metavar="DATA", help="where the run's images lie now [where it found them]")
    sub.add_argument("--device", default="auto", help="cpu, cuda, … [auto]")
    sub = verb("report", _report, "write one HTML page about finished runs")
    sub.add_argument("runs", metavar="RUN", nargs="+", help="run folders, or folders of runs such as a comparison's")
    sub.add_argument("--out", metavar="FILE.html", help="where to write the page [report.html in the first folder]")
    sub.add_argument("--figures", metavar="DIR", help="also write each figure as PNG, SVG and PDF")
    sub = verb("collapse", _collapse, "measure neural collapse of features from anywhere")
    sub.add_argument(
        "features",
        metavar="FEATURES.npz",
        help="arrays features (N, D) and labels (N,); optional class_vectors (K, D), bias (K,), logits (N, K)",
    )
    sub.add_argument(
        "--center", default="class", help="global mean: of the class means, or of all samples: class, sample"
    )
    sub = verb("predict", _predict, "classify images with a finished run")
    sub.add_argument("run", metavar="RUN", help="a run folder")
    sub.add_argument("images", metavar="IMAGE_OR_FOLDER", nargs="+", help="images, or folders of images")
    sub.add_argument("--out", metavar="FILE.csv", help="where to write the CSV [stdout]")
    sub.add_argument("--top", type=int, default=5, metavar="K", help="how many classes an image [5]")
    sub.add_argument("--device", default="auto", help="cpu, cuda, … [auto]")
    verb("methods", _methods, "list the named methods")
    sub = verb("frame", _frame, "describe the fixed frame for K classes in D dimensions")
    sub.add_argument("num_classes", metavar="K", type=int)
    sub.add_argument("dim", metavar="D", type=int)
    sub.add_argument(
        "--geometry", default="auto", help="auto, simplex, orthoplex, kerdock, gold, embedded, code [auto]"
    )
    sub.add_argument("--plot", metavar="FILE", help="draw it (png, svg, pdf): arrows for D = 3, else the cosines")
    verbs.add_parser("peeled", add_help=False, help="the layer-peeled model: solve it, or judge a claim of the paper")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = _parser()
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that lacks a character is no reason to lose a result
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        if words[:1] == ["peeled"]:  # has a parser of its own, and torch behind it
            from equiframe.peeled import run

            run(words[1:])
            return 0
        arguments, rest = parser.parse_known_args(words)
        if arguments.version:
            from equiframe import __version__

            print(__version__)
            return 0
        if arguments.verb is None:
            parser.print_help()
            return 0
        if rest:
            _refuse(rest[0], arguments)
        return arguments.function(arguments) or 0
    except InputError as error:
        print(f"equiframe: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("equiframe: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except PermissionError as error:
        print(f"equiframe: no permission: {error.filename or error}", file=sys.stderr)
        return 2


def command() -> typing.NoReturn:
    """`main` as a process of its own. Until training puts its own handler there (which saves), Ctrl-C ends the process at
    once and in one line: raised as an exception it could land in the middle of a library's import."""

    def leave(signum: int, frame: object) -> typing.NoReturn:
        os.write(2, b"\nequiframe: interrupted\n")
        os._exit(130)

    signal.signal(signal.SIGINT, leave)
    sys.exit(main())


def _refuse(word: str, arguments: argparse.Namespace) -> typing.NoReturn:
    if not word.startswith("-"):
        raise InputError(f"unexpected argument {word!r} (see: equiframe {arguments.verb} --help)")
    name = word.split("=")[0]
    near = difflib.get_close_matches(name, arguments.parser.flags(), n=1, cutoff=0.5)
    raise InputError(f"unknown option {name!r}" + (f"; did you mean {near[0]!r}?" if near else "") +
                     f" (see: equiframe {arguments.verb} --help)")  # fmt: skip


def _recipe(arguments: argparse.Namespace, *, saved: bool = False) -> Recipe:
    """Defaults, then the recipe file (or, with ``saved``, the recipe of the run in ``--out``), then flags."""
    given = {name: getattr(arguments, name) for name in FIELD_NAMES if name != "data" and hasattr(arguments, name)}
    stated = load_recipe(arguments.config) if arguments.config else {}
    if saved and arguments.out and not arguments.config and (Path(arguments.out) / "recipe.yaml").is_file():
        stated = load_recipe(Path(arguments.out) / "recipe.yaml")
    if arguments.data is not None:
        given["data"] = arguments.data
    recipe = Recipe(**{**stated, **given})
    if not recipe.data:
        raise InputError(
            f"DATA is missing: equiframe {arguments.verb} DATA … (a folder of images, or a name such as digits)"
        )
    return recipe


def _default_out(recipe: Recipe, *rest: str) -> Path:
    tail = [f"r{recipe.imbalance:g}"] if recipe.imbalance else []
    return Path("runs") / "-".join([Path(recipe.data).resolve().name, *tail, *rest])


class _Reporter:
    """Tells a person what happens, on stderr: a live line on a terminal, one line an epoch elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.live = sys.stderr.isatty() and not quiet
        self.started = time.monotonic()
        self.prefix = ""

    def say(self, text: str) -> None:
        if not self.quiet:
            self._clear()
            print(text, file=sys.stderr, flush=True)

    def cell(self, method: str, seed: int, number: int, total: int) -> None:
        self.prefix = f"[{number}/{total}] {method}, seed {seed}: "
        self.say(self.prefix.rstrip(": "))

    def progress(self, state: dict) -> None:
        if self.quiet:
            return
        if state.get("done"):
            validation = f", validation macro {100 * state['val_macro']:.1f} %" if "val_macro" in state else ""
            text = (
                f"{self.prefix}epoch {state['epoch'] + 1}/{state['epochs']}: loss {state['loss']:.4f}{validation}, "
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
            text = f"{self.prefix}{step}: loss {state['loss']:.4f}"
            print(text, end="", file=sys.stderr, flush=True)

    def _clear(self) -> None:
        if self.live:
            print("\r\x1b[K", end="", file=sys.stderr)


def _print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", *, left=False
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 or left else "right", no_wrap=not left)
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    if caption:
        console.print(caption, style="dim", highlight=False)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _print_metrics(metrics: dict, title: str) -> None:
    from equiframe.compare import COLUMNS

    caption = (
        f"percent on {metrics['num_test']:,} {metrics['evaluated_on']} images; "
        f"temperature {metrics['temperature']:.3g} from {metrics['temperature_from']}"
    )
    if metrics["temperature"] > 500:
        caption += " (at its limit: the model is no better than chance where it was fitted)"
    untested = [c["name"] for c in metrics["classes"] if not c["num_test"]]
    if untested:
        caption += f"; {len(untested)} of {len(metrics['classes'])} classes have no images there and do not count"
    _print_table(title, COLUMNS, [[_percent(metrics[c]) for c in COLUMNS]], caption)


def _train(arguments: argparse.Namespace) -> int:
    recipe = _recipe(arguments, saved=arguments.resume)
    out = Path(arguments.out) if arguments.out else _default_out(recipe, recipe.method, f"s{recipe.seed}")
    from equiframe.train import Interrupted, train

    reporter = _Reporter(arguments.quiet)
    try:
        metrics = train(recipe, out, resume=arguments.resume, say=reporter.say, progress=reporter.progress)
    except Interrupted:
        reporter.say(f"stopped and saved in {out}; continue with: equiframe train --resume --out {out}")
        return 130
    reporter.say(f"report: {_write_report([out], out)}")
    reporter.say(f"saved in {out}")
    print(json.dumps(metrics)) if arguments.json else _print_metrics(metrics, str(out))
    return 0


def _write_report(runs: Sequence[Path], folder: Path) -> Path:
    from equiframe.report import find_runs, write_report

    return write_report(find_runs(runs), folder / "report.html")


def _compare(arguments: argparse.Namespace) -> int:
    recipe = _recipe(arguments)
    methods = [name.strip() for name in arguments.methods.split(",") if name.strip()]
    out = Path(arguments.out) if arguments.out else _default_out(recipe, "compare")
    from equiframe.compare import COLUMNS, Summary, compare
    from equiframe.train import Interrupted

    reporter = _Reporter(arguments.quiet)
    try:
        content = compare(
            recipe, methods, arguments.seeds, out,
            say=reporter.say, progress=reporter.progress, on_cell=reporter.cell,
        )  # fmt: skip
    except Interrupted:
        reporter.say(f"stopped and saved in {out}; the same command continues")
        return 130
    reporter.say(f"report: {_write_report([out], out)}")
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
    _print_table(title, ["method", *COLUMNS], rows, caption)
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from equiframe.measure import evaluate_run

    metrics = evaluate_run(arguments.run, device=arguments.device, full=arguments.collapse, data=arguments.data)
    if arguments.json:
        print(json.dumps(metrics))
        return 0
    _print_metrics(metrics, arguments.run)
    if arguments.collapse:
        known = {
            "top1",
            "macro",
            "many",
            "medium",
            "few",
            "head",
            "middle",
            "tail",
            "worst",
            "ece",
            "nll",
            "temperature",
        }
        _print_values({k: v for k, v in metrics.items() if isinstance(v, float) and k not in known}, "neural collapse")
    return 0


def _print_values(values: dict[str, float | None], title: str) -> None:
    rows = [[name, "–" if value is None else f"{value:.6g}"] for name, value in values.items()]
    _print_table(title, ["measure", "value"], rows)


def _report(arguments: argparse.Namespace) -> int:
    from equiframe.report import find_runs, write_figures, write_report

    runs = find_runs(arguments.runs)
    written = [write_report(runs, arguments.out or Path(arguments.runs[0]) / "report.html")]
    if arguments.figures:
        written += write_figures(runs, arguments.figures)
    if arguments.json:
        print(json.dumps([str(path) for path in written]))
    elif not arguments.quiet:
        figures = f", and {len(written) - 1} figure files in {arguments.figures}" if arguments.figures else ""
        print(f"{len(runs)} run{'s' if len(runs) != 1 else ''} in {written[0]}{figures}", file=sys.stderr)
    return 0


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
        _print_values(values, f"{arguments.features}, global mean: {arguments.center}")
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    if arguments.top < 1:
        raise InputError(f"--top must be at least 1, got {arguments.top}")
    from equiframe.model import load_classifier
    from equiframe.predict import as_csv, find_images, predict
    from equiframe.runs import atomic_write

    target = Path(arguments.out) if arguments.out else None
    if target is not None and not target.parent.is_dir():
        raise InputError(f"no such folder: {target.parent}")
    model, card = load_classifier(arguments.run)
    images = find_images(arguments.images)
    ranked = list(predict(model, card, images, top=arguments.top, device=arguments.device))
    if target is not None:
        atomic_write(target, as_csv(images, ranked))
        if not arguments.quiet:
            print(f"{len(images):,} predictions in {target}", file=sys.stderr)
    if arguments.json:
        print(json.dumps([
            {"image": str(image), "classes": [{"class": name, "probability": p} for name, p in row]}
            for image, row in zip(images, ranked, strict=True)
        ]))  # fmt: skip
    elif target is None:
        print(as_csv(images, ranked), end="")
    return 0


def _methods(arguments: argparse.Namespace) -> int:
    from equiframe.method import METHODS

    if arguments.json:
        print(json.dumps({name: {"summary": m.summary, **m.fields} for name, m in METHODS.items()}))
    else:
        _print_table("methods", ["name", "what it is"], [[name, m.summary] for name, m in METHODS.items()], left=True)
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


if __name__ == "__main__":
    command()
