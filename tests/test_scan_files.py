"""The files of scans: typed lines that come back as they were, survive a kill, and are no other scan's."""

import csv
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import make_checkpoint
from clips import numbered_frames, write_video
from safetensors.torch import load_file, save_file
from scanning import QUESTIONS, RED, SCHEMA, begin, note_watched, video_class

from rrvideo import VideoQA, cli, video
from rrvideo.errors import RRVideoError
from rrvideo.events import json_line, record
from rrvideo.tiny.sample import sample_world

ANALYTICS = Path(__file__).parent.parent / "demos" / "analytics.py"


@pytest.fixture(scope="module")
def qa(folder):
    return VideoQA.load(folder, attention="full", device="cpu")


@pytest.fixture
def watched(monkeypatch):
    return note_watched(monkeypatch)


FORMATS = pytest.mark.parametrize("suffix", [".jsonl", ".csv"])


@pytest.fixture(scope="module")
def whole(qa, clip, tmp_path_factory):
    """What a scan writes that nothing stops, in each format."""
    folder = tmp_path_factory.mktemp("whole")
    assert [begin(qa, clip).write(folder / f"whole{suffix}") for suffix in (".jsonl", ".csv")] == [3, 3]
    return {suffix: (folder / f"whole{suffix}").read_bytes() for suffix in (".jsonl", ".csv")}


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(line) for line in file]


@FORMATS
def test_a_file_has_a_line_for_each_window_with_typed_fields(qa, clip, whole, tmp_path, suffix):
    path = tmp_path / f"events{suffix}"
    path.write_bytes(whole[suffix])

    rows = read(path)
    assert " ".join(rows[0]) == (
        "video start end red red_probability way way_probability count all warnings error scan"
    )
    for row, window in zip(rows, begin(qa, clip), strict=True):
        expected = {
            **{"video": str(clip), "start": window.start, "end": window.end},
            **{"red": window["red"].value, "red_probability": window["red"].probability},
            **{"way": window["way"].value, "way_probability": window["way"].probability},
            **{"count": window["count"].value, "all": window["all"].value, "warnings": "", "error": ""},
            "scan": begin(qa, clip).digest,
        }
        if suffix == ".csv":
            expected = {name: "" if value is None else str(value) for name, value in expected.items()}
            expected["all"] = " ".join(window["all"].value.splitlines())
        assert row == expected


@FORMATS
@pytest.mark.parametrize("text", ['He said "two, three"', "two\nlines", "\u2028 é 日本", " ", "=1+1"])
def test_any_text_is_one_line_and_comes_back(qa, clip, tmp_path, monkeypatch, suffix, text):
    monkeypatch.setattr(video_class(), "ask", lambda self, asked, **_: [SimpleNamespace(text=text) for _ in asked])
    path = tmp_path / f"events{suffix}"
    begin(qa, clip, ["Why?"], schema=None).write(path)

    assert path.read_bytes().count(b"\n") == 3 + (suffix == ".csv")
    assert {row["Why?"] for row in read(path)} == {" ".join(text.splitlines()) if suffix == ".csv" else text}
    assert begin(qa, clip, ["Why?"], schema=None).write(path) == 0


@FORMATS
@pytest.mark.parametrize("name", [b"caf\xe9.mp4", b"two\nlines.mp4", "\u2028.mp4".encode()], ids=ascii)
def test_any_name_of_a_video_is_written_and_known_again(qa, clip, tmp_path, suffix, name):
    video = tmp_path / os.fsdecode(name)
    try:
        shutil.copy(clip, video)
    except OSError:
        pytest.skip("no file can have such a name here")
    path = tmp_path / f"events{suffix}"
    assert begin(qa, video).write(path) == 3
    assert path.read_bytes().decode().count("\n") == 3 + (suffix == ".csv")
    assert begin(qa, video).write(path) == 0


@FORMATS
def test_another_path_to_the_same_video_is_no_other_video(qa, clip, whole, tmp_path, monkeypatch, suffix):
    path = tmp_path / f"events{suffix}"
    path.write_bytes(whole[suffix])
    (tmp_path / "link.mp4").symlink_to(clip)
    monkeypatch.chdir(clip.parent)
    for other in (clip.name, tmp_path / "link.mp4", shutil.copy(clip, tmp_path / "copy.mp4")):
        assert begin(qa, other).write(path) == (3 if "copy" in str(other) else 0)


