"""Scans: which windows there are, what each answer means, and files that survive a kill."""

import csv
import inspect
import json
import math
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import make_checkpoint
from clips import numbered_frames, write_video

from rrvideo import VideoQA, cli, frameindex, readers, scan, video
from rrvideo.errors import RRVideoError, VideoError
from rrvideo.events import json_line, record
from rrvideo.scan import Finding, Query, parse_query
from rrvideo.tiny.sample import sample_world

RED = "Is there a red circle?"
ANALYTICS = Path(__file__).parent.parent / "demos" / "analytics.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def qa(folder):
    return VideoQA.load(folder, attention="full", device="cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Six seconds, in which every frame is another."""
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", numbered_frames(144, width=84, height=56))


@pytest.fixture
def watched(monkeypatch):
    """The start of each window that is watched."""
    starts = []
    watch = VideoQA.watch

    def watching(self, path, *, start, **options):
        starts.append(start)
        return watch(self, path, start=start, **options)

    watching.__signature__ = inspect.signature(watch)
    monkeypatch.setattr(VideoQA, "watch", watching)
    return starts


QUESTIONS = {
    "red": RED,
    "way": "Which way does the star move?",
    "count": "How many scenes are there?",
    "all": "Describe.",
}
SCHEMA = {"red": "yes/no", "way": ["left", "right"], "count": "number"}


def begin(qa, path, questions=QUESTIONS, *, schema=SCHEMA, every=2.0, window=2.0, **options):
    return qa.scan(path, questions, schema=schema, every=every, window=window, **{"max_new_tokens": 6} | options)


@pytest.mark.parametrize(
    ("every", "window", "start", "end", "expected"),
    [
        (2, 2, None, None, [(0, 2), (2, 4), (4, 6)]),
        (4, 4, None, None, [(0, 4), (4, 6)]),
        (2, 3, None, None, [(0, 3), (2, 5), (4, 6)]),
        (1, 4, None, None, [(0, 4), (1, 5), (2, 6)]),  # and not (3, 6), (4, 6), (5, 6), which hold nothing new
        (4, 1, None, None, [(0, 1), (4, 5)]),
        (2, 2, 1.5, 4.5, [(1.5, 3.5), (3.5, 4.5)]),
        (2, 2, 3, 99, [(3, 5), (5, 6)]),
        (5.99, 5.99, None, None, [(0, 5.99)]),  # no frame begins in the last hundredth
        (60, 60, None, None, [(0, 6)]),
    ],
)
def test_windows_cover_what_is_to_be_seen_and_none_is_without_a_frame_of_its_own(
    qa, clip, every, window, start, end, expected
):
    assert list(begin(qa, clip, every=every, window=window, start=start, end=end).windows) == expected


def test_windows_are_watched_one_by_one_as_they_are_taken_and_closed_again(qa, clip, watched, monkeypatch):
    closed = []
    close = video_class().close
    monkeypatch.setattr(video_class(), "close", lambda self: closed.append(self) or close(self))
    windows = begin(qa, clip)
    assert (len(windows), watched) == (3, [])

    first = next(windows)
    assert (first.start, first.end, len(windows), watched, len(closed)) == (0, 2, 2, [0], 1)
    assert [window.start for window in windows] == [2, 4]
    assert len(closed) == 3
    assert list(windows) == []


def test_the_packets_of_a_file_are_read_once_for_all_windows(qa, clip, monkeypatch):
    read = []
    monkeypatch.setattr(frameindex, "open_video", lambda path: read.append(path) or open_video(path))
    open_video = readers.open_video
    windows = begin(qa, clip)
    opened = len(read)

    assert opened > 0
    assert len(list(windows)) == 3
    assert len(read) == opened


def video_class():
    from rrvideo.pipeline import Video

    return Video


def test_answers_are_those_of_the_window_watched_by_itself(qa, clip):
    for window in begin(qa, clip):
        with qa.watch(clip, start=window.start, end=window.end - 0.01) as alone:  # the frame at 2 s is not the first's
            assert window["all"] == Finding(alone.ask("Describe.", max_new_tokens=6).text)
            left, right = (
                sum(math.exp(score) for score in alone.score(QUESTIONS["way"], [word, " " + word, Word, " " + Word]))
                for word, Word in (("left", "Left"), ("right", "Right"))
            )
            yes, no = (
                sum(math.exp(score) for score in alone.score(RED, [word, " " + word, Word, " " + Word]))
                for word, Word in (("yes", "Yes"), ("no", "No"))
            )
        assert window["way"].value == ("left" if left > right else "right")
        assert window["way"].probability == pytest.approx(max(left, right) / (left + right), rel=1e-4)
        assert window["red"].value == (yes >= no)
        assert window["red"].probability == pytest.approx(yes / (yes + no), rel=1e-4)


class Letters:
    """A tokenizer with a token for each letter."""

    def encode(self, text, *, add_special_tokens):
        assert not add_special_tokens
        return [ord(letter) for letter in text]


def chosen(kind, chances):
    """What is found where the answer begins with each text with the chance that `chances` gives, or nearly never."""
    fake = SimpleNamespace(score=lambda question, replies: [math.log(chances.get(text, 1e-9)) for text in replies])
    return scan._choose(fake, Query.of("name", "Question?", kind), Letters())


@pytest.mark.parametrize(
    ("kind", "chances", "value", "probability"),
    [
        ("yes/no", {"yes": 0.3, "Yes": 0.2, " yes": 0.1, "no": 0.2}, True, 0.75),
        ("yes/no", {"yes": 0.1, "No": 0.3, " No": 0.1}, False, 0.2),
        ("yes/no", {"yes": 0.001, "no": 0.003}, False, 0.25),  # where other answers are likelier than both
        ("left|right", {"right": 0.3, "Left": 0.1}, "right", 0.75),
        ("red|red circle", {"red": 0.5, "red circle": 0.4}, "red circle", 0.8),  # red alone has 0.1
        ("1|10|100", {"1": 0.8, "10": 0.5, "100": 0.1}, "10", 0.5),
        ("yes|no", {"no": 0.9, "yes": 0.1}, "no", 0.9),  # a choice of labels is not a bool
    ],
)
def test_labels_are_weighed_by_how_probable_the_answer_begins_with_each(kind, chances, value, probability):
    found = chosen(kind, chances)

    assert (found.value, found.probability) == (value, pytest.approx(probability, abs=1e-5))


def test_very_improbable_labels_can_still_be_told_apart():
    fake = SimpleNamespace(score=lambda question, replies: [-2000.0 - ("no" in text.lower()) for text in replies])
    found = scan._choose(fake, Query.of("name", "Question?", "yes/no"), Letters())

    assert found.probability == pytest.approx(1 / (1 + math.exp(-1)))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3", 3),
        ("There are 12 people, 3 of them seated.", 12),
        ("-4.5 degrees", -4.5),
        ("1,234,567 views", 1234567),
        ("about 55km", 55),
        ("3-4", 3),
        ("none", None),
        ("", None),
        ("at 0:42", None),
        ("B2", None),
        ("10,5", None),  # ten and a half, or ten and five?
        ("version 1.2.3", None),
    ],
)
def test_a_number_is_read_or_there_is_none(text, number):
    assert scan._read(text, Query.of("count", "How many?", "number")) == Finding(number)


