"""Completion of commands in the shell, by shtab: verbs, options, their choices, methods and files."""

from __future__ import annotations

import argparse

from equiframe.errors import InputError, unknown

SHELLS = ("bash", "zsh", "tcsh", "fish")
FILES = {"RUN", "DATA", "FILE", "FILE.html", "FILE.csv", "IMAGE_OR_FOLDER", "FEATURES.npz"}


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script that makes a shell complete the parser's commands."""
    if shell not in SHELLS:
        raise unknown("shell", shell, SHELLS)
    try:
        import shtab
    except ImportError as error:
        raise InputError("--print-completion needs shtab: pip install 'equiframe[train]'") from error
    from equiframe.method import METHODS

    verbs = next(a for a in parser._actions if a.dest == "verb").choices
    for action in (a for p in (parser, *verbs.values()) for a in p._actions):
        name = str(action.metavar)
        if action.choices is None and "|" in name:  # checked by the recipe, with a better message than argparse's
            action.choices = name.split("|")
        elif action.dest in ("method", "methods", "reference") and action.choices is None:
            action.choices = list(METHODS)
        elif name in FILES:
            action.complete = shtab.FILE
        elif name == "DIR":
            action.complete = shtab.DIRECTORY
    return shtab.complete(parser, shell)
