"""The one exception for everything that a user can mend.

The command line prints its message as one line and exits with code 2; a library user gets an ordinary
``ValueError``. Anything else that escapes is our bug (exit code 1, with a traceback).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

FEW = 12  # names that are listed even beside a near one


class InputError(ValueError):
    """Something in the caller's input is wrong; the message names the thing and says what would do."""


class BadImage(InputError):
    """A file that should be an image and cannot be read as one."""


def unknown(kind: str, name: object, known: Iterable[str]) -> InputError:
    """The error for an unknown name, with the nearest known one; all known ones where there are few, or none is near.

    >>> str(unknown("method", "etf-rd", ["ce", "etf-dr"]))
    "unknown method 'etf-rd'; did you mean 'etf-dr'? (known: ce, etf-dr)"
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    listed = f" (known: {', '.join(names)})" if not near or len(names) <= FEW else ""
    return InputError(f"unknown {kind} {name!r}{hint}{listed}")