@pytest.mark.parametrize(
    ("text", "name", "kind", "question"),
    [
        ("goal=yes/no: Is a goal scored?", "goal", "yes/no", "Is a goal scored?"),
        (" way = left | right:Which way?", "way", "left|right", "Which way?"),
        ("n=number: At 1:30, how many?", "n", "number", "At 1:30, how many?"),
        ("what=text: Name=value: what?", "what", "text", "Name=value: what?"),
    ],
)
def test_a_question_is_read_from_one_argument(text, name, kind, question):
    assert parse_query(text) == Query.of(name, question, kind)
    assert parse_query(text).kind == kind


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Is a goal scored?", "NAME=KIND: QUESTION"),
        ("goal=yes/no:", "NAME=KIND: QUESTION"),
        ("goal=maybe: Is it?", "at least two different labels; got 'maybe'"),
        ("way=left|Left: Which?", "at least two different labels"),
        ("way=left|: Which?", "at least two different labels"),
        ("start=text: What?", "are taken"),
    ],
)
def test_a_question_that_cannot_be_read_says_why(text, told):
    with pytest.raises(ValueError, match=told.replace("|", r"\|")):
        parse_query(text)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"every": 0}, "every must be a number of seconds above 0, got 0"),
        ({"window": math.inf}, "window must be"),
        ({"questions": {}, "schema": {}}, "at least one question"),
        ({"schema": {"colour": "text"}}, "schema names colour"),
        ({"questions": {"a": RED, "a_probability": "Why?"}, "schema": {"a": "yes/no"}}, "are named a_probability"),
    ],
)
def test_what_makes_no_scan_is_refused_before_anything_is_watched(qa, clip, watched, options, told):
    with pytest.raises(ValueError, match=told):
        begin(qa, clip, **options)
    with pytest.raises(TypeError, match="frames_per_second"):
        begin(qa, clip, frames_per_second=2)
    with pytest.raises(VideoError, match="the scan starts at 7 s, but the video is 0:06 long"):
        begin(qa, clip, start=7)
    assert watched == []


