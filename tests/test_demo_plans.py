"""What is told of a plan before anything is decoded, and how numbers are written."""

from types import SimpleNamespace

import pytest

from rrdemo import plans, words
from rrdemo.conversation import Settings
from rrvideo.budget import Budget


def planned(settings, *, frames, wanted, own=30.0):
    """What the view says where `wanted` frames would follow from the frame rate, of a video with `own` a second."""
    need = Budget(wanted, frames, 28, 28, frames, frames, frames, 4096, 512, True, frames, 1, 1000, 500)
    info = SimpleNamespace(fps=own)
    chosen = SimpleNamespace(times=tuple(map(float, range(frames))), start=0.0, end=60.0, info=info, warnings=("w",))
    return plans.view(chosen, need, settings, memory=1500, watched=False)


@pytest.mark.parametrize(
    ("settings", "frames", "wanted", "told"),
    [
        (Settings(max_frames=768), 768, 1800, ["the frame rate asks for 1,800 frames: 768 are the most"]),
        (Settings(max_frames=7), 6, 60, ["the frame rate asks for 60 frames: 7 are the most"]),
        (
            Settings(max_frames=768, sampling="keyframes"), 768, 1800,
            ["the frame rate asks for 1,800 frames: 768 are the most"],
        ),
        (Settings(fps=60.0, sampling="keyframes"), 180, 1800, []),
        (Settings(fps=60.0), 600, 1200, ["the video itself has only 30 frames a second: 600 are taken"]),
        (Settings(), 60, 60, []),
        (Settings(), 60, 61, []),
        (Settings(), 500, 700, []),
    ],
    ids=["most", "odd most", "most keyframes", "no more keyframes", "video", "none", "rounded", "context"],
)  # fmt: skip
def test_why_there_are_fewer_frames_than_the_frame_rate_asks_for_is_told_as_it_is(settings, frames, wanted, told):
    assert planned(settings, frames=frames, wanted=wanted).warnings == (*told, "w")


def test_the_longest_gap_is_the_interval_and_a_single_frame_stands_for_the_clip():
    assert planned(Settings(), frames=4, wanted=4).interval == 1.0
    assert planned(Settings(), frames=1, wanted=1).interval == 60.0


def test_numbers_and_sentences_are_written_as_people_write_them():
    assert [words.counted(number, "frame") for number in (1, 2, 1620)] == ["1 frame", "2 frames", "1,620 frames"]
    assert words.counted(2, "person is", "people are") == "2 people are"
    assert [words.spacing(seconds) for seconds in (0.26667, 2.0, 12.345, 1800.0)] == [
        "0.267 s", "2 s", "12.3 s", "1,800 s",
    ]  # fmt: skip
    assert [words.spread(count, 1800.0) for count in (1, 2)] == ["1 frame", "2 frames, at most 1,800 s apart"]
    assert [words.elapsed(seconds) for seconds in (0.027, 1.24, 1234.5)] == ["27 ms", "1.2 s", "1,234.5 s"]
    assert [*map(words.sentence, ("the video was put away", "film.mp4 is damaged", "x-1 is", "24 frames", ""))] == [
        "The video was put away", "film.mp4 is damaged", "x-1 is", "24 frames", "",
    ]  # fmt: skip
