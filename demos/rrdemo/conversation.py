"""What is said and shown in a chat: settings, turns, what a session tells while it works, and views for the screen."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from rrvideo.errors import RRVideoError

if TYPE_CHECKING:
    from rrvideo.evidence import Evidence
    from rrvideo.pipeline import Timings, Usage

__all__ = [
    "Answering",
    "Done",
    "Event",
    "FileView",
    "Note",
    "Pause",
    "Phase",
    "PhaseName",
    "Piece",
    "PlanView",
    "Queued",
    "Settings",
    "Stopped",
    "Turn",
    "Watched",
]


PhaseName = Literal["decode", "encode", "prefill"]


@dataclass(frozen=True, slots=True)
class Settings:
    """How a video is looked at; seconds since its first frame, and None for its own start and end.

    Raises `RRVideoError` that says what is wrong, in words for the person who set it.
    """

    start: float | None = None
    end: float | None = None
    fps: float = 1.0
    max_frames: int = 768
    sampling: Literal["uniform", "keyframes"] = "uniform"
    attention: Literal["rr", "full"] = "rr"
    tau: float = 0.95  # of RRAttention; full attention has none

    def __post_init__(self) -> None:
        if not (_is_number(self.fps) and 0 < self.fps <= 1000):
            raise RRVideoError("frames per second must be a number above 0, and 1,000 at most", "1 is a good start")
        if not (_is_number(self.max_frames) and self.max_frames >= 1 and self.max_frames == int(self.max_frames)):
            raise RRVideoError("frames at most must be a whole number above 0", "768 is what most models take")
        object.__setattr__(self, "max_frames", int(self.max_frames))  # which JSON may have made 768.0
        if self.sampling not in ("uniform", "keyframes"):
            raise RRVideoError(f"sampling is uniform or keyframes, not {self.sampling}")
        if self.attention not in ("rr", "full"):
            raise RRVideoError(f"attention is rr or full, not {self.attention}")
        if not (_is_number(self.tau) and 0 < self.tau <= 1):
            raise RRVideoError("tau is a share above 0, and 1 at most", "0.95 is the paper's")
        if self.start is not None and not self.start >= 0:
            raise RRVideoError("the clip cannot start before the video does")
        if self.end is not None and not self.end > (self.start or 0):
            raise RRVideoError("the clip ends before it starts", "choose a later end, or none")

    @property
    def mode(self) -> str:
        """The kind of attention in words, with its tau."""
        return f"RRAttention, tau {self.tau:g}" if self.attention == "rr" else "full attention"

    @property
    def sampled(self) -> Settings:
        """These settings as far as they choose frames: the same for both kinds of attention."""
        return replace(self, attention="rr", tau=0.95)

    @property
    def watched(self) -> Settings:
        """These settings as far as what the model has seen depends on them."""
        return replace(self, tau=0.95) if self.attention == "full" else self

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON takes them."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class FileView:
    """A file that was checked and is open in a session."""

    name: str  # as its owner calls it: for the screen only, never part of a path
    path: str  # the session's own copy, in a private folder
    bytes: int
    duration: float  # seconds
    width: int  # pixels, as displayed
    height: int
    fps: float
    frames: int
    codec: str
    container: str
    warnings: tuple[str, ...] = ()
    source: str = ""  # what `rrvideo ask` calls it on this machine, if not by its name

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON takes them, without where it lies, which is nobody's business."""
        return {name: value for name, value in asdict(self).items() if name not in ("source", "path")}


@dataclass(frozen=True, slots=True)
class PlanView:
    """What watching with some settings would take, known before anything is decoded."""

    frames: int
    wanted_frames: int  # what the frame rate alone would take
    interval: float  # seconds between two frames: what lies between them, nobody has seen
    width: int  # pixels of each frame as the model gets it
    height: int
    tokens: int  # of the prompt, the video's included
    visual_tokens: int
    kv_bytes: int  # kept for as long as the video is open
    memory_bytes: int  # needed while it is watched: the KV cache and what is computed with
    fits: bool  # into the memory that the studio gives to videos
    watched: bool  # it has been, with these very settings: the next question costs only itself
    start: float  # seconds: the clip's
    end: float
    times: tuple[float, ...]  # seconds: of the frames
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON takes them."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer; a `stopped` one has what was written until then, and the model does not remember it.

    `attention` is where the model looked while it answered: pairs of seconds and shares, which sum to one, for each
    temporal step of the video (two frames, at the time of the first). `clip` is the part of the video that was watched,
    `times` are those of its frames (as planned), and `interval` is the longest time between two, all in seconds.
    `speed_up` is how many times as long the other kind of attention took to prefill the same frames, with the settings
    `compared`: None where it has not, or where the video is too short for the two to differ.
    """

    question: str
    answer: str
    settings: Settings
    evidence: tuple[Evidence, ...] = ()
    attention: tuple[tuple[float, float], ...] = ()
    timings: Timings | None = None
    density: float | None = None
    usage: Usage | None = None
    clip: tuple[float, float] = (0.0, 0.0)
    times: tuple[float, ...] = ()
    interval: float = 0.0
    speed_up: float | None = None
    compared: Settings | None = None
    stopped: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON takes them."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Queued:
    """Others are served first: `position` of them."""

    position: int


@dataclass(frozen=True, slots=True)
class Phase:
    """How far a phase of the watch is: `done` of `total` frames (decode, encode) or tokens (prefill).

    The phases run side by side; `seconds` are those that each was at work. When the watch is over, each comes once
    more, `finished`.
    """

    name: PhaseName
    done: int
    total: int
    seconds: float
    finished: bool = False


@dataclass(frozen=True, slots=True)
class Watched:
    """The video is ready for questions; `seconds` are those of decode, encode and prefill."""

    plan: PlanView
    seconds: dict[str, float] = field(default_factory=dict)
    density: float = 1.0


@dataclass(frozen=True, slots=True)
class Answering:
    """The question's turn has come: all that it waits for now is the model's own words."""


@dataclass(frozen=True, slots=True)
class Piece:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class Note:
    """Something that the person should know, in plain words."""

    text: str


@dataclass(frozen=True, slots=True)
class Done:
    """The answer is complete, and the last of the session's turns."""

    turn: Turn


@dataclass(frozen=True, slots=True)
class Stopped:
    """The work has ended because someone asked; `turn` is what there is of the answer, None if none was asked for."""

    turn: Turn | None


@dataclass(frozen=True, slots=True)
class Pause:
    """Nothing more has happened for a moment: a good time to show what has."""


Event = Queued | Phase | Watched | Answering | Piece | Note | Done | Stopped | Pause


def _is_number(value: object) -> bool:
    """Whether a program, which may send anything, has sent a number."""
    return isinstance(value, (int, float)) and math.isfinite(value)
