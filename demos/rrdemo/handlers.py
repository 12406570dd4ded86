"""What happens when something on the page is used: each method takes what Gradio gives and says what to show.

They hold no state of their own: that is in the session, which belongs to the tab that asks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from rrdemo import answers, views
from rrdemo.conversation import (
    Answering,
    Done,
    Event,
    FileView,
    Note,
    Pause,
    Phase,
    Piece,
    Queued,
    Settings,
    Stopped,
    Turn,
    Watched,
)
from rrdemo.layout import Page
from rrdemo.samples import Sample
from rrdemo.session import Session
from rrdemo.timeline import timeline
from rrdemo.visitors import Visitors
from rrdemo.words import elapsed
from rrvideo.clock import parse_time
from rrvideo.errors import RRVideoError

__all__ = ["Handlers", "read_settings"]

GLANCE = 0.1  # seconds between two looks at what goes on: more often is nothing but work for the browser
QUESTIONS = ("Describe the video.", "What happens first?", "What happens last?")

Update = dict[Any, Any]  # of components of the page


@dataclass(slots=True)
class Board:
    """What is going on since something was asked for, as the page tells it."""

    said: str = ""
    phases: dict[str, Phase] = field(default_factory=dict)
    text: str = ""
    notes: list[str] = field(default_factory=list)

    def take(self, event: Event) -> None:
        match event:
            case Queued(position):
                self.said, self.phases = views.queued(position), {}
            case Phase():
                self.said = "Watching the video."
                self.phases[event.name] = event
            case Watched():
                self.said, self.phases = views.watched(event), {}
            case Answering():
                self.said, self.phases = "Answering.", {}
            case Piece():
                self.text += event.text
            case Note():
                self.notes.append(event.text)
            case Done(turn):
                self.said = f"Answered in {elapsed(turn.timings.generate)}." if turn.timings else ""
            case Stopped():
                self.said, self.phases = "Stopped.", {}
            case Pause():
                pass  # nothing has happened

    def progress(self) -> str:
        return views.progress(self.said, [*self.phases.values()])


class Handlers:
    """The page's behaviour; `page` says where results go."""

    def __init__(self, page: Page, visitors: Visitors) -> None:
        self.page = page
        self.visitors = visitors

    def open(self, request: gr.Request, path: str | None, *settings: Any) -> Update:
        """Open what was uploaded; what is refused leaves the page as it was."""
        if path is None:
            return {self.page.upload: None}
        return self._open(lambda session: session.open_file(path, upload=True), QUESTIONS, settings, request)

    def open_sample(self, sample: Sample) -> Callable[..., Update]:
        """What the button of `sample` does."""

        def opened(request: gr.Request, *settings: Any) -> Update:
            return self._open(
                lambda session: session.open_file(sample.file(), name=sample.name, source=sample.source),
                sample.questions,
                settings,
                request,
            )

        return opened

    def _open(
        self,
        open_file: Callable[[Session], FileView],
        questions: tuple[str, ...],
        settings: tuple[Any, ...],
        request: gr.Request,
    ) -> Update:
        page, session = self.page, self.session(request)
        try:
            file = open_file(session)
        except RRVideoError as error:
            return {page.upload: None, page.refusal: views.notice([str(error)], error=True)}
        # A clip of the video before means nothing in this one.
        changed = {page.start: "", page.end: "", page.upload: gr.update(value=None, label="Another video")}
        examples = [{"text": question} for question in questions]
        return {
            **changed,
            page.player: views.player(file, f"video/{session.id}?{time.time_ns()}"),
            page.chat: gr.update(value=[], examples=examples, placeholder=""),
            page.moments: "",
            page.progress: "",
            page.refusal: "",
            page.notice: views.notice(file.warnings),
            page.command: session.command(),
            **self._planned(session, ("", "", *settings[2:])),
        }

    def plan(self, request: gr.Request, *settings: Any) -> Update:
        """Say what watching with these settings would take."""
        return self._planned(self.session(request), settings)

    def watch(self, request: gr.Request, *settings: Any) -> Iterator[Update]:
        """Watch the video, and tell how far it is."""
        session = self.session(request)
        yield from self._work(session, lambda: session.watch(read_settings(*settings)))

    def ask(self, request: gr.Request, question: str, *settings: Any) -> Iterator[Update]:
        """Answer a question; its field is free for the next one as soon as it is accepted."""
        session = self.session(request)
        accepted = {self.page.question: ""}
        yield from self._work(
            session, lambda: session.ask(question, read_settings(*settings)), session.turns, question, accepted
        )

    def ask_example(self, request: gr.Request, event: gr.SelectData, *settings: Any) -> Iterator[Update]:
        """Ask one of the questions that are suggested."""
        session, question = self.session(request), str(event.value["text"])
        yield from self._work(session, lambda: session.ask(question, read_settings(*settings)), session.turns, question)

    def regenerate(self, request: gr.Request, *settings: Any) -> Iterator[Update]:
        """Ask the last question again, with the settings of now."""
        session = self.session(request)
        before, question = session.turns[:-1], session.turns[-1].question if session.turns else None
        yield from self._work(session, lambda: session.regenerate(read_settings(*settings)), before, question)

    def edit(self, request: gr.Request, event: gr.EditData, *settings: Any) -> Iterator[Update]:
        """Ask an edited question in place of the one that it was."""
        session, question = self.session(request), answers.original(str(event.value))
        index = (event.index if isinstance(event.index, int) else event.index[0]) // 2  # of two messages each
        yield from self._work(
            session, lambda: session.edit(index, question, read_settings(*settings)), session.turns[:index], question
        )

    def undo(self, request: gr.Request) -> Update:
        """Take the last question back, for its field if nothing else stands there."""
        session = self.session(request)
        turn = session.undo()
        return {self.page.returned: turn.question if turn else "", **self._conversation(session)}

    def clear(self, request: gr.Request) -> Update:
        """Begin a new conversation about the same video."""
        session = self.session(request)
        session.clear()
        return {self.page.notice: "", self.page.progress: "", **self._conversation(session)}

    def stop(self, request: gr.Request) -> None:
        """End what this session has under way."""
        self.session(request).stop()

    def export_markdown(self, request: gr.Request) -> str:
        """The conversation, for page.js to save."""
        return self.session(request).export_markdown()

    def export_json(self, request: gr.Request) -> str:
        """The conversation with all its figures, for page.js to save."""
        return self.session(request).export_json()

    def notes(self, request: gr.Request, planned: str, *settings: Any) -> Any:
        """What has happened to the video meanwhile, and a plan where that changes it, or where the page shows another.

        Plans are asked for side by side, and the one that reaches the page last may be for older settings: `planned`
        tells what the one that stands there was made for.
        """
        session = self.session(request)
        if notes := session.notes():
            return {self.page.notice: views.notice(notes), **self._planned(session, settings)}
        return gr.skip() if planned == _stamp(session, settings) else self._planned(session, settings)

    def leave(self, request: gr.Request) -> None:
        """The tab is closed."""
        if request.session_hash:
            self.visitors.leave(request.session_hash)

    def session(self, request: gr.Request) -> Session:
        """The session of the tab, or the client, that asks."""
        if not request.session_hash:
            raise gr.Error("Requests need a session_hash, so that they can be told from those of others.")
        return self.visitors.session(request.session_hash)

    def _work(
        self,
        session: Session,
        begin: Callable[[], Generator[Event]],
        before: Sequence[Turn] = (),
        question: str | None = None,
        accepted: Update | None = None,
    ) -> Iterator[Update]:
        """Show a piece of work while it is done: `question` after the turns `before`, or a watch alone.

        `accepted` is shown when it begins. The plan is for whoever wires this to show afterwards, with the settings of
        then.
        """
        page, board, before = self.page, Board(), list(before)
        duration = session.file.duration if session.file else 0.0
        busy = {page.watch: _enabled(False), page.ask: _enabled(False), page.stop: _enabled(True)}
        first = {**busy, page.notice: "", page.returned: "", **(accepted or {})}
        shown, fresh = 0.0, True
        try:
            with closing(begin()) as events:
                for event in events:
                    board.take(event)
                    fresh = fresh or not isinstance(event, Pause)
                    last = isinstance(event, Phase) and event.finished  # of its phase, whose bar must not stop short
                    often = isinstance(event, (Phase, Piece)) and not last and time.monotonic() - shown < GLANCE
                    if not fresh or often:
                        continue
                    update = {page.progress: board.progress(), **({} if shown else first)}
                    if question is not None:
                        update[page.chat] = answers.messages(before, duration, (question, board.text))
                    shown, fresh = time.monotonic(), False
                    yield update
        except RRVideoError as error:
            told = {page.notice: views.notice([*board.notes, str(error)], error=True)}
            if not session.busy:  # with what was asked before
                lost = question if question not in [turn.question for turn in session.turns] else ""
                told |= {page.returned: lost or "", page.progress: "", **self._conversation(session)}
            yield told
        except Exception:  # a fault of ours, which Gradio tells: the page must not look busy for ever
            yield {page.progress: "", **self._conversation(session)}
            raise
        else:
            told = {page.notice: views.notice(board.notes), page.progress: board.progress()}
            yield {**told, **self._conversation(session)}

    def _conversation(self, session: Session) -> Update:
        """All that follows from what was said, but for the timeline, which comes with the plan."""
        duration = session.file.duration if session.file else 0.0
        return {
            self.page.chat: answers.messages(session.turns, duration),
            self.page.moments: self._moments(session),
            self.page.command: session.command(),
        }

    def _planned(self, session: Session, settings: tuple[Any, ...]) -> Update:
        """The plan for these settings, or why there is none, the timeline beside it, and the buttons at rest."""
        page, view, plan, stamp = self.page, None, "", _stamp(session, settings)
        if session.file:
            try:
                view = session.plan(read_settings(*settings))
                plan = views.plan(view)
            except RRVideoError as error:
                plan = views.notice([str(error)], error=True)
        ready = view is not None and view.fits and not session.busy
        watched = view is not None and view.watched
        turn = _last_seen(session)
        return {
            page.plan: plan,
            page.timeline: timeline(session.file.duration, plan=view, turn=turn) if session.file else "",
            page.watch: gr.update(interactive=ready and not watched, value="Watched" if watched else "Watch"),
            page.ask: _enabled(ready),
            page.stop: _enabled(session.busy),
            page.planned: stamp,
        }

    def _moments(self, session: Session) -> str:
        turn = _last_seen(session)
        return views.moments(session.thumbnails(turn)) if turn else ""


def read_settings(
    start: str, end: str, fps: float, max_frames: int, sampling: str, attention: str, tau: float
) -> Settings:
    """Read settings as they stand on the page; `start` and `end` as 1:30 or 90, or empty.

    Raises `RRVideoError` that says what is wrong.
    """
    try:
        times = [(text or "").strip() for text in (start, end)]
        first, last = (parse_time(text) if text else None for text in times)
    except ValueError as error:
        raise RRVideoError(str(error)) from error
    return Settings(first, last, fps, max_frames, sampling, attention, tau)  # type: ignore[arg-type]


def _last_seen(session: Session) -> Turn | None:
    """The last turn of which it is known where the model looked."""
    return next((turn for turn in reversed(session.turns) if turn.attention), None)


def _stamp(session: Session, settings: tuple[Any, ...]) -> str:
    """What a plan and its buttons are made for."""
    file, watched = session.file and Path(session.file.path).parent.name, False  # a folder that is no other file's
    with suppress(RRVideoError):  # these settings make no sense
        watched = session.is_open(read_settings(*settings))
    return json.dumps([file, session.busy, watched, *settings])


def _enabled(yes: bool) -> Any:
    return gr.update(interactive=yes)
