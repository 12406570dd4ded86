"""Reports of runs that were made up, against counts made another way."""

import json
import os
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from journals import SETTINGS, altered, draw_records, failed, unread, write_run

from rreval.journal import Run
from rreval.render import as_json, as_markdown, as_text
from rreval.report import Report, read_runs
from rrvideo import cli
from rrvideo.errors import RRVideoError


@pytest.fixture(scope="module")
def full():
    return draw_records(30)


@pytest.fixture(scope="module")
def sparse(full):
    found = altered(full, (0.1, 0.12))
    found[4] = unread(found[4], "I am not\nsure | about \x1b[31mthat. Answer")
    found[7] = unread(found[7], "")
    found[9:12] = [failed(record, "no picture in it") for record in found[9:12]]
    found[20] = replace(found[20], warnings=("12 of 240 frames could not be decoded",))
    return found


def report_on(*runs, **options):
    return Report.of(
        {f"run{number}": Run(None, SETTINGS, records) for number, records in enumerate(runs, start=1)}, **options
    )


@pytest.fixture(scope="module")
def both(full, sparse):
    settings = SETTINGS | {"attention": "rr", "questions": 2700}
    return Report.of({"sparse": Run(None, settings, sparse), "full": Run(None, SETTINGS, full)})


def test_what_has_no_letter_and_what_could_not_be_asked_is_wrong(sparse):
    (run,) = report_on(sparse).runs
    right = [record.prediction == record.answer for record in sparse]

    assert (run.overall.questions, run.overall.videos, run.overall.correct) == (90, 30, sum(right))
    assert run.overall.accuracy.value == sum(right) / 90
    assert run.overall.accuracy.low < run.overall.accuracy.value < run.overall.accuracy.high
    assert (run.overall.unparsed, run.overall.failed) == (2, 3)


def test_every_group_has_its_questions_and_together_they_are_all(sparse):
    (run,) = report_on(sparse).runs

    assert [score.name for score in run.groups["duration"]] == ["short", "medium", "long"]
    assert set(run.groups) == {"duration", "domain", "sub_category", "task_type"}
    for field, scores in run.groups.items():
        for name in ("questions", "correct", "unparsed", "failed", "official_answered"):
            assert sum(getattr(score, name) for score in scores) == getattr(run.overall, name)
        for score in scores:
            mine = [record for record in sparse if getattr(record, field) == score.name]
            assert score.accuracy.value == np.mean([record.prediction == record.answer for record in mine])
            assert score.videos == len({record.video_id for record in mine})


def test_answers_without_a_letter_are_listed_with_what_the_official_scorer_reads(both):
    run = next(run for run in both.runs if run.name == "sparse")

    assert [(each.question_id, each.official) for each in run.unparsed] == [("002-2", "A"), ("003-2", "")]
    assert run.unparsed[0].response == "I am not\nsure | about \x1b[31mthat. Answer"


def test_what_could_not_be_asked_is_listed_with_its_reason(sparse):
    sparse = [*sparse[:12], failed(sparse[12], "the prompt is too long"), *sparse[13:]]
    (run,) = report_on(sparse).runs

    assert [(each.video_id, each.questions, each.reason) for each in run.failures] == [
        ("004", ("004-1", "004-2", "004-3"), "no picture in it"),
        ("005", ("005-1",), "the prompt is too long"),
    ]
    assert len(run.watches) == 29  # two questions about the fifth video were answered


def test_costs_are_medians_over_videos_and_over_answers(full):
    fewer = [record for record in full if record.video_id > "020" or record.question_id.endswith("1")]
    (run,) = report_on(fewer).runs
    whole, short, *_ = run.costs
    firsts = [record for record in full if record.question_id.endswith("1")]

    assert [cost.name for cost in run.costs] == ["all", "short", "medium", "long"]
    assert whole.videos == 30
    for stage in ("decode", "encode", "prefill"):
        assert whole.seconds[stage].median == pytest.approx(np.median([each.seconds[stage] for each in firsts]))
    assert whole.visual_tokens.p95 == pytest.approx(np.percentile([each.visual_tokens for each in firsts], 95))
    assert whole.seconds["generate"].median == pytest.approx(np.median([each.seconds["generate"] for each in fewer]))
    assert short.density == 1.0


