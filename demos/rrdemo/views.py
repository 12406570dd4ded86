"""What a session holds, as the page shows it: HTML and chat messages in which no outside text can become markup."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from rrdemo.conversation import FileView, Phase, PlanView, Queued, Turn, Watched
from rrvideo.clock import format_time

__all__ = ["escape_markdown", "link_times", "messages", "moments", "notice", "plan", "player", "progress", "unescape"]

Message = dict[str, Any]

# Whatever gives Markdown, or Gradio's reader of it, something else to show than the text itself.
MARKS = re.compile(r"(?m)[\\`*_\[\]<>|&~$@]|^[#+=-]|(?<=\d)[.)](?!\S)|(?<=:)//|(?<=www)\.")
INDENT = re.compile(r"(?m)^[ \t]+")  # which would make code of what follows
MODES = {"rr": "RRAttention", "full": "full attention"}
PHASES = {"decode": "Decode", "encode": "Encode", "prefill": "Prefill"}
TIME = re.compile(
    r"(?<![\w:.])(?:(?:(?P<hours>\d+):)?(?P<minutes>\d{1,2}):(?P<seconds>\d{2}(?:\.\d+)?)(?![\d:])"
    r"|(?P<count>\d+(?:\.\d+)?)(?:\s?s|\sseconds?)\b)"
)


def escape_markdown(text: str) -> str:
    """Write `text` so that Markdown shows it as it is, with no link, picture or HTML of its own."""
    return MARKS.sub(r"\\\g<0>", INDENT.sub("", text))


def unescape(text: str) -> str:
    """Read what `escape_markdown` wrote, or what a person made of it."""
    return re.sub(r"\\([\\`*_\[\]<>|&~$@#+=.)-]|//)", r"\1", text)


def link_times(text: str, duration: float) -> str:
    """Escape `text` for Markdown, with a link that seeks the player on each time that lies within the video.

    Times are `1:30`, `1:02:03`, `90 s` and `90 seconds`.
    """

    def link(match: re.Match[str]) -> str:
        hours, minutes, seconds = (float(match[name] or 0) for name in ("hours", "minutes", "seconds"))
        time = float(match["count"]) if match["count"] else 3600 * hours + 60 * minutes + seconds
        return f"[{match[0]}](#t={time:g})" if time <= duration else match[0]

    return TIME.sub(link, escape_markdown(text))


def messages(turns: Iterable[Turn], duration: float, pending: tuple[str, str] | None = None) -> list[Message]:
    """The conversation as Gradio's chatbot takes it; `pending` is a question and what is written of its answer."""
    shown = []
    for turn in turns:
        shown += [_message("user", escape_markdown(turn.question)), *_answer(turn, duration)]
    if pending:
        question, text = pending
        shown += [
            _message("user", escape_markdown(question)),
            _message("assistant", link_times(text, duration) or "…"),
        ]
    return shown


def turn_of(turns: Sequence[Turn], message: int) -> int:
    """The number of the turn that the message of this number belongs to."""
    owners = [number for number, turn in enumerate(turns) for _ in range(1 + len(_answer(turn, 0.0)))]
    return owners[message] if 0 <= message < len(owners) else len(turns)


def _answer(turn: Turn, duration: float) -> list[Message]:
    text = link_times(turn.answer, duration)
    if turn.stopped:
        return [_message("assistant", f"{text}\n\n*Stopped.*" if text else "*Stopped before an answer.*")]
    looked = " · ".join(
        f"[{escape_markdown(_span(moment.start, moment.end))}](#t={moment.start:g}) {100 * moment.weight:.0f} %"
        for moment in turn.evidence
    )
    answer = _message("assistant", f"{text or '*The model said nothing.*'}\n\nLooked at {looked}" if looked else text)
    if turn.timings is None or turn.usage is None:
        return [answer]
    return [answer, {**_message("assistant", _statistics(turn)), "metadata": _summary(turn)}]


def _summary(turn: Turn) -> dict[str, str]:
    assert turn.timings and turn.usage
    parts = [_seconds(turn.timings.generate), MODES[turn.settings.attention], f"density {turn.density:.2f}"]
    if turn.speed_up:
        parts.append(f"prefill {turn.speed_up:.1f}× as fast as {MODES[_other(turn.settings.attention)]}")
    return {"title": " · ".join(parts), "status": "done"}


