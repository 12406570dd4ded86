"""What a session holds, as the page shows it: HTML in which no outside text can become markup."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

from rrdemo.conversation import FileView, Phase, PlanView, Watched
from rrdemo.words import counted, elapsed, sentence, spacing
from rrvideo.clock import format_time

__all__ = ["moments", "notice", "plan", "player", "progress", "queued", "size", "watched"]

PHASES = {"decode": "Decode", "encode": "Encode", "prefill": "Prefill"}


def player(file: FileView | None, source: str = "") -> str:
    """The video at the URL `source`, with the controls that the browser gives to keyboard and screen reader."""
    if file is None:
        return ""
    facts = f"{format_time(file.duration)} · {file.width} × {file.height} · {file.codec} · {size(file.bytes)}"
    return (
        f'<video controls playsinline preload="metadata" src="{escape(source)}" '
        f'aria-label="Video: {escape(file.name)}"></video>'
        '<p class="unplayable-note">This browser cannot play the file. The model can watch it all the same.</p>'
        f'<p class="facts"><strong>{escape(file.name)}</strong> <span>{escape(facts)}</span></p>'
    )


def plan(view: PlanView) -> str:
    """What watching would take, in two lines, and what is to be known beforehand."""
    apart = f", at most {spacing(view.interval)} apart" if view.frames > 1 else ""
    lines = [
        f"<strong>{counted(view.frames, 'frame')}</strong> of {view.width} × {view.height}{apart}",
        f"{counted(view.tokens, 'token')} · {size(view.memory_bytes)} to watch, {size(view.kv_bytes)} to keep",
    ]
    if view.watched:
        lines.append("Watched: questions are answered at once.")
    warnings = [] if view.fits else ["This does not fit into memory: take fewer frames, or a shorter clip."]
    told = "".join(f"<li>{escape(sentence(warning))}</li>" for warning in [*warnings, *view.warnings])
    return f"<p>{'<br>'.join(lines)}</p>" + (f'<ul class="warnings">{told}</ul>' if told else "")


def notice(texts: Sequence[str], *, error: bool = False) -> str:
    """Words for the person: an error is read out at once, a note when there is time."""
    if not texts:
        return ""
    kind, role = ("error", "alert") if error else ("note", "status")
    told = "".join(f"<p>{escape(sentence(text))}</p>" for text in texts)
    return f'<div class="notice {kind}" role="{role}">{told}</div>'


def progress(said: str, phases: Sequence[Phase] = ()) -> str:
    """What is going on in one sentence, which a screen reader tells when it changes, and a bar for each phase."""
    bars = f"<dl>{''.join(map(_bar, phases))}</dl>" if phases else ""
    return f'<p class="said" role="status">{escape(said)}</p>{bars}' if said else ""


def queued(position: int) -> str:
    """The wait for others, in words."""
    return f"Waiting for {counted(position, 'other')}."


def watched(event: Watched) -> str:
    """What the watch took, in words."""
    took = ", ".join(f"{name} {elapsed(seconds)}" for name, seconds in event.seconds.items())
    return f"Watched {counted(event.plan.frames, 'frame')}: {took}. Density {event.density:.2f}."


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


def size(count: float) -> str:
    """A number of bytes as people write it."""
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _bar(phase: Phase) -> str:
    unit = "tokens" if phase.name == "prefill" else "frames"
    share = 100 * phase.done / phase.total if phase.total else 0
    return (
        f'<dt>{PHASES[phase.name]}</dt><dd><progress max="100" value="{share:.0f}" aria-label="{PHASES[phase.name]}">'
        f"</progress><span>{phase.done:,} of {phase.total:,} {unit}</span><span>{phase.seconds:.1f} s</span></dd>"
    )