def test_of_a_video_that_a_resumed_run_watched_again_the_first_watch_counts(full):
    again = replace(full[2], seconds=full[2].seconds | {"prefill": 1e6})
    (run,) = report_on([*full[:2], again, *full[3:]]).runs

    assert run.watches[0].prefill == full[0].seconds["prefill"]


def test_a_comparison_counts_what_only_one_run_has_right(both, full, sparse):
    (comparison,) = both.comparisons
    first, second = ([record.prediction == record.answer for record in run] for run in (full, sparse))
    lost = [a.question_id for a, was, now in zip(full, first, second, strict=True) if was and not now]
    gained = [a.question_id for a, was, now in zip(full, first, second, strict=True) if now and not was]

    assert (comparison.baseline, comparison.other) == ("full", "sparse")
    assert (comparison.overall.gained, comparison.overall.lost) == (len(gained), len(lost))
    assert [flip.question_id for flip in comparison.flips if flip.gained] == gained
    assert [flip.question_id for flip in comparison.flips if not flip.gained] == lost
    assert comparison.overall.difference.value == pytest.approx((sum(second) - sum(first)) / 90)
    assert comparison.kept.value == pytest.approx(sum(second) / sum(first))
    assert comparison.kept.low < comparison.kept.value < comparison.kept.high
    assert comparison.agreeing == sum(a.prediction == b.prediction for a, b in zip(full, sparse, strict=True))
    assert comparison.settings == {"attention": ("full", "rr"), "questions": (None, 2700)}


def test_paired_runs_are_told_apart_more_sharply_than_each_is_known(both):
    (comparison,) = both.comparisons
    difference, accuracy = comparison.overall.difference, comparison.baseline_accuracy

    assert difference.high - difference.low < 0.8 * (accuracy.high - accuracy.low)


def test_a_run_equals_itself(full):
    (comparison,) = report_on(full, full).comparisons

    assert comparison.overall.difference.value == 0
    assert comparison.overall.difference.low is None
    assert (comparison.kept.value, comparison.p, comparison.flips, comparison.agreeing) == (1, 1, (), 90)


def test_runs_are_compared_over_the_questions_that_both_hold(full, sparse):
    (comparison,) = report_on(full[:60], sparse[30:]).comparisons

    assert comparison.overall.questions == 30
    assert comparison.left_out == 60
    assert comparison.baseline_accuracy.value == np.mean([each.prediction == each.answer for each in full[30:60]])


def test_the_baseline_is_the_one_named_or_the_first_with_full_attention_or_the_first(full):
    full = full[:9]
    runs = {name: Run(None, {"attention": name[:2]}, full) for name in ("rr-1", "rr-2")}

    assert Report.of(runs).baseline == "rr-1"
    assert Report.of(runs | {"full": Run(None, {"attention": "full"}, full)}).baseline == "full"
    named = Report.of(runs, baseline="rr-2")
    assert [(each.baseline, each.other) for each in named.comparisons] == [("rr-2", "rr-1")]


def test_runs_over_different_sets_are_refused(full):
    other = [replace(full[0], question="Something else?"), *full[1:]]

    with pytest.raises(RRVideoError, match="question 001-1 of run1 and run2 is not the same"):
        report_on(full, other)
    with pytest.raises(RRVideoError, match="run1 and run2 have no question in common"):
        report_on(full[:3], full[3:])
    with pytest.raises(RRVideoError, match="run2 holds no answers yet"):
        report_on(full, [])


def test_a_run_in_which_nothing_could_be_asked_is_still_reported(full):
    report = report_on([failed(record, "gone") for record in full], full)

    assert report.runs[0].overall.accuracy.value == 0
    assert report.runs[0].overall.official.value is None
    assert report.runs[0].costs == ()
    assert "gone" in as_text(report)
    assert json.loads(as_json(report))["comparisons"][0]["kept"]["value"] is None


def test_json_has_everything_and_nothing_that_json_does_not_know(both):
    document = json.loads(as_json(both), parse_constant=pytest.fail)

    assert document["runs"][0]["overall"]["accuracy"]["value"] == both.runs[0].overall.accuracy.value
    assert document["comparisons"][0]["flips"][0].keys() >= {"question_id", "answer", "baseline", "other"}
    assert len(document["runs"][0]["watches"]) == 29
    assert document["resamples"] == 10_000