def _statistics(turn: Turn) -> str:
    assert turn.timings and turn.usage
    seconds, usage, settings = turn.timings, turn.usage, turn.settings
    mode = MODES[settings.attention] + (f", tau {settings.tau:g}" if settings.attention == "rr" else "")
    other = MODES[_other(settings.attention)]
    compared = (
        f"{turn.speed_up:.2f}× as fast as {other}, same frames"
        if turn.speed_up
        else f"not known: choose {other} and ask again"
    )
    rows = {
        "Decode, encode, prefill": ", ".join(map(_seconds, (seconds.decode, seconds.encode, seconds.prefill)))
        + ", once for all questions",
        "Answer": f"{_seconds(seconds.generate)}, {usage.answer_tokens:,} tokens",
        "Prompt": f"{usage.prompt_tokens:,} tokens, {usage.visual_tokens:,} of them the video's",
        "Frames": f"{usage.frames:,}, at most {turn.interval:.3g} s apart",
        "Attention": f"{mode}; density {turn.density:.3f}",
        "Prefill speed": compared,
    }
    return "\n".join(["| | |", "|:--|:--|", *(f"| {name} | {value} |" for name, value in rows.items())])


def player(file: FileView | None, source: str = "") -> str:
    """The video at the URL `source`, with the controls that the browser gives to keyboard and screen reader."""
    if file is None:
        return ""
    facts = f"{format_time(file.duration)} · {file.width} × {file.height} · {file.codec} · {_bytes(file.bytes)}"
    return (
        f'<video controls playsinline preload="metadata" src="{escape(source)}" '
        f'aria-label="Video: {escape(file.name)}"></video>'
        '<p class="unplayable-note">This browser cannot play the file. The model can watch it all the same.</p>'
        f'<p class="facts"><strong>{escape(file.name)}</strong> <span>{escape(facts)}</span></p>'
    )


def plan(view: PlanView) -> str:
    """What watching would take, in two lines, and what is to be known beforehand."""
    cut = view.wanted_frames - view.frames
    lines = [
        f"<strong>{view.frames:,} frames</strong> of {view.width} × {view.height}, at most {view.interval:.3g} s apart",
        f"{view.tokens:,} tokens · {_bytes(view.memory_bytes)} to watch, {_bytes(view.kv_bytes)} to keep",
    ]
    if view.watched:
        lines.append("Watched: questions are answered at once.")
    warnings = [f"{cut:,} fewer frames than the frame rate asks for: the budget ends there."] if cut > 0 else []
    if not view.fits:
        warnings.append("This does not fit into memory: take fewer frames, or a shorter clip.")
    told = "".join(f"<li>{escape(warning)}</li>" for warning in [*warnings, *view.warnings])
    return f"<p>{'<br>'.join(lines)}</p>" + (f'<ul class="warnings">{told}</ul>' if told else "")


def notice(texts: Sequence[str], *, error: bool = False) -> str:
    """Words for the person: an error is read out at once, a note when there is time."""
    if not texts:
        return ""
    kind, role = ("error", "alert") if error else ("note", "status")
    return f'<div class="notice {kind}" role="{role}">{"".join(f"<p>{escape(text)}</p>" for text in texts)}</div>'


def progress(phases: Sequence[Phase], queued: Queued | None = None, watched: Watched | None = None) -> str:
    """How far the watch is: a bar for each phase, and one sentence that a screen reader tells when it changes."""
    said = _said(phases, queued, watched)
    if watched or not phases:
        return f'<p class="said" role="status">{said}</p>' if said else ""
    return f'<p class="said" role="status">{said}</p><dl>{"".join(_bar(phase) for phase in phases)}</dl>'


def _said(phases: Sequence[Phase], queued: Queued | None, watched: Watched | None) -> str:
    if watched:
        took = ", ".join(f"{name} {_seconds(seconds)}" for name, seconds in watched.seconds.items())
        return f"Watched {watched.plan.frames:,} frames: {took}. Density {watched.density:.2f}."
    if queued and queued.position:
        return f"Waiting for {queued.position} {'other' if queued.position == 1 else 'others'}."
    return "Watching the video." if phases else ""


def _bar(phase: Phase) -> str:
    unit = "tokens" if phase.name == "prefill" else "frames"
    share = 100 * phase.done / phase.total if phase.total else 0
    return (
        f'<dt>{PHASES[phase.name]}</dt><dd><progress max="100" value="{share:.0f}" aria-label="{PHASES[phase.name]}">'
        f"</progress><span>{phase.done:,} of {phase.total:,} {unit}</span><span>{phase.seconds:.1f} s</span></dd>"
    )


def moments(thumbnails: Iterable[tuple[float, bytes]]) -> str:
    """The strongest moments of an answer as pictures that seek the player."""
    buttons = "".join(
        f'<li><button type="button" data-time="{seconds:g}" aria-label="Go to {format_time(seconds)}">'
        f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(picture).decode()}">'
        f"<span>{format_time(seconds)}</span></button></li>"
        for seconds, picture in thumbnails
    )
    return (
        f'<ul class="moments" aria-label="The moments that the model looked at most">{buttons}</ul>' if buttons else ""
    )


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _other(attention: str) -> str:
    return "full" if attention == "rr" else "rr"


def _span(start: float, end: float) -> str:
    first, last = format_time(start), format_time(end)
    return first if first == last else f"{first}–{last}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def _bytes(count: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
