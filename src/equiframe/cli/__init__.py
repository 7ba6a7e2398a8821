"""The command line: a verb a function. Progress goes to stderr, results to stdout.

Exit 0 done, 2 wrong input (one clear line), 130 interrupted after saving, 3 another process of the run died, 1 our bug (with a
traceback). Of the processes that torchrun starts, the first speaks.
"""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
import typing
from collections.abc import Callable, Sequence

from equiframe.cli import compare, deploy, doctor, finished, geometry, laboratory, training
from equiframe.cli.flags import Parser, recipe_flags
from equiframe.errors import BadImage, InputError


def _parser() -> Parser:
    parser = Parser(
        prog="equiframe",
        description="Classify imbalanced images on a fixed frame: train, compare, evaluate, predict.",
        epilog="equiframe VERB --help tells a verb's options. Start with: equiframe compare digits --imbalance 50",
    )
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    parser.add_argument(
        "--print-completion", metavar="bash|zsh|tcsh|fish", help="print the script that lets a shell complete, and stop"
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser)
    data_help = (
        "built-in name (digits, cifar10, imagenet-lt, …: docs/datasets.md), folder of class folders, of lists of lines "
        "`path label`, or of Parquet files, a train list, or hf:NAME"
    )

    def verb(name: str, function: Callable, summary: str, *, recipe: bool = False) -> Parser:
        sub = verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        sub.set_defaults(function=function, parser=sub)
        if recipe:
            sub.add_argument("data", metavar="DATA", nargs="?", help=data_help)
            sub.add_argument(
                "--config",
                metavar="FILE",
                help="recipe in YAML, or a name that `equiframe recipes` lists; flags override it",
            )
            sub.add_argument(
                "--set", metavar="FIELD=VALUE", action="append", default=[], dest="settings",
                help="any field of the recipe, overriding file and flags; may be given again",
            )  # fmt: skip
            sub.add_argument("--out", metavar="DIR", help="where to save [runs/…, named by data and method]")
        sub.add_argument("--json", action="store_true", help="machine-readable results on stdout")
        sub.add_argument("--quiet", action="store_true", help="no progress")
        if recipe:
            recipe_flags(sub, without=("method", "seed") if name == "compare" else ())
        return sub

    for group in (doctor, training, compare, finished, deploy, geometry, laboratory):
        group.add_verbs(verb)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = _parser()
    size = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1  # as torchrun sets them
    leads = size == 1 or os.environ["RANK"] == "0"
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that lacks a character is no reason to lose a result
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = None
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        arguments, rest = parser.parse_known_args(words)
        if arguments.version:
            from equiframe import __version__

            print(__version__)
            return 0
        if arguments.print_completion is not None:
            from equiframe.cli.completion import completion

            print(completion(parser, arguments.print_completion))
            return 0
        if arguments.verb is None:
            parser.print_help()
            return 0
        if rest:
            _refuse(rest[0], arguments)
        if size > 1 and arguments.verb != "train":
            raise InputError(f"{arguments.verb} is one process; of the verbs, torchrun starts train in several")
        return arguments.function(arguments) or 0
    except InputError as error:
        skips = isinstance(error, BadImage) and arguments and "--on-bad-image" in arguments.parser.flags()
        if leads:
            hint = " (--on-bad-image skip leaves such files out and lists them)" if skips else ""
            print(f"equiframe: {' '.join(str(error).split())}{hint}", file=sys.stderr)
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
        if os.environ.get("RANK", "0") == "0":
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