def test_text_has_the_figures_in_columns_and_nothing_that_a_terminal_obeys(both):
    text = as_text(both)

    assert re.search(r"^sparse +30 +90 of 2,700 +45 +50\.0 \(", text, re.MULTILINE)
    assert re.search(r"^full +30 +90 +50 +55\.6 \(", text, re.MULTILINE)
    assert "\x1b" not in text
    assert "\\x1b[31mthat. Answer" in text
    for line, following in pairwise(text.splitlines()):  # figures end where the ones above them do
        if line.startswith("duration ") and following.startswith("duration "):
            assert len(line) == len(following)


def test_text_shows_the_beginning_of_a_long_list(full):
    text = as_text(report_on([unread(record, "?") for record in full]))

    assert text.count("(empty)") + text.count(" ?") == 20
    assert "and 70 more: --markdown, --json and --html have them" in text


def test_every_row_of_a_markdown_table_has_the_cells_that_its_header_has(both):
    tables = re.findall(r"(?:^\|.*\n?)+", as_markdown(both), re.MULTILINE)

    assert len(tables) > 7
    for table in tables:
        lines = [len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()]
        assert len(set(lines)) == 1
    assert "sure \\| about" in as_markdown(both)


def test_runs_are_named_by_their_folders_or_by_their_paths_where_these_are_alike(full, tmp_path):
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "c"]
    for folder in folders:
        write_run(folder, full[:3])
    runs = read_runs([*folders, tmp_path / "b" / ".." / "c"])

    assert list(runs) == [str(folders[0]), str(folders[1]), "c"]
    assert [record.question_id for record in runs["c"].records] == ["001-1", "001-2", "001-3"]


@pytest.fixture(scope="module")
def folders(full, sparse, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [str(write_run(folder / "sparse", sparse, attention="rr")), str(write_run(folder / "full", full))]


def test_the_command_prints_one_form_and_writes_the_others(folders, tmp_path, capsys):
    assert cli.main(["eval", "report", *folders, "--json", "--html", str(tmp_path / "page.html")]) == 0
    document = json.loads(capsys.readouterr().out)

    assert document["baseline"] == "full"
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert cli.main(["eval", "report", folders[1], "--baseline", folders[0], "--markdown"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# Video-MME\n\nOn 90 questions full has ")
    assert "## full against sparse" in out
    assert cli.main(["eval", "report", folders[0]]) == 0
    assert capsys.readouterr().out.startswith("RUNS\n")


def test_the_command_writes_the_official_file_of_one_run_and_says_what_it_lacks(folders, tmp_path, capsys):
    path = tmp_path / "official.json"
    assert cli.main(["eval", "report", folders[0], "--official", str(path)]) == 0
    told = capsys.readouterr().err

    assert len(json.loads(path.read_text())) == 30
    assert "will not take" in told
    assert "10 of 300 short videos are there" in told
    assert cli.main(["eval", "report", *folders, "--official", str(path)]) == 1
    assert "--official writes one run" in capsys.readouterr().err


def test_what_cannot_be_read_or_written_is_told_in_one_line(folders, tmp_path, capsys):
    assert cli.main(["eval", "report", str(tmp_path / "nothing")]) == 1
    assert cli.main(["eval", "report", folders[0], "--html", str(tmp_path / "no" / "page.html")]) == 1
    told = capsys.readouterr().err

    assert "holds no run" in told
    assert "page.html cannot be written: No such file" in told
    assert "Traceback" not in told


def test_a_response_that_is_no_text_at_all_is_reported(full, tmp_path, capsys):
    folder = write_run(tmp_path / os.fsdecode(b"run\xff"), [unread(full[0], "\ud83c \x00 <b>"), *full[1:]])

    for form in ("--json", "--markdown"):
        assert cli.main(["eval", "report", str(folder), form, "--html", str(tmp_path / "page.html")]) == 0
        assert "run\\" in capsys.readouterr().out.encode().decode()
    assert cli.main(["eval", "report", str(folder), "--official", str(tmp_path / "official.json")]) == 0
    assert "run\\udcff" in (tmp_path / "page.html").read_text(encoding="utf-8")
