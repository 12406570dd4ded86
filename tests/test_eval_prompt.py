"""The official prompt, and subtitles at the times of the frames."""

import pytest

from rreval.data import Row
from rreval.prompt import prompt
from rreval.subtitles import Subtitle, read_subtitles, spoken_at
from rrvideo.errors import RRVideoError
from rrvideo.tiny.world import MULTIPLE_CHOICE

ROW = Row(
    video_id="001",
    duration="short",
    domain="Knowledge",
    sub_category="Astronomy",
    url="",
    videoID="x",
    question_id="001-1",
    task_type="Counting Problem",
    question="How many moons?",
    options=("A. One.", "B. Two.", "C. Three.", "D. Four."),
    answer="B",
)


def test_the_prompt_is_the_official_one_word_for_word():
    assert prompt(ROW, ["Look up!", "{Two} moons."]) == (
        "This video's subtitles are listed below:\n"
        "Look up!\n"
        "{Two} moons.\n"
        "Select the best answer to the following multiple-choice question based on the video. "
        "Respond with only the letter (A, B, C, or D) of the correct option.\n"
        "How many moons?\n"
        "A. One.\n"
        "B. Two.\n"
        "C. Three.\n"
        "D. Four.\n"
        "The best answer is:"
    )


def test_without_subtitles_the_prompt_is_the_one_that_the_embedded_model_was_trained_with():
    assert prompt(ROW) == MULTIPLE_CHOICE.format(question=ROW.question, options="\n".join(ROW.options))


OFFICIAL = """1
00:00:01,500 --> 00:00:03,000
<font color="white" size=".72c">in the year</font>

2
00:00:03,000 --> 00:00:04,250
<font color="white" size=".72c">1969 (3 < 5)</font>
"""
TWO = [Subtitle(1.5, 3.0, "in the year"), Subtitle(3.0, 4.25, "1969 (3 < 5)")]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(OFFICIAL.encode(), TWO, id="official"),
        pytest.param(OFFICIAL.replace("\n", "\r\n").encode("utf-8-sig"), TWO, id="windows"),
        pytest.param(OFFICIAL.replace("\n\n", "\n").encode(), TWO, id="no-empty-lines"),
        pytest.param(OFFICIAL.removeprefix("1\n").replace("2\n", "").encode("utf-8-sig"), TWO, id="no-numbers"),
        pytest.param(OFFICIAL.replace(",", ".").replace("00:00", "00").encode(), TWO, id="as-vtt"),
        pytest.param("\n\n".join(reversed(OFFICIAL.split("\n\n"))).encode(), TWO, id="out-of-order"),
        pytest.param(
            b"1\n01:02:03,004 --> 01:02:05,000 X1:0 Y1:0\n{\\an8}<i>two</i>\n  lines \n\n2\n1:0:0,5 --> 1:0:1,0\n\n",
            [Subtitle(3723.004, 3725.0, "two lines")],
            id="markup-lines-and-nothing-said",
        ),
        pytest.param(
            "1\n00:00:00,000 --> 00:00:01,000\ncaf\xe9".encode("cp1252"), [Subtitle(0, 1, "café")], id="cp1252"
        ),
        pytest.param(b"", [], id="empty"),
    ],
)
def test_subtitles_are_read_as_people_wrote_them(tmp_path, content, expected):
    path = tmp_path / "x.srt"
    path.write_bytes(content)

    assert read_subtitles(path) == expected


def test_what_is_no_subtitle_file_is_an_error(tmp_path):
    (tmp_path / "x.srt").write_bytes(b"<html>404</html>")

    with pytest.raises(RRVideoError, match=r"x\.srt is no \.srt file"):
        read_subtitles(tmp_path / "x.srt")
    with pytest.raises(RRVideoError, match=r"y\.srt cannot be read"):
        read_subtitles(tmp_path / "y.srt")


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([0.0], []),
        ([1.0], ["a"]),
        ([1.999, 2.0], ["a", "b"]),
        ([2.0], ["b"]),  # a subtitle has gone when it ends
        ([3.5, 3.6, 3.9], ["b", "c"]),  # each once
        ([3.9, 1.0], ["a", "b", "c"]),  # in their order
        ([5.0, 90.0], []),
        ([], []),
    ],
)
def test_only_subtitles_that_are_on_screen_at_a_sampled_frame_are_given(times, expected):
    subtitles = [Subtitle(1, 2, "a"), Subtitle(2, 4, "b"), Subtitle(3.5, 5, "c")]

    assert spoken_at(subtitles, times) == expected
