"""Video-MME as it is published: rows of questions, and where the video and the subtitles of each are found.

FOLDER/*.parquet, FOLDER/videomme/*.parquet, FOLDER/*.json or FOLDER/*.jsonl   the rows
FOLDER/data/<videoID>.mp4                                                      the videos
FOLDER/subtitle/<videoID>.srt                                                  the subtitles of most of them
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

from rreval.subtitles import read_subtitles
from rrvideo.errors import RRVideoError, VideoError

__all__ = ["DURATIONS", "Problem", "Row", "VideoItem", "check_set", "digest", "load_set", "seconds_of", "select"]

DURATIONS = ("short", "medium", "long")
LETTERS = "ABCDEFGH"
SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".m4v", ".avi", ".ts", ".flv", ".wmv", ".mpg", ".mpeg", ".ogv")
YOUTUBE = re.compile(r"(?:[?&]v=|youtu\.be/)([\w-]+)")


@dataclass(frozen=True, slots=True)
class Row:
    """One question, in the official schema; `options` read "A. ..." and so on, and `answer` is a letter."""

    video_id: str
    duration: str
    domain: str
    sub_category: str
    url: str
    videoID: str  # noqa: N815 (the official name)
    question_id: str
    task_type: str
    question: str
    options: tuple[str, ...]
    answer: str


@dataclass(frozen=True, slots=True)
class VideoItem:
    """A video and what is asked about it. `path` is where it should be; `subtitle` is None where it has none."""

    video_id: str
    videoID: str  # noqa: N815
    duration: str
    domain: str
    sub_category: str
    path: Path
    subtitle: Path | None
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one video of a set, in words; a `fatal` one leaves nothing to watch."""

    item: VideoItem
    message: str
    fatal: bool


def load_set(
    source: str | Path,
    *,
    videos: str | Path | None = None,
    duration: Collection[str] = (),
    domain: Collection[str] = (),
    limit: int | None = None,
    ids: Collection[str] = (),
) -> list[VideoItem]:
    """Read the set in the folder or file `source`, or the one with that id on the hub, and choose from it.

    `videos` is the folder that holds `data` and `subtitle`, if that is another one. The rest is for `select`.
    Raises `RRVideoError` if there is no such set, or its rows are not in the official form.
    """
    rows, home = _read(source)
    folder = Path(videos) if videos is not None else home
    if folder is None:
        raise RRVideoError(f"{source} is on the hub, and its videos are not", "name their folder with --videos FOLDER")
    if repeated := _first_repeated(row.question_id for row in rows):
        raise RRVideoError(f"question {repeated} is in {source} twice", "remove one of its rows")
    files, subtitles = _by_stem(folder / "data", SUFFIXES), _by_stem(folder / "subtitle", (".srt",))
    items = []
    for _, group in groupby(sorted(rows, key=lambda row: row.video_id), key=lambda row: row.video_id):
        of_video = tuple(group)
        first = of_video[0]
        items.append(
            VideoItem(
                video_id=first.video_id,
                videoID=first.videoID,
                duration=first.duration,
                domain=first.domain,
                sub_category=first.sub_category,
                path=files.get(first.videoID, folder / "data" / f"{first.videoID}.mp4"),
                subtitle=subtitles.get(first.videoID),
                rows=of_video,
            )
        )
    return select(items, duration=duration, domain=domain, limit=limit, ids=ids)


def select(
    items: Sequence[VideoItem],
    *,
    duration: Collection[str] = (),
    domain: Collection[str] = (),
    limit: int | None = None,
    ids: Collection[str] = (),
) -> list[VideoItem]:
    """The videos of these durations and domains, and no more than `limit` of them; left out, all are chosen.

    `ids` name videos, by number or by YouTube's id, or single questions. Raises `RRVideoError` for names that the set
    does not know, and if nothing is left.
    """
    wanted = set(ids)
    known = {name for item in items for name in (item.video_id, item.videoID, *(row.question_id for row in item.rows))}
    for what, names, among in (
        ("duration", duration, {item.duration for item in items}),
        ("domain", domain, {item.domain for item in items}),
        ("id", wanted, known),
    ):
        if unknown := sorted(set(names) - among):
            hint = (
                f"there are {', '.join(sorted(among))}" if what != "id" else "give a video_id, videoID or question_id"
            )
            raise RRVideoError(f"the set has no {what} {', '.join(unknown)}", hint)
    chosen = []
    for item in items:
        if (duration and item.duration not in duration) or (domain and item.domain not in domain):
            continue
        whole = not wanted or wanted & {item.video_id, item.videoID}
        rows = tuple(row for row in item.rows if whole or row.question_id in wanted)
        if rows:
            chosen.append(replace(item, rows=rows))
    if not chosen:
        raise RRVideoError("no video of the set is chosen", "ask for less: a wider --duration, --domain or --ids")
    return chosen[:limit]


def check_set(items: Sequence[VideoItem], *, thorough: bool = False) -> list[Problem]:
    """What is missing or cannot be read: videos, and subtitles that are there.

    Files are opened; a `thorough` look reads all packets of each, and so finds those that end early.
    """
    return [problem for item in items for problem in (*_video_problems(item, thorough), *_subtitle_problems(item))]


