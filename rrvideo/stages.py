"""Threads that work ahead of each other: what one makes waits in a short line until the next one takes it."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic, Self, TypeVar

from rrvideo.errors import Cancelled, VideoError

__all__ = ["Cancel", "Stages"]

GRACE = 5.0  # seconds that a reader has to end; then it is left to itself
GLANCE = 0.05  # seconds between two looks at the flag while there is nothing to take

T = TypeVar("T")


class Cancel:
    """A flag by which any thread stops a watch or an answer, within a chunk or a token: there `Cancelled` is raised."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        """Ask to stop. The flag stays set."""
        self._event.set()

    @property
    def cancelled(self) -> bool:
        return self._event.is_set()

    def check(self) -> None:
        """Raise `Cancelled` if stopping was asked for."""
        if self.cancelled:
            raise Cancelled("cancelled")


@dataclass(slots=True)
class _Line(Generic[T]):
    """What a thread has made and nobody has taken yet."""

    room: int
    items: deque[T] = field(default_factory=deque)
    error: BaseException | None = None
    ended: bool = False


class Stages:
    """The threads of one watch. When the `with` block ends, for whatever reason, so do they."""

    def __init__(self, cancel: Cancel) -> None:
        self._cancel = cancel
        self._changed = threading.Condition()  # of any line, or of `_over`
        self._over = False
        self._threads: list[tuple[threading.Thread, float | None]] = []  # and how long to wait for their end

    def ahead(self, source: Generator[T], *, room: int, patience: float = math.inf) -> Iterator[T]:
        """Run `source` in a thread of its own, up to `room` items ahead, and iterate over what it yields.

        What it raises is raised where its items are taken. `patience` is for readers, which may hang: one that yields
        nothing for so many seconds while it is waited for is a `VideoError`, and is left to itself.
        """
        line: _Line[T] = _Line(room)
        thread = threading.Thread(target=self._work, args=(source, line), daemon=True)
        self._threads.append((thread, None if math.isinf(patience) else min(patience, GRACE)))
        thread.start()
        return self._take(line, patience)

    def check(self) -> None:
        """Raise `Cancelled` if stopping was asked for, or if the `with` block has ended."""
        self._cancel.check()
        if self._over:
            raise Cancelled("the watch has ended")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()
        for thread, timeout in self._threads:
            thread.join(timeout)

    def _work(self, source: Generator[T], line: _Line[T]) -> None:
        try:
            with closing(source):
                for item in source:
                    with self._changed:
                        line.items.append(item)
                        self._changed.notify_all()
                        self._changed.wait_for(lambda: self._over or len(line.items) < line.room)
                        if self._over:
                            return
        except BaseException as error:  # every failure is the taker's to know
            line.error = error
        finally:
            with self._changed:
                line.ended = True
                self._changed.notify_all()

    def _take(self, line: _Line[T], patience: float) -> Iterator[T]:
        while True:
            with self._changed:
                deadline = time.monotonic() + patience
                while not line.items and not line.ended:
                    self.check()
                    if time.monotonic() > deadline:
                        raise VideoError(
                            f"the reader has given no frame for {patience:g} seconds",
                            "the file or its disk does not answer; another reader may",
                        )
                    self._changed.wait(GLANCE)
                self.check()
                if not line.items:
                    break
                item = line.items.popleft()
                self._changed.notify_all()
            yield item
        if line.error is not None:
            raise line.error
