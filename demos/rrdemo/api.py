"""The endpoints for programs: `watch` a video, then `ask` about it, in the session that gradio_client keeps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from rrdemo.conversation import Done, Event, Note, Phase, Piece, Queued, Settings, Watched
from rrdemo.handlers import Handlers, read_settings
from rrvideo.errors import RRVideoError

__all__ = ["Endpoints"]

GLANCE = 0.1  # seconds between two words about a phase: each frame is none of a program's business

Document = dict[str, Any]  # as JSON takes it


class Endpoints:
    """What programs may call; parameters are named as on the command line."""

    def __init__(self, handlers: Handlers) -> None:
        self.handlers = handlers

    def watch(
        self,
        request: gr.Request,
        video: str,
        start: str,
        end: str,
        fps: float,
        max_frames: int,
        sampling: str,
        attention: str,
        tau: float,
    ) -> Iterator[Document]:
        """Watch an uploaded video; what comes last says what was seen of it, and what that took."""
        session = self.handlers.session(request)
        with _told():
            if not video:
                raise RRVideoError("no video was given", 'pass video=handle_file("match.mp4")')
            settings = read_settings(start, end, fps, max_frames, sampling, attention, tau)
            file = session.open_file(video, upload=True)
            notes, way = [*file.warnings], _Way()
            for event in session.watch(settings):
                yield from way.told(event)
                match event:
                    case Note(text):
                        notes.append(text)
                    case Watched(plan, seconds, density):
                        seen = {"file": file.to_dict(), "plan": plan.to_dict(), "seconds": seconds, "density": density}
                        yield {"state": "watched", **seen, "notes": notes}

    def ask(self, request: gr.Request, question: str) -> Iterator[Document]:
        """Answer a question about the video that was opened last; first comes what there is of it, last all.

        That is not the one of a watch that was refused: `video` says which one it is.
        """
        session = self.handlers.session(request)
        answer, notes, way = "", [], _Way()
        with _told():
            for event in session.ask(question, session.settings or Settings()):
                yield from way.told(event)
                match event:
                    case Piece(text):
                        answer += text
                        yield {"state": "answering", "answer": answer}
                    case Note(text):
                        notes.append(text)
                    case Done(turn):
                        name = session.file and session.file.name
                        yield {"state": "done", "video": name, **turn.to_dict(), "notes": notes}


class _Way:
    """How far it is to what was asked for: of each phase now and then, and always when it is complete."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: dict[str, float] = {}  # by phase, when it was told of

    def told(self, event: Event) -> Iterator[Document]:
        match event:
            case Queued(position):
                yield {"state": "waiting", "position": position}
            case Phase(name, done, total, seconds, finished):
                now = self._clock()
                if finished or now - self._last.get(name, -math.inf) >= GLANCE:
                    self._last[name] = now
                    yield {"state": "watching", "phase": name, "done": done, "total": total, "seconds": seconds}


@contextmanager
def _told() -> Iterator[None]:
    """Known failures in the words that a client gets to read; the server's log has no need of them."""
    try:
        yield
    except RRVideoError as error:
        raise gr.Error(str(error), print_exception=False) from error