def test_questions_without_names_are_their_own_and_answered_with_text(qa, clip):
    window = next(begin(qa, clip, ["Describe.", "Why?"], schema=None))

    assert isinstance(window["Why?"].value, str)
    assert [*window.answers] == ["Describe.", "Why?"]


def test_a_window_without_frames_has_an_error_and_no_answers(qa, tmp_path):
    pts = [*range(48), *range(144, 192)]  # two seconds, four that are lost, and two more
    path = write_video(tmp_path / "hole.mp4", numbered_frames(96, width=84, height=56), pts=pts)
    windows = list(begin(qa, path))

    assert [window.error for window in windows] == ["", *["no frame lies in this window"] * 2, ""]
    assert windows[1].answers == windows[2].answers == dict.fromkeys(QUESTIONS, Finding(None))
    assert windows[3]["red"].probability is not None
    assert windows[3].warnings == ()  # the hole is known of the whole file, and not news of this window


def test_so_has_one_whose_nearest_keyframe_lies_elsewhere(qa, tmp_path):
    path = write_video(tmp_path / "long.mp4", numbered_frames(144, width=84, height=56), gop=96)
    windows = list(begin(qa, path, sampling="keyframes"))

    assert max(video.plan_samples(path, sampling="keyframes").times) < 4
    assert [bool(window.error) for window in windows] == [False, False, True]


def test_so_has_one_whose_frames_cannot_be_decoded_and_the_others_go_on(qa, clip, monkeypatch):
    def lossy(index, frames, **options):
        for number, image in video.read_pyav(index, frames, **options):
            if not 48 <= number < 96 and number != 45:
                yield number, image

    monkeypatch.setitem(video.READERS, "pyav", lossy)
    windows = list(begin(qa, clip, fps=12.0))

    assert "can be decoded" in windows[1].error
    assert windows[1]["red"] == Finding(None)
    assert [bool(window.error) for window in windows] == [False, True, False]
    assert windows[0].warnings == ("1 of 24 frames could not be decoded, at 0:01",)
    assert windows[2].warnings == ()


def test_the_embedded_model_finds_what_is_in_the_sample_and_when():
    scenes = sample_world().scenes
    thing = f"{scenes[1].colour} {scenes[1].shape}"
    qa = VideoQA.load("tiny")
    questions = {"there": f"Is there a {thing}?", "first": "What appears first?"}
    windows = list(qa.scan(cli.SAMPLE, questions, schema={"there": "yes/no"}, every=12, window=12))

    assert len(windows) == 5
    for window in windows:
        seen = min(window.end, scenes[1].end) - max(window.start, scenes[1].start)
        if not 0 < seen < 2:  # of a scene that ends as the window begins there may be no frame, or one
            assert window["there"].value == (seen > 0)
            assert (window["there"].probability > 0.9) == (seen > 0)


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
