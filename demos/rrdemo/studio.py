"""What all sessions share: one model, two lines to wait in, and the memory for open videos."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from rrdemo.conversation import Event, Note, Phase, PhaseName, Queued, Settings
from rrdemo.guard import Limits
from rrdemo.words import counted
from rrvideo.errors import BudgetError, RRVideoError

if TYPE_CHECKING:
    import torch

    from rrvideo.budget import Budget
    from rrvideo.frameindex import FrameIndex
    from rrvideo.pipeline import Video, VideoQA
    from rrvideo.stages import Cancel
    from rrvideo.video import SamplePlan

__all__ = ["Line", "Studio"]

CHECKS_AT_ONCE = 2
GLANCE = 0.05  # seconds between two looks at the flag of somebody who waits
PHASES: dict[str, PhaseName] = {"decoded": "decode", "frames": "encode", "tokens": "prefill"}  # by what they count

Key = tuple[str, Settings]  # the session, and what it watched with


class Line:
    """A line to wait in: one at a time has its turn, in the order in which they came."""

    def __init__(self, waiting: int) -> None:
        self._most = waiting
        self._changed = threading.Condition()
        self._tickets: list[object] = []  # the first one's holder has its turn

    def __len__(self) -> int:
        """How many wait or have their turn."""
        return len(self._tickets)

    @contextmanager
    def turn(self, cancel: Cancel, moved: Callable[[int], None]) -> Iterator[None]:
        """Wait for a turn, which lasts as long as the `with`; `moved` is told how many are still to come before it.

        Raises `RRVideoError` if too many wait already, and `Cancelled` where `cancel` says so.
        """
        ticket, told = object(), 0
        with self._changed:
            if len(self._tickets) > self._most:
                waiting = counted(self._most, "person is waiting", "people are waiting")
                raise RRVideoError(f"{waiting}, and no more can", "try again in a while")
            self._tickets.append(ticket)
        try:
            while ahead := self._ahead(ticket):
                cancel.check()
                if ahead != told:
                    moved(ahead)
                told = ahead
            yield
        finally:
            with self._changed:
                self._tickets.remove(ticket)
                self._changed.notify_all()

    def _ahead(self, ticket: object) -> int:
        """How many come before `ticket`, looked at again when the line moves, or after a moment."""
        with self._changed:
            if self._tickets[0] is not ticket:
                self._changed.wait(GLANCE)
            return self._tickets.index(ticket)


@dataclass(slots=True, eq=False)
class _Open:
    """A watched video, the bytes of its KV cache, and whom to tell when it is closed for others."""

    video: Video
    bytes: int
    remark: Callable[[str], None]
    used: float  # when that was last, by the clock
    in_use: bool = True


class Studio:
    """One model for everybody, with either kind of attention over the same weights.

    `memory` is what open videos may take together, in bytes (default: half of what the GPU has left, or a quarter of
    the machine's); the least recently used is closed for a new one. One that nobody has asked about for `keep` seconds
    is closed too.
    """

    def __init__(
        self,
        qa: VideoQA,
        *,
        limits: Limits | None = None,
        memory: int | None = None,
        keep: float = 1800.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.qa = qa
        self.limits = limits or Limits()
        self.memory = _spare_memory(qa.checkpoint.device) if memory is None else memory
        self.keep = keep
        self.watching = Line(self.limits.waiting)
        self.answering = Line(self.limits.waiting)
        self.checking = threading.Semaphore(CHECKS_AT_ONCE)  # of files, each in a process of its own
        self._clock = clock
        self._changed = threading.Condition()  # of what is open, or in use
        self._open: OrderedDict[Key, _Open] = OrderedDict()  # the least recently used one first
        self._reserved = 0  # bytes for the watch that runs
        self._over = threading.Event()
        threading.Thread(target=self._sweep_now_and_then, daemon=True).start()

    @classmethod
    def load(cls, model: str = "tiny", *, device: str = "auto", dtype: str = "auto", **options: Any) -> Self:
        """Load a model as `VideoQA.load` does; `options` are those of the constructor."""
        from rrvideo.pipeline import VideoQA

        return cls(VideoQA.load(model, device=device, dtype=dtype), **options)

    @property
    def model(self) -> str:
        """The model's name, as the command line takes it."""
        from rrvideo.pipeline import EMBEDDED

        name = self.qa.checkpoint.name
        return next((short for short, folder in EMBEDDED.items() if str(folder) == name), name)

    @property
    def idle(self) -> bool:
        """Whether nobody watches, is answered or waits."""
        return not len(self.watching) and not len(self.answering)

    @property
    def taken(self) -> int:
        """Bytes of `memory` that are in use or promised."""
        with self._changed:
            return self._reserved + sum(each.bytes for each in self._open.values())

    def plan(self, index: FrameIndex, settings: Settings) -> tuple[SamplePlan, Budget]:
        """The frames that a watch would take, and what it would need; nothing is decoded.

        Where the model has no room for so many as `settings` ask for, they are fewer, and the plan warns of it. Raises
        `VideoError` if the clip lies outside the video, and `BudgetError` if not even one frame fits.
        """
        from rrvideo import budget

        if settings.max_frames > self.limits.max_frames:
            raise BudgetError(
                f"{counted(settings.max_frames, 'frame')} are more than one watch may look at here",
                f"ask for {self.limits.max_frames:,} at most",
            )
        checkpoint, sampling = self.qa.checkpoint, {**_sampling(settings), "timestamps": None}
        try:
            chosen = budget.plan(checkpoint, index, **sampling)
        except BudgetError as error:
            chosen = budget.plan(checkpoint, index, fit=True, **sampling)
            fewer = f"{error.message}: {counted(len(chosen.indices), 'frame is', 'frames are')} taken"
            chosen = replace(chosen, warnings=(*chosen.warnings, fewer))
        return chosen, budget.estimate(checkpoint, chosen)

    def is_open(self, session: str, settings: Settings) -> bool:
        """Whether the session has watched with these settings, and the video is still open."""
        with self._changed:
            return (session, settings.watched) in self._open

    @contextmanager
    def video(
        self,
        session: str,
        index: FrameIndex,
        settings: Settings,
        *,
        cancel: Cancel,
        tell: Callable[[Event], None],
        remark: Callable[[str], None],
    ) -> Iterator[Video]:
        """The session's video, watched first if need be; nobody closes it as long as the `with` lasts.

        `tell` gets Queued and Phase. `remark` is told if the video is closed later, to make room or for its age.
        Raises what `VideoQA.watch` raises.
        """
        key = session, settings.watched
        with self._changed:
            opened = self._open.get(key)
            if opened:
                opened.in_use = True
                self._open.move_to_end(key)
        opened = opened or self._watch(key, index, cancel, tell, remark)
        try:
            yield opened.video
        finally:
            with self._changed:
                opened.in_use, opened.used = False, self._clock()
                self._changed.notify_all()

    def release(self, session: str) -> None:
        """Close what the session has open: none of it may be in use."""
        with self._changed:
            for key in [key for key in self._open if key[0] == session]:
                self._close(key)

    def sweep(self) -> None:
        """Close the videos that nobody has used for as long as they are kept."""
        with self._changed:
            oldest = self._clock() - self.keep
            for key in [key for key, each in self._open.items() if not each.in_use and each.used < oldest]:
                self._close(key, "the video was put away, as it was long unused: the next question watches it again")

    def close(self) -> None:
        """Close all videos; twice does no harm."""
        self._over.set()
        with self._changed:
            for key in [*self._open]:
                self._close(key)

    def _watch(
        self,
        key: Key,
        index: FrameIndex,
        cancel: Cancel,
        tell: Callable[[Event], None],
        remark: Callable[[str], None],
    ) -> _Open:
        settings = key[1]
        with self.watching.turn(cancel, lambda ahead: tell(Queued(ahead))):
            plan, need = self.plan(index, settings)
            self._make_room(need.kv_bytes + need.activation_bytes, cancel)
            phases: dict[str, Phase] = {}  # as they were told last

            def progress(unit: str, done: int, total: int, seconds: float) -> None:
                phases[unit] = Phase(PHASES[unit], done, total, seconds)
                tell(phases[unit])

            try:
                for unit, total in (("decoded", need.frames), ("frames", need.frames), ("tokens", need.prompt_tokens)):
                    progress(unit, 0, total, 0.0)
                model = self._attending(settings)
                video = model.watch(index, fit=True, progress=progress, cancel=cancel, **_sampling(settings))
                opened = _Open(video, need.kv_bytes, remark, self._clock())
                with self._changed:
                    self._open[key] = opened
            finally:
                with self._changed:
                    self._reserved = 0
                    self._changed.notify_all()
        for phase in phases.values():
            tell(replace(phase, seconds=video.seconds[phase.name], finished=True))
        for warning in dict.fromkeys((*plan.warnings, *video.warnings)):
            tell(Note(warning))
        return opened

    def _attending(self, settings: Settings) -> VideoQA:
        from rrattention.transformers import settings as attention_settings

        config, _ = attention_settings(self.qa.checkpoint.model)
        return self.qa.attending(settings.attention, replace(config, tau=settings.tau))

    def _make_room(self, needed: int, cancel: Cancel) -> None:
        """Reserve `needed` bytes: videos that nobody uses are closed for it, and the end of answers is awaited."""
        if needed > self.memory:
            raise BudgetError(
                f"watching this takes {needed / 1e6:,.0f} MB, and {self.memory / 1e6:,.0f} MB is all that videos get",
                "take a shorter clip, or fewer frames",
            )
        with self._changed:
            while self.taken + needed > self.memory:
                unused = next((key for key, each in self._open.items() if not each.in_use), None)
                if unused:
                    self._close(unused, "the video was put away to make room: the next question watches it again")
                else:
                    cancel.check()
                    self._changed.wait(GLANCE)
            self._reserved = needed

    def _close(self, key: Key, remark: str = "") -> None:
        opened = self._open.pop(key)
        opened.video.close()
        if remark:
            opened.remark(remark)
        self._changed.notify_all()

    def _sweep_now_and_then(self) -> None:
        while not self._over.wait(min(60.0, self.keep / 4)):
            self.sweep()


def _sampling(settings: Settings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in ("start", "end", "fps", "max_frames", "sampling")}


def _spare_memory(device: torch.device) -> int:
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
