"""Files that survive: written whole or not at all, known by a checksum, in a folder that one process owns at a time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from equiframe.errors import InputError

CHECKSUMS = "checksums.json"
LOCK = ".lock"
JSON_LIMIT = 1 << 28  # bytes of a JSON file: the positions of twenty million images


def atomic_write(path: Path, content: bytes | str, *, keep: Path | None = None) -> None:
    """Replace a file in one step: readers see the old content or the new, also after a crash.

    Args:
        keep: what the old file is called from then on. A crash between the two renames leaves it there alone.
    """
    if isinstance(content, str):
        content = content.encode(errors="surrogateescape")  # file names may hold bytes that are not UTF-8
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if keep is not None and path.exists():
                os.replace(path, keep)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    if hasattr(os, "O_DIRECTORY"):  # the new name, too, is on the disk; some file systems cannot promise it
        with contextlib.suppress(OSError):
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def tidy(folder: Path) -> None:
    """Remove what `atomic_write` left in a folder where its process was killed, and is no more."""
    for left in folder.glob(".*.tmp"):
        writer = left.name.split(".")[-2]
        if writer.isdecimal() and os.name == "posix" and not _lives(int(writer)):
            left.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def read_limited(path: Path, at_most: int) -> bytes:
    """A file's content; one that is larger than ``at_most`` bytes is refused before it is read."""
    size = path.stat().st_size
    if size > at_most:
        raise InputError(f"{path} has {size:,} bytes; at most {at_most:,} are read")
    return path.read_bytes()


# --- checksums --------------------------------------------------------------------------------------------------------
#
# checksums.json: name → SHA-256 of every content that the file may rightly have, and of the table itself. A new content is
# announced beside the present one before the file is replaced, so that a crash between the two leaves a table that is true.


def checksum(content: bytes) -> str:
    """SHA-256, in hexadecimal digits, as ``sha256sum`` prints it."""
    return hashlib.sha256(content).hexdigest()


def read_checksums(folder: Path) -> dict[str, list[str]]:
    """The table; empty where there is none (runs of earlier versions)."""
    try:
        table = json.loads(read_limited(folder / CHECKSUMS, 1 << 20))
        if not all(isinstance(sums, list) for sums in table.values()):
            raise ValueError("not a table of checksums")
        for name in table:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"{name[:60]!r} is outside the folder")
        own = table.pop(CHECKSUMS, None)
        if own not in (None, [_table_sum(table)]):
            raise ValueError("it does not match its own checksum")
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{folder / CHECKSUMS} is damaged ({error}); without that file nothing is checked") from error
    return table


def write_checksums(folder: Path, table: Mapping[str, list[str]]) -> None:
    atomic_write(folder / CHECKSUMS, json.dumps({**table, CHECKSUMS: [_table_sum(table)]}, indent=1) + "\n")


def _table_sum(table: Mapping[str, list[str]]) -> str:
    return checksum(json.dumps(dict(table)).encode())


def announce(folder: Path, files: Mapping[str, bytes]) -> None:
    """Record the checksums of files that are about to be written."""
    table = read_checksums(folder)
    for name, content in files.items():
        table[name] = [checksum(content), *table.get(name, [])[:1]]
    write_checksums(folder, table)


def settle_checksums(folder: Path) -> None:
    """Forget announcements that a crash left unfulfilled. A damaged file keeps all of its, and stays found out."""
    table = read_checksums(folder)
    settled = {}
    for name, sums in table.items():
        if (folder / name).is_file():
            now = checksum((folder / name).read_bytes()) if len(sums) > 1 else None
            settled[name] = [now] if now in sums else sums
    if settled != table:
        write_checksums(folder, settled)


def verify(folder: Path, name: str, content: bytes) -> None:
    """Raises `InputError` where a file's content is not what was written."""
    sums = read_checksums(folder).get(name)
    if sums is not None and checksum(content) not in sums:
        raise _damaged(folder, name)


def verify_lines(folder: Path, name: str, content: bytes) -> None:
    """`verify` of a file that lines are added to: its checksum is that of the lines that were there when it was taken."""
    sums, known = read_checksums(folder).get(name), hashlib.sha256()
    if sums is None or known.hexdigest() in sums:
        return
    for line in content.splitlines(keepends=True):
        known.update(line)
        if known.hexdigest() in sums:
            return
    raise _damaged(folder, name)


def _damaged(folder: Path, name: str) -> InputError:
    return InputError(
        f"{folder / name} is damaged: it does not match {CHECKSUMS} (if you changed it on purpose, delete that file)"
    )


# --- one process at a time --------------------------------------------------------------------------------------------


def lock(folder: Path) -> BinaryIO | None:
    """Hold a folder until the file that is returned is closed, or the process ends in whatever way.

    None on systems and file systems without locks (``flock``).

    Raises:
        InputError: if another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        file = open(folder / LOCK, "ab")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"cannot write {folder / LOCK}: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise InputError(
            f"another process is training in {folder}; wait for its end, or choose another --out"
        ) from error
    except OSError:  # a network file system that has no locks
        file.close()
        return None
    return file
