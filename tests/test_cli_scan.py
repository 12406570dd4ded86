"""`rrvideo scan`: what goes to stdout or into a file, and what is told of videos and windows that cannot be seen."""

import csv
import json

import pytest
from clips import numbered_frames, write_video

from rrvideo import VideoQA, cli
from rrvideo.events import json_line
from rrvideo.scan import scan

pytest_plugins = ["commands"]
pytestmark = pytest.mark.usefixtures("no_settings")
QUESTION = "What colour is the circle?"
OTHER = "How many scenes are there?"
SCAN = ["--ask", f"red=yes/no: {QUESTION}", "--ask", f"count=number: {OTHER}", "--every", "2", "--window", "2"]


def test_a_scan_goes_to_stdout_as_json_lines(rrvideo, model, clip):
    code, out, err = rrvideo("scan", clip, "--model", model, *SCAN, "--max-new-tokens", 4, "--fps", 2)
    questions, schema = {"red": QUESTION, "count": OTHER}, {"red": "yes/no", "count": "number"}
    windows = scan(
        VideoQA.load(model), clip, questions, schema=schema, every=2.0, window=2.0, max_new_tokens=4, fps=2.0
    )

    assert code == 0
    assert out == "".join(json_line(window, windows) for window in windows)
    assert err.splitlines() == [f"loading {model}", "scanning clip.mp4"]


def test_a_scan_of_several_videos_goes_into_one_file_and_reports_those_that_cannot_be_read(
    rrvideo, model, clip, tmp_path
):
    broken, out_file = tmp_path / "broken.mp4", tmp_path / "events.csv"
    broken.write_bytes(b"no video at all")
    argv = ["scan", clip, broken, "sample", "--model", model, *SCAN, "--clip", "2-6", "--max-new-tokens", 4]
    code, out, err = rrvideo(*argv, "--out", out_file, "--quiet")

    with out_file.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert (code, out) == (1, "")
    assert [(row["video"], row["start"]) for row in rows] == [
        (str(video), start) for video in (clip, cli.SAMPLE) for start in ("2.0", "4.0")
    ]
    assert err.startswith("rrvideo: broken.mp4 cannot be read as a video\n")
    assert err.count("\n") == 2


def test_a_window_that_cannot_be_seen_is_told(rrvideo, model, tmp_path):
    pts = [*range(48), *range(144, 192)]
    path = write_video(tmp_path / "hole.mp4", numbered_frames(96, width=84, height=56), pts=pts)
    code, out, err = rrvideo("scan", path, "--model", model, *SCAN, "--max-new-tokens", 4, "--quiet")

    assert code == 0
    assert [bool(json.loads(line)["error"]) for line in out.splitlines()] == [False, True, True, False]
    assert err.splitlines() == [
        f"rrvideo: hole.mp4 {times}: no frame lies in this window" for times in ("0:02-0:04", "0:04-0:06")
    ]


def test_a_file_of_another_scan_is_a_known_failure(rrvideo, model, clip, tmp_path):
    argv = ["scan", clip, "--model", model, *SCAN, "--out", tmp_path / "events.jsonl", "--quiet"]
    assert rrvideo(*argv, "--max-new-tokens", 4)[0] == 0
    code, out, err = rrvideo(*argv, "--max-new-tokens", 5)

    assert (code, out) == (1, "")
    message, hint = err.splitlines()
    assert "holds another scan" in message
    assert "name another file" in hint
