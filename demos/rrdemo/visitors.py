"""Who is here: a session for each browser tab or API client, which nobody else can name."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from rrdemo.session import Session
from rrdemo.studio import Studio

__all__ = ["Visitors"]

PATIENCE = 12 * 3600.0  # seconds that a session may rest when nobody said goodbye


@dataclass(slots=True)
class Visit:
    """A session, and when it was last used."""

    session: Session
    used: float = 0.0


class Visitors:
    """The sessions of one app by the keys that Gradio gives to tabs; all methods may be called from any thread."""

    def __init__(self, studio: Studio, clock: Callable[[], float] = time.monotonic) -> None:
        self.studio = studio
        self._clock = clock
        self._visits: dict[str, Visit] = {}
        self._lock = threading.Lock()

    def session(self, key: str) -> Session:
        """The session of the tab `key`; a new one at its first visit."""
        with self._lock:
            visit = self._visits.get(key)
            if visit is None:
                visit = self._visits[key] = Visit(Session(self.studio))
            visit.used = self._clock()
        self._close_forgotten()
        return visit.session

    def find(self, session_id: str) -> Session | None:
        """The session with this id, which only its own page knows."""
        with self._lock:
            return next((visit.session for visit in self._visits.values() if visit.session.id == session_id), None)

    def leave(self, key: str) -> None:
        """The tab is closed: free all that its session holds."""
        with self._lock:
            visit = self._visits.pop(key, None)
        if visit:
            visit.session.close()

    def close(self) -> None:
        """Close all sessions."""
        for key in list(self._visits):
            self.leave(key)

    def _close_forgotten(self) -> None:
        with self._lock:
            now = self._clock()
            forgotten = [key for key, visit in self._visits.items() if now - visit.used > PATIENCE]
        for key in forgotten:
            self.leave(key)

    def __len__(self) -> int:
        return len(self._visits)