def seconds_of(item: VideoItem) -> float:
    """How long its video says it is, in seconds; 0 if it cannot be read."""
    import av

    from rrvideo.frameindex import open_video

    try:
        with open_video(item.path) as (container, _):
            return float((container.duration or 0) / av.time_base)
    except VideoError:
        return 0.0


def digest(items: Sequence[VideoItem]) -> str:
    """Tell a set by all that its rows say."""
    rows = sorted((row for item in items for row in item.rows), key=lambda row: row.question_id)
    return sha256(json.dumps([asdict(row) for row in rows]).encode()).hexdigest()[:16]


def _video_problems(item: VideoItem, thorough: bool) -> Iterator[Problem]:
    from rrvideo.frameindex import open_video
    from rrvideo.video import probe

    try:
        if thorough:
            for warning in probe(item.path).warnings:
                yield Problem(item, f"{item.path.name}: {warning}", fatal=False)
        else:
            with open_video(item.path):
                pass
    except VideoError as error:
        yield Problem(item, str(error), fatal=True)


def _subtitle_problems(item: VideoItem) -> Iterator[Problem]:
    if item.subtitle is not None:
        try:
            read_subtitles(item.subtitle)
        except RRVideoError as error:
            yield Problem(item, str(error), fatal=False)


def _read(source: str | Path) -> tuple[list[Row], Path | None]:
    """The rows of a set, and the folder that they are in."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = _row_files(path)
    elif path.is_file():
        files = [path]
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        return _rows(_from_hub(str(source)), str(source)), None
    else:
        raise RRVideoError(f"there is no folder {source}", "pass the folder of the set, or its id on the hub")
    rows = [row for file in files for row in _rows(_from_file(file), file.name)]
    if not rows:
        raise RRVideoError(f"{', '.join(file.name for file in files)} in {path} holds no questions")
    return rows, path if path.is_dir() else path.parent


def _row_files(folder: Path) -> list[Path]:
    for pattern in ("test-*.parquet", "videomme/*.parquet", "*.parquet", "*.jsonl", "*.json"):
        if files := sorted(folder.glob(pattern)):
            if len(files) > 1 and not pattern.endswith(".parquet"):  # of a table, several files are its parts
                names = ", ".join(file.name for file in files)
                raise RRVideoError(f"{folder} holds several sets: {names}", "name one of these files")
            return files
    raise RRVideoError(
        f"{folder} holds no questions: no .parquet, .json or .jsonl file",
        "put the set's table there, such as videomme/test-00000-of-00001.parquet",
    )


def _from_file(file: Path) -> list[dict[str, Any]]:
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet

            return list(pyarrow.parquet.read_table(file).to_pylist())
        text = file.read_text(encoding="utf-8-sig")
        content = (
            [json.loads(line) for line in text.split("\n") if line.strip()]
            if file.suffix == ".jsonl"
            else (json.loads(text))
        )
    except ModuleNotFoundError as error:
        raise RRVideoError("pyarrow, which reads parquet, is not installed", 'pip install "rrvideo[eval]"') from error
    except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds too
        raise RRVideoError(f"{file} cannot be read: {error}", "copy or download it again") from error
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise RRVideoError(f"{file} is not a list of questions", "each must be an object with Video-MME's fields")
    return content


def _from_hub(name: str) -> list[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise RRVideoError("datasets, which reads the hub, is not installed", 'pip install "rrvideo[eval]"') from error
    try:
        return list(load_dataset(name, split="test"))
    except Exception as error:  # of the network, of rights, of the cache: what it raises differs between versions
        raise RRVideoError(
            f"{name} is no folder here, and the hub did not give it ({type(error).__name__})",
            "check the name and the network, or pass a local folder",
        ) from error


def _rows(entries: Sequence[Mapping[str, Any]], name: str) -> list[Row]:
    """The rows of a table, or of the official results' form, where each video holds a list of its questions."""
    rows: list[Row] = []
    for entry in entries:
        for question in entry.get("questions", [{}]):
            rows.append(_row({**entry, **question}, f"row {len(rows) + 1} of {name}"))
    return rows


def _row(entry: Mapping[str, Any], where: str) -> Row:
    link = YOUTUBE.search(str(entry.get("url") or ""))
    known = {"url": "", "videoID": link[1] if link else entry.get("video_id"), **entry}
    names = [field.name for field in fields(Row)]
    if missing := [name for name in names if known.get(name) is None]:
        raise RRVideoError(f"{where} lacks {', '.join(missing)}", f"Video-MME's columns are {', '.join(names)}")
    options = known["options"]
    if not isinstance(options, list | tuple) or not 2 <= len(options) <= len(LETTERS):
        raise RRVideoError(f"{where}: options must be a list of four answers, got {options!r}")
    answer = str(known["answer"]).strip().upper()
    if answer not in tuple(LETTERS[: len(options)]):
        raise RRVideoError(f"{where}: answer must be a letter from A to {LETTERS[len(options) - 1]}, got {answer!r}")
    text = {name: str(known[name]).strip() for name in names if name not in {"options", "answer"}}
    return Row(**text, options=tuple(str(option).strip() for option in options), answer=answer)


def _by_stem(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """The files of a folder by their names without suffix; of several, the one whose suffix comes first."""
    found = [path for path in folder.glob("*") if path.suffix.lower() in suffixes]
    found.sort(key=lambda path: suffixes.index(path.suffix.lower()), reverse=True)
    return {path.stem: path for path in found}


def _first_repeated(names: Iterator[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