@FORMATS
def test_two_scans_do_not_write_to_one_file_at_once(qa, clip, whole, tmp_path, suffix):
    path = tmp_path / f"events{suffix}"
    first = record(begin(qa, clip), path)
    next(first)
    with pytest.raises(RRVideoError, match=r"another process is writing to .*wait until it ends, or name another"):
        begin(qa, clip).write(path)
    assert len(list(first)) == 2
    assert path.read_bytes() == whole[suffix]
    assert begin(qa, clip).write(path) == 0


@FORMATS
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.999], ids="{} of the last line".format)
def test_a_scan_goes_on_where_it_was_stopped_and_loses_one_window_at_most(
    qa, clip, whole, tmp_path, watched, suffix, kept
):
    path = tmp_path / f"events{suffix}"
    *lines, last = whole[suffix].splitlines(keepends=True)
    path.write_bytes(b"".join(lines) + last[: int(kept * len(last))])

    assert begin(qa, clip).write(path) == 1
    assert watched == [4]
    assert path.read_bytes() == whole[suffix]
    assert begin(qa, clip).write(path) == 0


@FORMATS
def test_even_a_first_line_that_is_cut_off_is_mended(qa, clip, whole, tmp_path, suffix):
    path = tmp_path / f"events{suffix}"
    for length in (0, 7):
        path.write_bytes(whole[suffix][:length])
        assert begin(qa, clip).write(path) == 3
        assert path.read_bytes() == whole[suffix]


def test_each_window_is_in_the_file_before_the_next_one_is_watched(qa, clip, tmp_path):
    path = tmp_path / "events.jsonl"
    windows = begin(qa, clip)
    for count, window in enumerate(record(windows, path), start=1):
        lines = path.read_text().splitlines(keepends=True)
        assert len(lines) == count
        assert lines[-1] == json_line(window, windows)


@FORMATS
@pytest.mark.parametrize(
    "other",
    [
        {"questions": {**QUESTIONS, "all": "Why?"}},
        {"schema": {**SCHEMA, "way": "up|down"}},
        {"every": 1.0},
        {"fps": 2.0},
        {"end": 4.0},
        {"max_new_tokens": 5},
    ],
    ids=lambda other: next(iter(other)),
)
def test_a_file_of_another_scan_is_refused_and_left_as_it_is(qa, clip, whole, tmp_path, watched, suffix, other):
    path = tmp_path / f"events{suffix}"
    path.write_bytes(before := whole[suffix][:-9])

    with pytest.raises(RRVideoError, match="these") as refusal:
        begin(qa, clip, **other).write(path)
    assert "name another file" in refusal.value.hint
    assert path.read_bytes() == before
    assert watched == []


def test_another_model_or_other_attention_is_another_scan_and_settings_that_do_not_matter_are_not(qa, clip, folder):
    digest = begin(qa, clip).digest

    assert begin(VideoQA.load(folder, device="cpu"), clip).digest != digest
    assert begin(VideoQA.load("tiny", attention="full", device="cpu"), clip).digest != digest
    assert begin(VideoQA.load(folder, attention="full", device="cpu"), clip, fps=1.0, progress=print).digest == digest
    assert begin(qa, clip, every=2, window=2, start=0, cache="offload").digest == digest
    assert begin(qa, clip, start=1).digest != digest


@pytest.mark.parametrize(
    "content", [b"my notes", b"my notes\nand more", b'{"a": 1}\n', b"[1]\n", b"a,b\n1,2\n", b"\xff\n", b"\n", b'"x"\n']
)
@FORMATS
def test_a_file_that_is_no_scan_is_refused_and_left_as_it_is(qa, clip, tmp_path, suffix, content):
    path = tmp_path / f"notes{suffix}"
    path.write_bytes(content)

    with pytest.raises(RRVideoError, match="is no file of a scan"):
        begin(qa, clip).write(path)
    assert path.read_bytes() == content


def test_windows_of_a_video_that_has_changed_since_are_refused(qa, clip, tmp_path):
    copy, path = tmp_path / "copy.mp4", tmp_path / "events.jsonl"
    copy.write_bytes(clip.read_bytes())
    begin(qa, copy, every=4.0, window=4.0).write(path)
    write_video(copy, numbered_frames(120, width=84, height=56))

    with pytest.raises(RRVideoError, match="the video has changed since"):
        begin(qa, copy, every=4.0, window=4.0).write(path)


