"""A conversation as Markdown, as JSON, and as the command that asks the same in a shell."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from rrdemo.conversation import FileView, Settings, Turn
from rrdemo.words import elapsed, sentence, spread
from rrvideo.clock import format_time

__all__ = ["as_json", "command", "escape_markdown", "markdown"]

# Whatever gives Markdown, or a reader of it, something else to show than the text itself.
MARKS = re.compile(r"(?m)[\\`*_\[\]<>|&~$@]|^[#+=-]|(?<=\d)[.)](?!\S)|(?<=:)//|(?<=www)\.")
INDENT = re.compile(r"(?m)^[ \t]+")  # which would make code of what follows


def markdown(file: FileView | None, model: str, turns: Sequence[Turn]) -> str:
    """The conversation for people to read: questions, answers, the moments they rest on, settings and times."""
    lines = [f"# A chat about {escape_markdown(file.name)}" if file else "# A chat", ""]
    if file:
        size = f"{file.width} x {file.height}, {_rate(file.fps)}"
        lines += [f"{format_time(file.duration)} long, {size}; model {escape_markdown(model)}.", ""]
    for number, turn in enumerate(turns, start=1):
        lines += [
            f"## Question {number}",
            "",
            *(f"> {escape_markdown(line)}" for line in turn.question.splitlines()),
            "",
        ]
        lines += [*(escape_markdown(line) for line in turn.answer.splitlines()), *_remark(turn), ""]
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
    questions = shlex.join(turn.question for turn in turns)
    return f"{shlex.join(['rrvideo', 'ask', *options, '--'])} {_path(file.source or file.name)} {questions}"


def _path(source: str) -> str:
    """A path as a shell reads it, from the home folder on if it lies there: whose that is, is nobody's business."""
    path, home = Path(source), Path.home()
    return f"~/{shlex.quote(str(path.relative_to(home)))}" if path.is_relative_to(home) else shlex.quote(source)


def _remark(turn: Turn) -> list[str]:
    """What is to be said in place of an answer, or after it."""
    if turn.stopped:
        return ["", "*Stopped.*"] if turn.answer else ["*Stopped before an answer.*"]
    return [] if turn.answer.strip() else ["*The model said nothing.*"]


def escape_markdown(text: str) -> str:
    """Write `text` so that Markdown shows it as it is, with no link, picture or HTML of its own."""
    return MARKS.sub(r"\\\g<0>", INDENT.sub("", text))


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


def _rate(fps: float) -> str:
    return f"{fps:.4g} {'frame' if fps == 1 else 'frames'} a second"


def _seconds(number: float) -> str:
    """A number as a person writes it: no exponent, and no zeros at its end."""
    return f"{number:.6f}".rstrip("0").rstrip(".")


def _statistics(turn: Turn) -> str:
    settings = turn.settings
    clip = f", {format_time(settings.start or 0)} to " if settings.start or settings.end is not None else ""
    clip += (format_time(settings.end) if settings.end is not None else "the end") if clip else ""
    sampling = f"{settings.sampling} sampling, {_rate(settings.fps)}, {settings.max_frames:,} at most{clip}"
    told = [f"{sampling}; {settings.mode}"]
    if turn.usage and turn.timings:
        usage, seconds = turn.usage, turn.timings
        told.append(f"{spread(usage.frames, turn.interval)}; {usage.prompt_tokens:,} tokens")
        told.append(
            f"decode {elapsed(seconds.decode)}, encode {elapsed(seconds.encode)}, prefill {elapsed(seconds.prefill)}, "
            f"answer {elapsed(seconds.generate)}"
        )
    if turn.density is not None:
        told.append(f"density {turn.density:.2f}")
    if turn.speed_up is not None and turn.compared:
        told.append(f"prefill took {turn.speed_up:.2f} times as long with {turn.compared.mode}")
    return f"*{'. '.join(map(sentence, told))}.*"
