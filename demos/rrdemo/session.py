"""One person's chat: an open file, what was watched of it, and what was said; no Gradio in sight."""

from __future__ import annotations

import os
import secrets
import shutil
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from rrdemo import export, guard, plans
from rrdemo.conversation import (
    Answering,
    Done,
    Event,
    FileView,
    Note,
    Pause,
    Piece,
    PlanView,
    Queued,
    Settings,
    Stopped,
    Turn,
    Watched,
)
from rrdemo.studio import Studio
from rrdemo.thumbnails import strongest
from rrvideo.errors import BudgetError, Cancelled, RRVideoError
from rrvideo.frameindex import FrameIndex, scan
from rrvideo.stages import Cancel

if TYPE_CHECKING:
    from rrvideo.pipeline import Answer, Video

__all__ = ["SUFFIXES", "Session"]

SUFFIXES: tuple[str, ...] = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mpg", ".mpeg", ".flv", ".wmv")
SUFFIXES += (".ogv", ".3gp", ".gif")
PAUSE = 0.1  # seconds

Tell = Callable[[Event], None]
Work = Callable[[Cancel, Tell], None]
Events = SimpleQueue[Event | BaseException | None]  # which ends with why they ended


@dataclass(frozen=True, slots=True)
class _File:
    """The session's own copy of a file, in a folder that goes with it, and where its frames are."""

    folder: TemporaryDirectory[str]
    view: FileView
    index: FrameIndex
    upload: Path | None  # what it was made of, if that goes with it

    def clean_up(self, keep: Path | None = None) -> None:
        """Delete all of it, but for an upload at `keep`."""
        if self.upload and self.upload != keep:
            _delete_if_same(self.upload, Path(self.view.path))
        self.folder.cleanup()


