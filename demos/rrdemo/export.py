"""A conversation as Markdown, as JSON, and as the command that asks the same in a shell."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from importlib.metadata import version

from rrdemo.conversation import FileView, Settings, Turn
from rrdemo.views import escape_markdown
from rrvideo.clock import format_time

__all__ = ["as_json", "command", "markdown"]


def markdown(file: FileView | None, model: str, turns: Sequence[Turn]) -> str:
    """The conversation for people to read: questions, answers, the moments they rest on, settings and times."""
    lines = [f"# A chat about {escape_markdown(file.name)}" if file else "# A chat", ""]
    if file:
        size = f"{file.width} x {file.height}, {file.fps:.4g} frames a second"
        lines += [f"{format_time(file.duration)} long, {size}; model {escape_markdown(model)}.", ""]
    for number, turn in enumerate(turns, start=1):
        lines += [
            f"## Question {number}",
            "",
            *(f"> {escape_markdown(line)}" for line in turn.question.splitlines()),
            "",
        ]
        lines += [*(escape_markdown(line) for line in turn.answer.splitlines()), *["*(stopped)*"] * turn.stopped, ""]
        for moment in turn.evidence:
            lines.append(f"- {format_time(moment.start)}-{format_time(moment.end)}: {100 * moment.weight:.0f} %")
        lines += [*[""] * bool(turn.evidence), _statistics(turn), ""]
    return "\n".join(lines)


def as_json(file: FileView | None, model: str, turns: Sequence[Turn]) -> str:
    """The conversation for programs: all that `Turn` and `FileView` hold, but for where the file lies."""
    document = {
        "rrvideo": version("rrvideo"),
        "model": model,
        "video": file.to_dict() if file else None,
        "turns": [turn.to_dict() for turn in turns],
    }
    return json.dumps(document, indent=2, ensure_ascii=False)


def command(file: FileView | None, model: str, turns: Sequence[Turn]) -> str:
    """The `rrvideo ask` command that asks all questions with the settings of the last; empty if there are none.

    There each question is asked by itself.
    """
    if file is None or not turns:
        return ""
    settings = turns[-1].settings
    options = [*(["--model", model] if model != "tiny" else []), *_options(settings), "--fit"]
    return shlex.join(["rrvideo", "ask", *options, "--", file.name, *(turn.question for turn in turns)])


def _options(settings: Settings) -> list[str]:
    """The options of `rrvideo ask` that are not what it does anyway."""
    defaults, options = Settings(), list[str]()
    if settings.start is not None or settings.end is not None:
        end = "" if settings.end is None else _seconds(settings.end)
        options += ["--clip", f"{_seconds(settings.start or 0)}-{end}"]
    if settings.fps != defaults.fps:
        options += ["--fps", _seconds(settings.fps)]
    if settings.max_frames != defaults.max_frames:
        options += ["--max-frames", str(settings.max_frames)]
    if settings.sampling != defaults.sampling:
        options += ["--sampling", settings.sampling]
    if settings.attention != defaults.attention:
        options += ["--attention", settings.attention]
    elif settings.tau != defaults.tau:
        options += ["--tau", str(settings.tau)]
    return options


def _seconds(number: float) -> str:
    """A number as a person writes it: no exponent, and no zeros at its end."""
    return f"{number:.6f}".rstrip("0").rstrip(".")


def _statistics(turn: Turn) -> str:
    settings, told = turn.settings, list[str]()
    clip = f", {format_time(settings.start or 0)} to " if settings.start or settings.end is not None else ""
    clip += (format_time(settings.end) if settings.end is not None else "the end") if clip else ""
    kind = f"RRAttention, tau {settings.tau:g}" if settings.attention == "rr" else "full attention"
    told.append(
        f"{settings.sampling} sampling, {settings.fps:g} frames a second, {settings.max_frames} at most{clip}; {kind}"
    )
    if turn.usage and turn.timings:
        usage, seconds = turn.usage, turn.timings
        told.append(f"{usage.frames} frames, at most {turn.interval:.3g} s apart; {usage.prompt_tokens:,} tokens")
        told.append(
            f"decode {seconds.decode:.1f} s, encode {seconds.encode:.1f} s, prefill {seconds.prefill:.1f} s, "
            f"answer {seconds.generate:.1f} s"
        )
    if turn.density is not None:
        told.append(f"density {turn.density:.2f}")
    if turn.speed_up is not None:
        other = "full attention" if settings.attention == "rr" else "RRAttention"
        told.append(f"{other} took {turn.speed_up:.2f} times as long to prefill")
    return f"*{'. '.join(told)}.*"
