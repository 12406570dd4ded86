"""`rrvideo bench engine`, end to end at tiny sizes: its parts run, and what they say adds up."""

import json
import os

import pytest

from rrvideo import bench, bench_engine, budget, measuring
from rrvideo.frameindex import scan


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(monkeypatch, capsys, cache):
    def run(*arguments):
        command = ["rrvideo bench", "engine", "--scale", "0.02", "--repeats", "1", "--cache", str(cache), *arguments]
        monkeypatch.setattr("sys.argv", command)
        with pytest.raises(SystemExit) as exited:
            bench.main()
        assert exited.value.code == 0
        printed = capsys.readouterr().out
        return printed, json.loads(printed.splitlines()[-1])

    return run


def test_each_part_runs_and_its_figures_add_up(run, tmp_path, monkeypatch):
    def in_this_process(peak_of_watch, path, frames, seconds, chunk):
        assert scan(path).duration == pytest.approx(seconds)
        return peak_of_watch(path, frames, seconds, chunk)

    monkeypatch.setattr(bench_engine, "apart", in_this_process)
    monkeypatch.setattr(bench_engine, "LOOP", 100)  # of which there are two seconds
    for size in ("CHUNK_FRAMES", "CHUNK_TOKENS"):
        monkeypatch.setattr(budget, size, getattr(budget, size))  # the memory part changes them in its own process
    monkeypatch.setattr(bench_engine, "ASKED", 5)
    monkeypatch.setattr(bench_engine, "CHUNKS", (0.5, 1.0))
    monkeypatch.setattr(bench_engine, "TOKENS", (8192, 16384))
    printed, summary = run("--json", str(tmp_path / "out.json"))
    parts = summary["parts"]

    assert json.loads((tmp_path / "out.json").read_text()) == summary
    assert [*parts] == ["questions", "memory", "first-answer", "attention"]
    assert summary["missed"] == [name for name, part in parts.items() if part["met"] is False]
    assert f"goals missed: {', '.join(summary['missed']) or 'none'}" in printed

    asked = parts["questions"]
    assert asked["share"]["median"] == pytest.approx(
        asked["second_seconds"]["median"] / asked["first_seconds"]["median"], abs=1e-2
    )
    assert asked["met"] == (asked["share"]["median"] <= 0.05 and asked["evidence"]["median"] <= 0.05)
    assert [(row["seconds"], row["chunk"], row["malloc"]) for row in parts["memory"]["rows"]] == [
        (12, 1.0, "gives back"),
        (120, 1.0, "gives back"),
        (12, 0.5, "gives back"),
        (12, 1.0, "keeps"),
        (120, 1.0, "keeps"),
    ]
    answered = parts["first-answer"]
    stages = [answered["seconds"][name]["median"] for name in ("decode", "encode", "prefill")]
    assert answered["over_longest"]["answer"]["median"] == pytest.approx(
        answered["seconds"]["answer"]["median"] / max(stages), rel=0.05
    )
    assert answered["least_share"] == pytest.approx(min(stages) / sum(stages), abs=1e-2)
    assert answered["met"] is None or answered["least_share"] >= 0.2
    rows = parts["attention"]["rows"]
    assert [row["visual_tokens"] for row in rows] == [168, 336]
    for row in rows:  # so short that attention is dense either way
        assert row["density"] == 1.0 and row["same_answers"] == row["asked"]
        assert row["right"]["rr"] == row["right"]["full"]


def test_one_part_alone_and_a_missed_goal_is_said(run, monkeypatch):
    monkeypatch.setattr(bench_engine, "SECOND_QUESTION", 0.0)
    printed, summary = run("--part", "questions")

    assert [*summary["parts"]] == summary["missed"] == ["questions"]
    assert "at most 0.0%: MISSED" in printed and "goals missed: questions" in printed


def test_work_apart_has_a_process_of_its_own():
    assert measuring.apart(os.getpid) != os.getpid()


def test_memory_that_was_held_for_a_moment_counts_as_a_peak():
    before = measuring.resident("VmRSS")
    assert len(b"1" * 300_000_000)

    assert measuring.resident("VmHWM") - before > 250


def test_a_repeated_video_plays_its_loop_again_and_again(cache):
    path = measuring.repeated_video(cache, 1, 3, width=64, height=48)

    index = scan(path)
    assert len(index) == 75 and not index.warnings
    assert index.duration == pytest.approx(3.0)