def test_a_video_of_the_same_length_in_its_place_is_refused_too(qa, clip, tmp_path):
    copy, other, path = tmp_path / "copy.mp4", tmp_path / "other.mp4", tmp_path / "events.jsonl"
    copy.write_bytes(clip.read_bytes())
    other.write_bytes(clip.read_bytes())
    begin(qa, other).write(path)
    begin(qa, copy).write(path)
    before = path.read_bytes()
    assert b"Lavf" in clip.read_bytes()
    copy.write_bytes(clip.read_bytes().replace(b"Lavf", b"Lavg"))  # its windows are as they were

    with pytest.raises(RRVideoError, match=r"copy\.mp4 as it was: the video has changed since"):
        begin(qa, copy).write(path)
    assert begin(qa, other).write(path) == 0
    assert path.read_bytes() == before


def test_other_weights_under_the_same_name_are_another_scan_and_a_model_that_was_moved_is_not(clip, tmp_path):
    folder = make_checkpoint(tmp_path / "model")
    digest = begin(VideoQA.load(folder, device="cpu"), clip).digest
    assert begin(VideoQA.load(shutil.copytree(folder, tmp_path / "moved"), device="cpu"), clip).digest == digest

    weights = load_file(folder / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})

    assert begin(VideoQA.load(folder, device="cpu"), clip).digest != digest


def test_a_file_that_cannot_be_written_is_told(qa, clip, tmp_path):
    with pytest.raises(RRVideoError, match=r"events.csv cannot be written: No such file"):
        begin(qa, clip).write(tmp_path / "missing" / "events.csv")
    with pytest.raises(ValueError, match=r"must end with .jsonl or .csv, got 'events.txt'"):
        begin(qa, clip).write(tmp_path / "events.txt")


def test_pandas_gets_the_same_table(qa, clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=lambda rows, columns: (rows, columns)))
    scanned = begin(qa, clip)
    rows, columns = scanned.to_pandas()

    assert tuple(columns) == scanned.columns == tuple(rows[0])
    assert [json.dumps(row, ensure_ascii=False) + "\n" for row in rows] == [
        json_line(window, scanned) for window in begin(qa, clip)
    ]


def test_without_pandas_it_is_told_what_to_install(qa, clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)

    with pytest.raises(RRVideoError, match="pip install pandas"):
        begin(qa, clip).to_pandas()


def test_a_killed_scan_goes_on_when_the_same_command_is_given_again(clip, folder, tmp_path, capsys):
    asked = ["--ask", f"red=yes/no: {RED}", "--ask", "all=text: Describe.", "--every", "0.5", "--window", "0.5"]
    argv = ["scan", str(clip), *asked, "--model", str(folder), "--max-new-tokens", "4", "--quiet"]
    path = tmp_path / "events.jsonl"
    process = subprocess.Popen([sys.executable, "-m", "rrvideo", *argv, "--out", str(path)])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (path.exists() and path.stat().st_size):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = path.read_bytes()

    assert 0 < killed.count(b"\n") < 12
    assert cli.main([*argv, "--out", str(path)]) == 0
    assert cli.main([*argv, "--out", str(tmp_path / "whole.jsonl")]) == 0
    assert path.read_bytes().startswith(killed[: killed.rfind(b"\n") + 1])
    found, whole = read(path), read(tmp_path / "whole.jsonl")
    assert [(row["start"], row["all"], row["red"]) for row in found] == [
        (row["start"], row["all"], row["red"]) for row in whole
    ]
    assert len(found) == 12


def test_the_analytics_demo_finds_a_moment_of_the_sample(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["analytics.py", "--out", str(tmp_path / "moments.csv"), "--every", "6", "--window", "6"]
    )
    runpy.run_path(str(ANALYTICS), run_name="__main__")
    table = (tmp_path / "moments.csv").read_text()

    assert capsys.readouterr().out == table
    header, *moments = csv.reader(table.splitlines())
    assert header == ["from", "to", "probability"]
    assert len(moments) == 1
    pink = next(scene for scene in sample_world().scenes if scene.name == "pink triangle")
    begin_seconds, end_seconds = (video.parse_clip(f"{text}-")[0] for text in moments[0][:2])
    assert abs(begin_seconds - pink.start) <= 6
    assert abs(end_seconds - pink.end) <= 6
