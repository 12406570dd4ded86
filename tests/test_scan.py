"""Scans: which windows there are, and what each answer means."""

import math
from fractions import Fraction
from types import SimpleNamespace

import pytest
from clips import numbered_frames, write_video
from scanning import QUESTIONS, RED, begin, note_watched, video_class

from rrvideo import VideoQA, cli, frameindex, readers, scan, video
from rrvideo.errors import VideoError
from rrvideo.scan import Finding, Query, parse_query
from rrvideo.tiny.sample import sample_world


@pytest.fixture(scope="module")
def qa(folder):
    return VideoQA.load(folder, attention="full", device="cpu")


@pytest.fixture
def watched(monkeypatch):
    return note_watched(monkeypatch)


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


@pytest.mark.parametrize("early", range(25))
def test_a_frame_near_the_border_of_two_windows_is_seen_in_one_of_them(qa, tmp_path, early):
    second = 24000
    pts = [0, second, 2 * second - early, 3 * second, 4 * second]
    path = write_video(
        tmp_path / "slides.mp4", numbered_frames(5, width=84, height=56), pts=pts, time_base=Fraction(1, second)
    )
    index = frameindex.scan(path)
    assert index.times[2] == pytest.approx(2 - early / second, abs=1e-6)
    seen = []
    for start, end in ((0, 2), (2, 4)):
        before = scan.last_moment(index, end)
        first, last = video._frames_within(index, start, before)
        seen += range(first, last + 1)
    assert seen == [0, 1, 2, 3]


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
        ("9" * 400, None),
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


def test_one_question_may_come_by_itself(qa, clip):
    assert begin(qa, clip, "What moves?", schema=None).queries == begin(qa, clip, ["What moves?"], schema=None).queries


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
