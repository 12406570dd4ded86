"""The conversation as Gradio's chatbot takes it: questions as plain text, answers as HTML that is all ours."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from typing import Any

from rrdemo.conversation import Turn
from rrdemo.words import elapsed, spread
from rrvideo.clock import format_time

__all__ = ["inert", "link_times", "messages", "original"]

Message = dict[str, Any]

JOINER = "\N{WORD JOINER}"  # which nobody sees
NO_BREAK = "\N{NO-BREAK SPACE}"
TIME = re.compile(
    r"(?<![\w:.])(?:(?:(?P<hours>\d+):)?(?P<minutes>\d{1,2}):(?P<seconds>\d{2}(?:\.\d+)?)(?![\d:])"
    r"|(?P<count>\d+(?:\.\d+)?)(?:\s?s|\sseconds?)\b)"
)


def messages(turns: Iterable[Turn], duration: float, pending: tuple[str, str] | None = None) -> list[Message]:
    """Two messages for each turn; `pending` is a question and what is written of its answer."""
    shown = []
    for turn in turns:
        shown += [_said("user", _text(turn.question)), _said("assistant", _component(_answer(turn, duration)))]
    if pending:
        question, text = pending
        shown += [_said("user", _text(question)), _said("assistant", _text(text or "…"))]
    return shown


def inert(text: str) -> str:
    """Write `text` so that it means nothing as HTML, and yet is what can be copied and edited.

    Gradio takes a message for HTML even where it renders no Markdown. An `<` begins no tag and an `&` no entity with
    this behind them.
    """
    return re.sub("[<&]", rf"\g<0>{JOINER}", text)


def original(text: str) -> str:
    """Read what `inert` wrote, or what a person made of it."""
    return text.replace(JOINER, "")


def link_times(text: str, duration: float) -> str:
    """Write `text` as HTML, with a link that seeks the player on each time that lies within the video.

    Times are `1:30`, `1:02:03`, `90 s` and `90 seconds`.
    """

    def link(match: re.Match[str]) -> str:
        hours, minutes, seconds = (float(match[name] or 0) for name in ("hours", "minutes", "seconds"))
        time = float(match["count"]) if match["count"] else 3600 * hours + 60 * minutes + seconds
        return _link(time, match[0]) if time <= duration else match[0]

    return TIME.sub(link, escape(text, quote=False))


def _answer(turn: Turn, duration: float) -> str:
    """What was said, where the model looked, and what it took."""
    said = f"<p>{link_times(turn.answer, duration)}</p>" if turn.answer.strip() else ""
    if turn.stopped:
        remark = "Stopped." if said else "Stopped before an answer."
    else:
        remark = "" if said else "The model said nothing."
    return (
        f'<div class="answer">{said}'
        + (f'<p class="remark">{remark}</p>' if remark else "")
        + _looked(turn)
        + _figures(turn)
        + f'<button type="button" class="copy" data-copy="{escape(_plain(turn))}">Copy</button></div>'
    )


def _looked(turn: Turn) -> str:
    if not turn.evidence:
        return ""
    moments = ", ".join(
        f"{_link(moment.start, _span(moment.start, moment.end))}{NO_BREAK}{100 * moment.weight:.0f}{NO_BREAK}%"
        for moment in turn.evidence
    )
    return f'<p class="looked">Looked at {moments}</p>'


def _figures(turn: Turn) -> str:
    """What the watch took, which is shared by all questions about it, what the answer took, and the comparison."""
    if turn.timings is None or turn.usage is None:
        return ""
    seconds, usage = turn.timings, turn.usage
    figures = {
        "Decode": elapsed(seconds.decode),
        "Encode": elapsed(seconds.encode),
        "Prefill": elapsed(seconds.prefill),
        "Answer": elapsed(seconds.generate),
        "Tokens in": f"{usage.prompt_tokens:,}",
        "Tokens out": f"{usage.answer_tokens:,}",
        "Density": f"{turn.density:.2f}",
    }
    cells = "".join(
        f"<div><dt>{name}</dt><dd>{escape(value).replace(' ', NO_BREAK)}</dd></div>" for name, value in figures.items()
    )
    watched = f"Watched once with {turn.settings.mode}: {spread(usage.frames, turn.interval)}."
    compared = ""
    if turn.speed_up and turn.compared:
        compared = f'<p class="compared">Prefill {turn.speed_up:.1f}× as fast as with {turn.compared.mode}</p>'
    return f'<div class="figures"><p>{escape(watched)}</p><dl>{cells}</dl>{compared}</div>'


def _plain(turn: Turn) -> str:
    """The answer as it is copied."""
    looked = ", ".join(_span(moment.start, moment.end) for moment in turn.evidence)
    return turn.answer + (f"\n\nLooked at {looked}" if looked else "")


def _link(seconds: float, text: str) -> str:
    return f'<a href="#t={seconds:g}">{text}</a>'


def _span(start: float, end: float) -> str:
    first, last = format_time(start), format_time(end)
    return first if first == last else f"{first}–{last}"


def _text(text: str) -> Message:
    """Text inside the chat, as it is: a bare string would lose its indentation."""
    return {"type": "text", "text": inert(text)}


def _component(markup: str) -> Message:
    """HTML inside the chat, as Gradio describes a component there."""
    return {"type": "component", "component": "html", "value": markup, "constructor_args": {}, "props": {}}


def _said(role: str, content: Message) -> Message:
    return {"role": role, "content": content}
