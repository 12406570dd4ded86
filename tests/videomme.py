"""A small set in Video-MME's form: the rows of its table, and files in their official places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clips import numbered_frames, write_video

LENGTHS = {"short": 2, "medium": 4, "long": 6}  # seconds


def rows(videos: int = 3) -> list[dict[str, Any]]:
    """The table's rows, three for each video, as the official parquet has them."""
    return [
        {
            "video_id": f"{number:03}",
            "duration": list(LENGTHS)[(number - 1) % 3],
            "domain": ("Knowledge", "Film & Television")[number % 2],
            "sub_category": "Astronomy",
            "url": f"https://www.youtube.com/watch?v=-clip_{number}",
            "videoID": f"-clip_{number}",
            "question_id": f"{number:03}-{part}",
            "task_type": "Counting Problem",
            "question": f"How many scenes has part {part}?",
            "options": ["A. One.", "B. Two.", "C. Three.", "D. None of the above."],
            "answer": "ABCD"[(number + part) % 4],
        }
        for number in range(1, videos + 1)
        for part in (1, 2, 3)
    ]


def write_table(path: Path, table: list[dict[str, Any]]) -> Path:
    """Write rows in the form that the suffix of `path` says."""
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table), encoding="utf-8")
    else:
        path.write_text(json.dumps(table), encoding="utf-8")
    return path


def write_set(folder: Path, videos: int = 3) -> Path:
    """A whole set in `folder`, in which every frame of a video is another; the first has subtitles."""
    table = rows(videos)
    write_table(folder / "videomme" / "test-00000-of-00001.parquet", table)
    (folder / "data").mkdir()
    (folder / "subtitle").mkdir()
    for row in table[::3]:
        count = 12 * LENGTHS[row["duration"]]
        write_video(folder / "data" / f"{row['videoID']}.mp4", numbered_frames(count, width=84, height=56), fps=12)
    spoken = "1\n00:00:00,000 --> 00:00:01,000\nThe first second\n\n2\n00:00:01,000 --> 00:00:02,000\nand the second.\n"
    (folder / "subtitle" / "-clip_1.srt").write_text(spoken)
    return folder
