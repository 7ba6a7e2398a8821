"""Numbers and the words that they govern, for the lines that a person reads."""

from __future__ import annotations

from collections.abc import Sequence


def counted(num: int, one: str, many: str | None = None) -> str:
    """A count with its noun, and whatever else depends on the number.

    Args:
        one: what follows a 1.
        many: what follows any other number; default: ``one`` with an s.

    >>> counted(1, "image"), counted(1200, "image"), counted(0, "class", "classes")
    ('1 image', '1,200 images', '0 classes')
    """
    return f"{num:,} {one if num == 1 else many or one + 's'}"


def listed(names: Sequence[str]) -> str:
    """Names with commas and an "and" before the last.

    >>> listed(["ce"]), listed(["ce", "etf-la", "crt"])
    ('ce', 'ce, etf-la and crt')
    """
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)
