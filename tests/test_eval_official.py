"""The official result file, and figures like the official scorer's, against a scorer written from its description."""

import json
import re

import pytest
from journals import altered, draw_records, failed, unread

from rreval.journal import Run
from rreval.official import objections, official_letter, official_results
from rreval.report import Report


def official_scores(results, *, videos=300, skip_missing=False):
    """Right and answered of each duration, as the official scorer counts: what it cannot read is in neither."""
    scores = {}
    for duration in ("short", "medium", "long"):
        found = [video for video in results if video["duration"] == duration]
        if not skip_missing:
            assert len(found) == videos, f"Number of files in {duration} is not {videos}."
        right = answered = 0
        for video in found:
            if skip_missing and video["missing"]:
                continue
            for question in video["questions"]:
                assert {"domain", "sub_category"} <= video.keys()
                assert {"question_id", "task_type", "question", "options"} <= question.keys()
                said = question["response"]
                for phrase in ("The best answer is", "The correct answer is", "The answer is", "The answer"):
                    said = said.replace(phrase, "")
                letter = re.findall("A|B|C|D", said)[:1]
                right += letter == [question["answer"]]
                answered += bool(letter)
        scores[duration] = (right, answered)
    return scores


@pytest.fixture(scope="module")
def records():
    found = altered(draw_records(900), (0.04, 0.05))
    found[5] = unread(found[5], "Answer is C")
    found[6] = unread(found[6], "none of them")
    found[7] = unread(found[7], "")
    found[9:12] = [failed(record, "no picture in it") for record in found[9:12]]
    found[12] = failed(found[12], "the prompt is too long")
    return found


@pytest.fixture(scope="module")
def results(records):
    return json.loads(json.dumps(official_results(records)))


def test_the_official_scorer_takes_the_file_and_finds_what_the_report_says(records, results, tmp_path):
    scores = official_scores(results)
    (run,) = Report.of({"run": Run(tmp_path, {}, records)}).runs

    for score in run.groups["duration"]:
        right, answered = scores[score.name]
        assert score.official_answered == answered
        assert score.official.value == right / answered
    assert run.overall.official_answered == sum(answered for _, answered in scores.values()) == 2700 - 2 - 4
    assert run.overall.failed == 4
    assert run.overall.unparsed == 3


def test_the_file_holds_every_question_in_its_place_and_every_response_as_it_was_written(records, results):
    assert len(results) == 900
    assert [len(video["questions"]) for video in results] == [3] * 900
    assert [video["video_id"] for video in results] == sorted({record.video_id for record in records})
    assert results[0].keys() == {"video_id", "duration", "domain", "sub_category", "missing", "questions"}
    by_id = {record.question_id: record for record in records}
    for video in results:
        for question in video["questions"]:
            record = by_id[question["question_id"]]
            assert record.video_id == video["video_id"]
            assert question["response"] == (record.response or "")
            assert question["options"] == list(record.options)
            assert question["answer"] == record.answer


def test_the_order_in_which_questions_were_answered_does_not_show(records, results):
    assert official_results(records[::-1]) == results


def test_only_a_video_about_which_nothing_could_be_asked_is_missing(results):
    assert [video["video_id"] for video in results if video["missing"]] == ["004"]
    assert official_scores(results, skip_missing=True) == official_scores(results)


def test_the_scorer_refuses_a_file_with_fewer_videos_and_so_it_is_told(records, results):
    assert objections(results) == []
    fewer = official_results([record for record in records if record.video_id != "001"])

    with pytest.raises(AssertionError, match="Number of files in short is not 300"):
        official_scores(fewer)
    assert objections(fewer) == ["299 of 300 short videos are there"]
    assert len(objections([])) == 3


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("C", "C"),
        (" (B).", "B"),
        ("The answer is D", "D"),
        ("The best answer is: B", "B"),
        ("Answer is C", "A"),
        ("The best option is D", "D"),
        ("Best answer: C", "B"),
        ("b", ""),
        ("", ""),
        ("I see a dog that runs over a wide green lawn, and then no more", ""),
        ("I cannot say. But it may be a dog", "B"),
    ],
)
def test_letters_are_read_as_the_official_scorer_reads_them(response, letter):
    assert official_letter(response) == letter
