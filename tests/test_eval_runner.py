"""Runs: each video is watched once, what cannot be seen is not answered, and what is asked is what was settled."""

import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from videomme import write_set

from rrattention import RRConfig
from rrattention.config import MIN_TOKENS
from rreval.data import load_set
from rreval.journal import Journal, Record, begin_run, read_run
from rreval.runner import check_same, deal, run, unanswered
from rreval.settings import DEFAULTS, LABELS, PRESETS, RunSettings, choices_of, config_of
from rrvideo import VideoQA
from rrvideo.errors import RRVideoError
from rrvideo.pipeline import Video

LETTER = (
    "Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)


@pytest.fixture(scope="module")
def qa(tmp_path_factory):
    return VideoQA.load(make_checkpoint(tmp_path_factory.mktemp("model")), attention="full", device="cpu")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set") / "set")


@pytest.fixture
def items(whole):
    return load_set(whole)


@pytest.fixture
def calls(monkeypatch):
    """The names of the files that are watched and the prompts that are asked, in order."""
    found = []
    watch, ask = VideoQA.watch, Video.ask
    monkeypatch.setattr(
        VideoQA, "watch", lambda self, path, **rest: found.append(path.name) or watch(self, path, **rest)
    )
    monkeypatch.setattr(Video, "ask", lambda self, text, **rest: found.append(text) or ask(self, text, **rest))
    return found


def settled(qa, items, **choices):
    return RunSettings.of(qa, DEFAULTS | {"max_new_tokens": 4} | choices, items, model="m", dataset="d")


def answers(qa, items, folder, settings=None, **rest):
    settings = settings or settled(qa, items)
    begin_run(folder, settings.to_dict(), labels=LABELS)
    with Journal(folder) as journal:
        return list(run(qa, items, settings, journal, **rest))


def test_answers_are_those_of_the_video_watched_and_asked_by_hand(qa, items, tmp_path):
    records = answers(qa, items, tmp_path)

    assert read_run(tmp_path).records == records
    for item, mine in zip(items, (records[i : i + 3] for i in range(0, 9, 3)), strict=True):
        with qa.watch(item.path) as video:
            for row, record in zip(item.rows, mine, strict=True):
                text = "\n".join([LETTER, row.question, *row.options, "The best answer is:"])
                answer = video.ask(text, max_new_tokens=4)
                assert record.response == answer.text
                assert record.error is None
                assert record.warnings == video.warnings
                assert record.density == answer.density
                assert {name: getattr(record, name) for name in answer.usage.to_dict()} == answer.usage.to_dict()
                assert list(record.seconds) == ["decode", "encode", "prefill", "generate"]
                for name in (
                    "question_id",
                    "video_id",
                    "videoID",
                    "duration",
                    "domain",
                    "task_type",
                    "options",
                    "answer",
                ):
                    assert getattr(record, name) == getattr(row, name)


def test_a_run_does_not_go_on_with_other_videos_or_subtitles_that_have_come_since(qa, items, tmp_path):
    settings = settled(qa, items, subtitles=True)
    silent = replace(items[1], path=Path(shutil.copy(items[1].path, tmp_path / "b.mp4")), subtitle=None)
    some = [items[0], silent, replace(items[2], path=tmp_path / "none.mp4")]
    records = answers(qa, some, tmp_path / "run", settings)
    assert [record.subtitled for record in records[::3]] == [True, False, None]
    assert [record.video_bytes for record in records[::3]] == [each.path.stat().st_size for each in some[:2]] + [None]

    check_same([*items[:1], silent, items[2]], records, subtitles=True)  # the third could not be watched
    spoken = replace(silent, subtitle=items[0].subtitle)
    check_same([spoken], records, subtitles=False)
    with pytest.raises(
        RRVideoError, match=r"asked about 002 without subtitles, and now there are some .move them away"
    ):
        check_same([items[0], spoken], records, subtitles=True)
    shutil.copy(items[2].path, silent.path)
    with pytest.raises(
        RRVideoError, match=r"b\.mp4 is not the video that the run has watched as 002 .put that one back"
    ):
        check_same([silent], records, subtitles=True)
    silent.path.unlink()
    check_same([silent], records, subtitles=True)  # told elsewhere


def test_a_video_is_watched_once_and_closed_before_the_next(qa, items, tmp_path, calls, monkeypatch):
    close = Video.close
    monkeypatch.setattr(Video, "close", lambda self: calls.append("closed") or close(self))
    answers(qa, items, tmp_path)
    kinds = ["closed" if each == "closed" else "watch" if each.endswith(".mp4") else "ask" for each in calls]

    assert kinds == ["watch", "ask", "ask", "ask", "closed"] * 3


def test_subtitles_of_the_sampled_frames_stand_in_the_prompt_where_there_are_any(qa, items, tmp_path, calls):
    subtitle = tmp_path / "two.srt"
    # The four frames of the first video are shown at 0, 8/12, 15/12 and 23/12 seconds.
    times = ("00,000 --> 00:00:00,100", "00,100 --> 00:00:00,600", "01,000 --> 00:00:01,300", "01,950 --> 00:00:09,000")
    subtitle.write_text("\n\n".join(f"{n}\n00:00:{time}\nline {n}" for n, time in enumerate(times, start=1)))
    items = [replace(items[0], subtitle=subtitle), items[1]]
    answers(qa, items, tmp_path / "with", settled(qa, items, subtitles=True))
    prompts = [each for each in calls if not each.endswith(".mp4")]

    assert all(
        each.startswith(f"This video's subtitles are listed below:\nline 1\nline 3\n{LETTER}") for each in prompts[:3]
    )
    assert all(each.startswith(LETTER) for each in prompts[3:])
    calls.clear()
    answers(qa, items, tmp_path / "without")
    assert not any("line 1" in each for each in calls)


def test_a_video_that_cannot_be_seen_is_recorded_with_its_reason_and_never_asked_about(qa, whole, tmp_path, calls):
    shutil.copytree(whole, tmp_path / "set")
    (tmp_path / "set" / "data" / "-clip_1.mp4").unlink()
    (tmp_path / "set" / "data" / "-clip_2.mp4").write_bytes(b"no video")
    records = answers(qa, load_set(tmp_path / "set"), tmp_path / "run")

    assert [record.error is None for record in records] == [False] * 6 + [True] * 3
    assert all("there is no file" in record.error for record in records[:3])
    assert all("cannot be read as a video" in record.error for record in records[3:6])
    assert all(
        (record.response, record.prediction, record.density, record.seconds) == (None,) * 4 for record in records[:6]
    )
    assert sum(LETTER in each for each in calls) == 3


def test_whatever_goes_wrong_with_a_video_the_others_are_asked_and_answers_are_kept(qa, items, tmp_path, monkeypatch):
    ask, asked = Video.ask, []

    def failing(self, text, **options):
        asked.append(text)
        if len(asked) == 2:
            raise RuntimeError("a kernel failed")
        return ask(self, text, **options)

    monkeypatch.setattr(Video, "ask", failing)
    records = answers(qa, items, tmp_path)

    failure = "RuntimeError: a kernel failed"
    assert [record.error for record in records] == [None, failure, failure, *[None] * 6]
    assert read_run(tmp_path).records == records


def test_a_question_that_is_too_long_fails_alone(qa, items, tmp_path):
    first = items[0]
    long = replace(first.rows[1], question="How many? " * 3000)
    records = answers(qa, [replace(first, rows=(first.rows[0], long, first.rows[2]))], tmp_path)

    assert [record.error is None for record in records] == [True, False, True]
    assert "do not fit" in records[1].error


def test_a_journal_that_cannot_be_written_ends_the_run(qa, items, tmp_path, monkeypatch):
    def full(self, record):
        raise RRVideoError("the disk is full")

    monkeypatch.setattr(Journal, "append", full)
    with pytest.raises(RRVideoError, match="the disk is full"):
        answers(qa, items, tmp_path)


def test_what_has_a_record_is_not_asked_again_unless_it_failed_and_is_to_be_retried(items):
    def record(row, **outcome):
        return Record(*[getattr(row, name) for name in list(Record.__slots__)[:10]], **outcome)

    done = [record(row, response="A") for row in items[0].rows]
    done += [record(items[1].rows[0], error="x"), record(items[1].rows[1], response="")]

    def left(**options):
        return [[row.question_id for row in item.rows] for item in unanswered(items, done, **options)]

    assert left() == [["002-3"], ["003-1", "003-2", "003-3"]]
    assert left(retry_failed=True) == [["002-1", "002-3"], ["003-1", "003-2", "003-3"]]


def test_videos_are_dealt_longest_first_and_evenly(items, monkeypatch):
    lengths = {f"{number:03}": float(7 * number % 41 + 1) for number in range(1, 41)}
    many = [replace(items[0], video_id=name) for name in lengths]
    monkeypatch.setattr("rreval.runner.seconds_of", lambda item: lengths[item.video_id])

    assert deal(many, 1) == [many]
    for count in (2, 3, 7, 50):
        hands = deal(many, count)
        assert sorted(item.video_id for hand in hands for item in hand) == sorted(lengths)
        loads = [[lengths[item.video_id] for item in hand] for hand in hands]
        assert all(before >= after for load in loads for before, after in pairwise(load))
        # Graham's bound for dealing so: at most 4/3 of the best that can be done.
        best = max(*lengths.values(), sum(lengths.values()) / count)
        assert max(map(sum, loads)) <= best * 4 / 3
        assert hands == deal(many, count)


@pytest.mark.parametrize("videos", [0, 2])
def test_processes_without_a_video_get_none(items, videos):
    assert [len(hand) for hand in deal(items[:videos], 3)] == [1] * videos + [0] * (3 - videos)


def test_frames_are_as_large_as_the_settings_say(qa, items, tmp_path):
    small = settled(qa, items, min_pixels=28 * 28, max_pixels=6 * 28 * 28)
    records = answers(qa, items[:1], tmp_path / "small", small)

    assert records[0].visual_tokens == 3 * 2 * records[0].frames // 2  # two frames of 84 x 56 are 3 x 2 tokens
    assert answers(qa, items[:1], tmp_path / "own")[0].visual_tokens > records[0].visual_tokens
    with pytest.raises(RRVideoError, match=r"max_pixels must hold min_pixels.*--min-pixels and --max-pixels together"):
        settled(qa, items, min_pixels=10**6, max_pixels=28 * 28)


def test_settings_say_all_that_answers_depend_on(qa, items):
    found = settled(qa, items).to_dict()
    limits = qa.checkpoint.limits

    assert found | {"checkpoint": "", "dataset_digest": "", "versions": {}} == {
        **{"preset": None, "model": "m", "checkpoint": "", "dtype": "float32"},
        **{"attention": "full", "tau": None, "rrattention": {}},
        **{"fps": 1.0, "max_frames": 768, "sampling": "uniform", "fit": False, "reader": "pyav", "timestamps": True},
        **{"min_pixels": limits.min_pixels, "max_pixels": limits.max_pixels, "total_pixels": limits.total_pixels},
        **{"subtitles": False, "max_new_tokens": 4, "dataset": "d", "dataset_digest": "", "videos": 3, "questions": 9},
        "versions": {},
    }
    assert set(found["versions"]) == {"rrvideo", "torch", "transformers", "python", "machine"}
    sparse = VideoQA.load(qa.checkpoint.folder, device="cpu")
    found = settled(sparse, items, timestamps=False).to_dict()
    assert (found["attention"], found["tau"], found["timestamps"]) == ("rr", 0.95, False)
    assert (found["rrattention"]["block_size"], found["rrattention"]["stride"]) == (128, 8)
    assert found["rrattention"]["min_tokens"] == MIN_TOKENS["cpu"], "or it went on with another one on a GPU"


@pytest.mark.parametrize(
    ("preset", "attention"), [("qwen2-vl-paper", "full"), ("qwen2.5-vl-paper", "full"), ("rrattention-paper", "rr")]
)
def test_presets_are_the_published_configurations_and_what_is_given_overrides_them(preset, attention):
    choices = choices_of(preset, {"fps": 0.5, "quiet": True})

    assert list(choices) == list(DEFAULTS)
    assert (choices["attention"], choices["tau"], choices["fps"]) == (attention, 0.95, 0.5)
    assert choices_of(preset, {})["fps"] == 2.0
    assert (choices["max_frames"], choices["timestamps"], choices["sampling"]) == (768, False, "uniform")
    tokens = [choices[name] / (28 * 28) for name in ("min_pixels", "max_pixels", "total_pixels")]
    assert tokens == [128, 768, 24576]
    assert PRESETS[preset].source.count("arXiv") == 1
    assert choices_of(None, {"fps": 3.0}) == DEFAULTS | {"fps": 3.0}


def test_the_papers_preset_keeps_blocks_by_the_papers_rule():
    assert config_of(choices_of("rrattention-paper", {})) == RRConfig.paper(0.95)
    assert config_of(choices_of("rrattention-paper", {"rule": "default", "tau": 0.9})) == RRConfig(tau=0.9)
    assert config_of(choices_of(None, {"tau": 0.8})) == RRConfig(tau=0.8)
    assert config_of(choices_of(None, {"rule": "fine", "tau": 0.8})) == RRConfig.fine(0.8)
    weighted = config_of(choices_of(None, {"rule": "fine", "head_weights": ((0.5, 1.5),)}))
    assert weighted == replace(RRConfig.fine(), head_weights=((0.5, 1.5),))


def test_a_run_records_which_weights_of_heads_it_had_by_a_digest(qa, items):
    text = qa.checkpoint.model.config.get_text_config()
    weights = [[1.5, *[0.9] * (text.num_attention_heads - 1)]] * text.num_hidden_layers
    found = [
        settled(qa.attending("rr", RRConfig(head_weights=each)), items).to_dict()["rrattention"]
        for each in (weights, weights, [*weights[1:], weights[0][::-1]], None)
    ]
    assert found[0] == found[1] != found[2]
    assert len(found[0]["head_weights"]) == len(found[2]["head_weights"]) == 16
    assert "head_weights" not in found[3]
    assert "tau" not in found[0]


def test_a_reader_that_is_not_installed_is_told_before_the_run(monkeypatch):
    monkeypatch.setattr("rreval.settings.find_spec", lambda name: None)

    with pytest.raises(RRVideoError, match="decord is not installed"):
        choices_of(None, {"reader": "decord"})
