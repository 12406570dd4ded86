"""What happens when something on the page is used: each method takes what Gradio gives and says what to show.

They hold no state of their own: that is in the session, which belongs to the tab that asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from rrdemo import views
from rrdemo.conversation import (
    Done,
    Event,
    FileView,
    Note,
    Phase,
    Piece,
    PlanView,
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
from rrvideo.clock import parse_clip
from rrvideo.errors import RRVideoError

__all__ = ["Handlers", "read_settings"]

GLANCE = 0.1  # seconds between two looks at what goes on: more often is nothing but work for the browser
QUESTIONS = ("Describe the video.", "What happens first?", "What happens last?")

Update = dict[Any, Any]  # of components of the page


@dataclass(slots=True)
class Board:
    """What has happened since a question was asked."""

    phases: dict[str, Phase] = field(default_factory=dict)
    queued: Queued | None = None
    watched: Watched | None = None
    text: str = ""
    notes: list[str] = field(default_factory=list)

    def take(self, event: Event) -> None:
        match event:
            case Queued():
                self.queued = event
            case Phase():
                self.phases[event.name] = event
            case Watched():
                self.watched = event
            case Piece():
                self.text += event.text
            case Note():
                self.notes.append(event.text)
            case Done() | Stopped():
                pass  # the session's turns have it

    def progress(self) -> str:
        return views.progress([*self.phases.values()], self.queued, self.watched)


class Handlers:
    """The page's behaviour; `page` says where results go."""

    def __init__(self, page: Page, visitors: Visitors) -> None:
        self.page = page
        self.visitors = visitors

    def open(self, request: gr.Request, path: str | None, *settings: Any) -> Update:
        """Open what was uploaded; what is refused leaves the page as it was."""
        if path is None:
            return {self.page.upload: None}
        return self._open(lambda session: session.open_file(path), QUESTIONS, settings, request)

    def open_sample(self, sample: Sample) -> Callable[..., Update]:
        """What the button of `sample` does."""

        def opened(request: gr.Request, *settings: Any) -> Update:
            return self._open(
                lambda session: session.open_file(sample.file(), name=sample.name), sample.questions, settings, request
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
            return {page.upload: None, page.notice: views.notice([str(error)], error=True)}
        # A clip of the video before means nothing in this one.
        changed = {page.start: "", page.end: "", page.upload: gr.update(value=None, label="Another video")}
        examples = [{"text": question} for question in questions]
        return {
            **changed,
            page.player: views.player(file, f"video/{session.id}?{time.time_ns()}"),
            page.chat: gr.update(value=[], examples=examples, placeholder=""),
            page.moments: "",
            page.progress: "",
            page.notice: views.notice(file.warnings),
            page.command: session.command(),
            **self._planned(session, ("", "", *settings[2:])),
        }

    def plan(self, request: gr.Request, *settings: Any) -> Update:
        """Say what watching with these settings would take."""
        session = self.session(request)
        return self._planned(session, settings) if session.file else {self.page.plan: ""}

    def watch(self, request: gr.Request, *settings: Any) -> Iterator[Update]:
        """Watch the video, and tell how far it is."""
        session = self.session(request)
        yield from self._work(session, lambda: session.watch(read_settings(*settings)), settings)

    def ask(self, request: gr.Request, question: str, *settings: Any) -> Iterator[Update]:
        """Answer a question; one that cannot be answered stays in its field."""
        session = self.session(request)
        yield from self._work(
            session, lambda: session.ask(question, read_settings(*settings)), settings, session.turns, question
        )

    def ask_example(self, request: gr.Request, event: gr.SelectData, *settings: Any) -> Iterator[Update]:
        """Ask one of the questions that are suggested."""
        yield from self.ask(request, str(event.value["text"]), *settings)

    def regenerate(self, request: gr.Request, *settings: Any) -> Iterator[Update]:
        """Ask the last question again, with the settings of now."""
        session = self.session(request)
        before, question = session.turns[:-1], session.turns[-1].question if session.turns else None
        yield from self._work(session, lambda: session.regenerate(read_settings(*settings)), settings, before, question)

    def edit(self, request: gr.Request, event: gr.EditData, *settings: Any) -> Iterator[Update]:
        """Ask an edited question in place of the one that it was."""
        session, question = self.session(request), views.unescape(str(event.value))
        index = views.turn_of(session.turns, event.index if isinstance(event.index, int) else event.index[0])
        yield from self._work(
            session,
            lambda: session.edit(index, question, read_settings(*settings)),
            settings,
            session.turns[:index],
            question,
        )

    def undo(self, request: gr.Request, *settings: Any) -> Update:
        """Take the last question back into its field."""
        session = self.session(request)
        turn = session.undo()
        return {self.page.question: turn.question if turn else "", **self._conversation(session, settings)}

    def clear(self, request: gr.Request, *settings: Any) -> Update:
        """Begin a new conversation about the same video."""
        session = self.session(request)
        session.clear()
        return {self.page.notice: "", **self._conversation(session, settings)}

    def stop(self, request: gr.Request) -> None:
        """End what this session has under way."""
        self.session(request).stop()

    def export_markdown(self, request: gr.Request) -> str:
        """The conversation, for page.js to save."""
        return self.session(request).export_markdown()

    def export_json(self, request: gr.Request) -> str:
        """The conversation with all its figures, for page.js to save."""
        return self.session(request).export_json()

    def notes(self, request: gr.Request) -> Any:
        """What has happened to the video meanwhile."""
        notes = self.session(request).notes()
        return views.notice(notes) if notes else gr.skip()

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
        settings: tuple[Any, ...],
        before: list[Turn] | None = None,
        question: str | None = None,
    ) -> Iterator[Update]:
        """Show a piece of work while it is done: `question` after the turns `before`, or a watch alone."""
        page, board, shown = self.page, Board(), 0.0
        duration = session.file.duration if session.file else 0.0
        before = list(before or ())
        yield {page.watch: _enabled(False), page.ask: _enabled(False), page.stop: _enabled(True), page.notice: ""}
        try:
            with closing(begin()) as events:
                for event in events:
                    board.take(event)
                    if time.monotonic() - shown < GLANCE:
                        continue
                    update: Update = {page.progress: board.progress()}
                    if question is not None:
                        update[page.chat] = views.messages(before, duration, (question, board.text))
                        update |= {} if shown else {page.question: ""}
                    shown = time.monotonic()
                    yield update
        except RRVideoError as error:
            problem = {page.notice: views.notice([*board.notes, str(error)], error=True)}
            asked = {page.question: question} if question is not None else {}
            yield {**asked, page.progress: "", **self._conversation(session, settings), **problem}
        except Exception:  # a fault of ours, which Gradio tells: the page must not look busy for ever
            yield {page.progress: "", **self._conversation(session, settings)}
            raise
        else:
            asked = {page.question: ""} if question is not None else {}
            told = {page.notice: views.notice(board.notes), page.progress: board.progress() if board.watched else ""}
            yield {**asked, **self._conversation(session, settings), **told}

    def _conversation(self, session: Session, settings: tuple[Any, ...]) -> Update:
        """All that follows from what was said, and the buttons as they are at rest."""
        duration = session.file.duration if session.file else 0.0
        return {
            self.page.chat: views.messages(session.turns, duration),
            self.page.moments: self._moments(session),
            self.page.command: session.command(),
            **(self._planned(session, settings) if session.file else {}),
        }

    def _planned(self, session: Session, settings: tuple[Any, ...]) -> Update:
        """The plan for these settings, or why there is none, and the timeline beside it."""
        page, view = self.page, None
        try:
            view = session.plan(read_settings(*settings))
            plan = views.plan(view)
        except RRVideoError as error:
            plan = views.notice([str(error)], error=True)
        can_watch = view is not None and view.fits
        return {
            page.plan: plan,
            page.timeline: self._timeline(session, view),
            page.watch: gr.update(
                interactive=can_watch and not (session.busy or (view and view.watched)),
                value="Watched" if view and view.watched else "Watch",
            ),
            page.ask: _enabled(can_watch and not session.busy),
            page.stop: _enabled(session.busy),
        }

    def _timeline(self, session: Session, plan: PlanView | None) -> str:
        assert session.file
        return timeline(
            session.file.duration,
            times=plan.times if plan else (),
            interval=plan.interval if plan else 0.0,
            clip=(plan.start, plan.end) if plan else None,
            turn=_last_seen(session),
        )

    def _moments(self, session: Session) -> str:
        turn = _last_seen(session)
        return views.moments(session.thumbnails(turn)) if turn else ""


def read_settings(
    start: str, end: str, fps: float, max_frames: float, sampling: str, attention: str, tau: float
) -> Settings:
    """Read settings as they stand on the page; `start` and `end` as 1:30 or 90, or empty.

    Raises `RRVideoError` that says what is wrong.
    """
    clip: tuple[float | None, float | None] = (None, None)
    start, end = (start or "").strip(), (end or "").strip()
    if fps is None or max_frames is None:
        raise RRVideoError("frames per second and frames at most must be numbers")
    try:
        if start or end:
            clip = parse_clip(f"{start}-{end}")
    except ValueError as error:
        raise RRVideoError(str(error)) from error
    return Settings(*clip, fps, int(max_frames), sampling, attention, tau)  # type: ignore[arg-type]


def _last_seen(session: Session) -> Turn | None:
    """The last turn of which it is known where the model looked."""
    return next((turn for turn in reversed(session.turns) if turn.attention), None)


def _enabled(yes: bool) -> Any:
    return gr.update(interactive=yes)
