"""One process at a time writes to a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rrvideo.errors import RRVideoError

__all__ = ["lock", "only_writer"]


def lock(descriptor: int, path: Path) -> None:
    """Keep others out of the file at `path` for as long as this `descriptor` of it is open, however the process ends.

    Raises `RRVideoError` if somebody else has it. Where the file system knows no locks there is none.
    """
    if os.name != "posix":
        return
    import fcntl

    with suppress(OSError):  # of file systems that know no locks
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RRVideoError(
                f"another process is writing to {path}", "wait until it ends, or name another one"
            ) from error


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Lock the file at `path` inside the `with`; it is made where there is none.

    Raises `RRVideoError` if somebody else has it, or if it cannot be written.
    """
    try:
        file = path.open("ab")
    except OSError as error:
        raise RRVideoError(f"{path} cannot be written: {error.strerror}", "name another one") from error
    with file:
        lock(file.fileno(), path)
        yield