class Session:
    """What one browser tab works with; nothing in it is shared with another.

    All methods may be called from any thread. `watch`, `ask`, `regenerate` and `edit` return generators of what
    happens, and a Pause where nothing does: the work runs in a thread of its own, which `stop`, closing the generator
    or `close` ends within a chunk or a token. Only one of them runs at a time; while one does, others raise
    `RRVideoError`, and after a `stop` they wait the moment until it has ended. What goes wrong is raised as
    `RRVideoError`, in words for the person who asked; then no turn is added.
    """

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.id = secrets.token_urlsafe()
        self.turns: list[Turn] = []
        self.settings: Settings | None = None  # the last that something was watched or asked with
        self._file: _File | None = None
        self._prefills: dict[Settings, tuple[float, float]] = {}  # seconds and density, by what was watched
        self._notes: deque[str] = deque()  # what other threads have to say
        self._working = threading.Lock()  # held by whoever works, or changes what is worked on
        self._cancel = Cancel()
        self._closed = False

    @property
    def file(self) -> FileView | None:
        """The file that is open."""
        return self._file.view if self._file else None

    def open_file(
        self, path: str | Path, *, name: str | None = None, source: str = "", upload: bool = False
    ) -> FileView:
        """Check the file at `path`, make it the session's own, and forget the one before with all that was said.

        `name` is what its owner calls it (default: that of `path`), `source` what `rrvideo ask` does, if not so. An
        `upload` is deleted when it is refused, or together with the session's own file. Raises `RRVideoError` that says
        why it is refused; then all stays as it was.
        """
        path = Path(path)
        name = name or path.name
        suffix = path.suffix.lower()
        folder = TemporaryDirectory(prefix="rrdemo-", ignore_cleanup_errors=True)  # that only this user may enter
        own = Path(folder.name) / f"video{suffix if suffix in SUFFIXES else ''}"
        try:
            _link_or_copy(path, own)
            with self.studio.checking:
                info = guard.check(own, self.studio.limits, name=name)
            index = scan(own)
        except BaseException:
            if upload:
                _delete_if_same(path, own)
            folder.cleanup()
            raise
        view = FileView(
            name=name,
            path=str(own),
            bytes=own.stat().st_size,
            duration=info.duration,
            width=info.width,
            height=info.height,
            fps=info.fps,
            frames=info.frame_count,
            codec=info.codec,
            container=info.container,
            warnings=info.warnings,
            source=source,
        )
        with self._at_rest():
            self._forget_file(keep=path)
            self._file = _File(folder, view, index, path if upload else None)
        return view

    def plan(self, settings: Settings) -> PlanView:
        """Say what watching with `settings` would take; nothing is decoded."""
        chosen, need = self.studio.plan(self._index(), settings)
        return plans.view(chosen, need, settings, memory=self.studio.memory, watched=self.is_open(settings))

    def is_open(self, settings: Settings) -> bool:
        """Whether the file was watched with `settings`, and is still open so that questions are answered at once."""
        return self.studio.is_open(self.id, settings)

    def watch(self, settings: Settings) -> Generator[Event]:
        """Watch the video, if that has not been done with these settings: Queued, Phase, Note; Watched or Stopped."""

        def work(cancel: Cancel, tell: Tell) -> None:
            try:
                with self._video(settings, cancel, tell) as video:
                    tell(Watched(self.plan(settings), video.seconds, video.density))
            except Cancelled:
                tell(Stopped(None))

        return self._events(work)

    def ask(self, question: str, settings: Settings) -> Generator[Event]:
        """Answer a question, after a `watch` where there was none: its events, Answering, Piece; Done or Stopped."""
        return self._events(lambda cancel, tell: self._ask(self.turns, question, settings, cancel, tell))

    def regenerate(self, settings: Settings | None = None) -> Generator[Event]:
        """Ask the last question again, with its own settings or others; its turn is replaced."""
        return self.edit(len(self.turns) - 1, None, settings)

    def edit(self, index: int, text: str | None, settings: Settings | None = None) -> Generator[Event]:
        """Ask `text` in place of the question of turn `index`; that turn and those after it are forgotten.

        Without a text the question stays as it is. Nothing is forgotten before the new answer is there, or stopped.
        """

        def work(cancel: Cancel, tell: Tell) -> None:
            if not 0 <= index < len(self.turns):
                raise RRVideoError("there is no such question in this chat")
            turn = self.turns[index]
            question = turn.question if text is None else text
            self._ask(self.turns[:index], question, settings or turn.settings, cancel, tell)

        return self._events(work)

    def undo(self) -> Turn | None:
        """Take the last turn back, after a `stop` if it is still being written, and return it."""
        with self._at_rest():
            last, self.turns = (self.turns[-1] if self.turns else None), self.turns[:-1]
            return last

    def stop(self) -> None:
        """End the work that runs, if any: within a chunk of the watch or a token of the answer."""
        self._cancel.cancel()

    @property
    def busy(self) -> bool:
        """Whether the session's worker is at work, or waits in the queue."""
        return self._working.locked()

    def notes(self) -> list[str]:
        """What has happened meanwhile that the person should know, each told once: here, or as Note of the next ask."""
        return [self._notes.popleft() for _ in range(len(self._notes))]

    def thumbnails(self, turn: Turn, count: int = 4, height: int = 90) -> list[tuple[float, bytes]]:
        """The moments of `turn` that the model looked at most, in order of time: seconds, and a JPEG picture."""
        return strongest(self._index(), turn.attention, count=count, height=height)

    def export_markdown(self) -> str:
        """The conversation as Markdown, with times and settings."""
        return export.markdown(self.file, self.studio.model, self.turns)

    def export_json(self) -> str:
        """The conversation as JSON, with times and settings."""
        return export.as_json(self.file, self.studio.model, self.turns)

    def command(self) -> str:
        """The `rrvideo ask` command that asks the same of the same file, for a shell; empty before a question."""
        return export.command(self.file, self.studio.model, self.turns)

    def clear(self) -> None:
        """Begin a new conversation about the same video."""
        with self._at_rest():
            self.turns = []

    def close(self) -> None:
        """Stop, free all memory and delete the session's files, as soon as the work has ended; twice does no harm."""
        self._closed = True
        self.stop()
        self._clean_up_if_closed()

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """Nothing works inside the `with`: what runs is stopped."""
        self.stop()
        with self._working:
            yield
        self._clean_up_if_closed()

    def _clean_up_if_closed(self) -> None:
        """Called by `close` and after all work, so that the later of the two finds nobody at work."""
        if self._closed and self._working.acquire(blocking=False):
            try:
                self._forget_file()
            finally:
                self._working.release()

    def _index(self) -> FrameIndex:
        if self._file is None:
            raise RRVideoError("no video is open", "choose a file or an example first")
        return self._file.index

    def _forget_file(self, keep: Path | None = None) -> None:
        self.studio.release(self.id)
        if self._file is not None:
            self._file.clean_up(keep)
        self._file, self.turns, self._prefills, self.settings = None, [], {}, None
        self._notes.clear()

    def _events(self, work: Work) -> Generator[Event]:
        """Run `work` in a thread of its own, and yield what it tells; a reader that leaves stops it."""
        if not self._working.acquire(blocking=self._cancel.cancelled):
            raise RRVideoError("the last question is still being answered", "wait until it is done, or stop it")
        cancel = self._cancel = Cancel()
        events: Events = SimpleQueue()

        def run() -> None:
            failure: BaseException | None = None
            try:
                for note in self.notes():
                    events.put(Note(note))
                work(cancel, events.put)
            except BaseException as error:  # every failure is the reader's to know
                failure = error
            finally:
                self._working.release()
                self._clean_up_if_closed()
                events.put(failure)  # last of all: who has read to the end may ask again

        threading.Thread(target=run, daemon=True).start()
        try:
            yield from _told(events)
        finally:
            cancel.cancel()

    def _ask(self, before: list[Turn], question: str, settings: Settings, cancel: Cancel, tell: Tell) -> None:
        """Answer `question` after the turns `before`, which it follows in the chat from then on."""
        if not question.strip():
            raise RRVideoError("a question must not be empty")
        if len(question) > (most := self.studio.limits.characters):
            raise RRVideoError(f"a question may have up to {most:,} characters, and this has {len(question):,}")
        self._index()
        pieces: list[str] = []

        def say(event: Event) -> None:
            if isinstance(event, Piece):
                pieces.append(event.text)
            tell(event)

        try:
            with (
                self._video(settings, cancel, tell) as video,
                self.studio.answering.turn(cancel, lambda ahead: tell(Queued(ahead))),
            ):
                say(Answering())
                answer = self._answer(video, before, question, cancel, say)
                plan = video.plan
        except Cancelled:
            stopped = Turn(question, "".join(pieces), settings, stopped=True)
            self.turns = [*before, stopped]
            tell(Stopped(stopped))
            return
        turn = Turn(
            question=question,
            answer=answer.text,
            settings=settings,
            evidence=tuple(answer.evidence),
            attention=answer.attention,
            timings=answer.timings,
            density=answer.density,
            usage=answer.usage,
            clip=(plan.start, plan.end),
            times=plan.times,
            interval=plans.longest_gap(plan),
        )
        self.turns = [self._compared(each) for each in (*before, turn)]
        tell(Done(self.turns[-1]))

    @contextmanager
    def _video(self, settings: Settings, cancel: Cancel, tell: Tell) -> Iterator[Video]:
        index = self._index()
        self.settings = settings
        with self.studio.video(self.id, index, settings, cancel=cancel, tell=tell, remark=self._notes.append) as video:
            self._prefills.pop(settings.watched, None)  # so that it is the last again
            self._prefills[settings.watched] = video.seconds["prefill"], video.density
            yield video

    def _answer(self, video: Video, before: list[Turn], question: str, cancel: Cancel, tell: Tell) -> Answer:
        """Answer piece by piece; where the context has no room for all that was said before, the oldest goes first."""
        said = [turn for turn in before if not turn.stopped]
        forgotten = 0
        while True:
            chat = video.chat()
            chat.turns = [text for turn in said[forgotten:] for text in (turn.question, turn.answer)]
            stream = chat.stream(question, max_new_tokens=self.studio.limits.answer_tokens, cancel=cancel)
            try:
                for piece in stream:
                    tell(Piece(piece))
                return stream.finish()
            except BudgetError:  # raised before the first piece
                if forgotten == len(said):
                    raise
                forgotten += 1
                tell(Note(f"the chat is longer than the model's context: it remembers all but the first {forgotten}"))

    def _compared(self, turn: Turn) -> Turn:
        """Compare `turn` with the other attention, if that has seen the same frames: once, whatever comes later."""
        if turn.compared or not turn.timings:
            return turn
        mine = turn.settings
        for other, (seconds, density) in reversed(self._prefills.items()):
            # Where nothing was left out both did the same work, and a ratio would be chance.
            if other.sampled == mine.sampled and other.attention != mine.attention and density != turn.density:
                return replace(turn, speed_up=seconds / turn.timings.prefill, compared=other)
        return turn


def _told(events: Events) -> Iterator[Event]:
    """What is told, as it comes, and a Pause where no more does; raises what went wrong."""
    patience: float | None = None
    while True:
        try:
            event = events.get(timeout=patience)
        except Empty:
            event, patience = Pause(), None
        else:
            patience = PAUSE
        if isinstance(event, BaseException):
            raise event
        if event is None:
            return
        yield event


def _delete_if_same(path: Path, own: Path) -> None:
    """Delete `path`, unless it is no longer the same file as `own`: who uploads the same thing gets the same path."""
    with suppress(OSError):
        if path.samefile(own):
            path.unlink()


def _link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a file of its own with what is in `source`, at no cost where the file system allows."""
    if not source.is_file():
        raise RRVideoError("the upload did not arrive", "choose the file again")
    try:
        os.link(source, target)
    except OSError:  # on another disk, or of another user
        shutil.copyfile(source, target)
