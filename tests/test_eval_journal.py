"""Journals: what is written is never lost, whenever the writer dies, and settings are never mixed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from rreval import journal
from rreval.journal import Journal, Record, begin_run, merge, read_run
from rrvideo.errors import RRVideoError

SETTINGS = {"model": "tiny", "tau": 0.9, "versions": {"torch": "2.13"}}
LABELS = ("versions",)

WRITER = """
import sys
from dataclasses import replace
from pathlib import Path
from rreval.journal import Journal, Record, read_run

folder = Path(sys.argv[1])
done = {each.question_id for each in read_run(folder).records}
blank = Record("", "1", "x", "short", "d", "s", "t", "q" * 5000, ("A. a", "B. b"), "A", response="B")
with Journal(folder) as journal:
    for number in range(100_000):
        if f"{number:06}" not in done:
            journal.append(replace(blank, question_id=f"{number:06}"))
            print(number, flush=True)
"""


def record(question: str, **fields: object) -> Record:
    blank = Record(question, "001", "x", "short", "Knowledge", "Life", "Counting", "How many?", ("A. 1", "B. 2"), "A")
    return replace(blank, **fields)


ANSWER = record(
    "001-1",
    response='B.\n"¿Por qué?"\u2028\ud83d',  # with half a surrogate pair
    prediction="B",
    density=0.5,
    frames=4,
    visual_tokens=64,
    prompt_tokens=80,
    answer_tokens=2,
    seconds={"decode": 0.1, "encode": 0.2, "prefill": 0.3, "generate": 0.4},
    warnings=("it ends early",),
)


@pytest.fixture
def run(tmp_path):
    begin_run(tmp_path / "run", SETTINGS)
    return tmp_path / "run"


def write(folder: Path, *records: Record, rank: int = 0) -> None:
    with Journal(folder, rank) as opened:
        for each in records:
            opened.append(each)


def test_a_record_is_a_line_of_json_with_the_keys_that_others_rely_on(run):
    write(run, ANSWER, record("001-2", error="there is no file x.mp4"))
    first, second = map(json.loads, (run / "answers-0.jsonl").read_text(encoding="utf-8").split("\n")[:2])

    assert list(first) == [
        *("question_id", "video_id", "videoID", "duration", "domain", "sub_category", "task_type", "question"),
        *("options", "answer", "response", "prediction", "error"),
        *("density", "frames", "visual_tokens", "prompt_tokens", "answer_tokens", "seconds", "warnings"),
        *("video_bytes", "subtitled"),
    ]
    assert first == asdict(ANSWER) | {"options": ["A. 1", "B. 2"], "warnings": ["it ends early"]}
    assert (second["response"], second["error"], second["seconds"]) == (None, "there is no file x.mp4", None)


def test_what_was_written_is_read_again(run):
    answers = [ANSWER, record("001-2", error="no"), record("001-3", response="", prediction=None)]
    write(run, *answers)

    assert read_run(run).records == answers
    assert read_run(str(run)).settings == SETTINGS


def test_a_line_is_on_the_disk_before_the_next_question(run, monkeypatch):
    synced = []
    sync = os.fsync

    def syncing(descriptor):
        sync(descriptor)
        synced.append((run / "answers-0.jsonl").read_bytes())

    with Journal(run) as opened:
        monkeypatch.setattr(os, "fsync", syncing)
        opened.append(ANSWER)
        assert synced == [ANSWER.line()]


def test_wherever_a_line_is_cut_off_the_rest_is_kept_and_the_run_goes_on(tmp_path):
    lines = [ANSWER.line(), record("001-2", response="A").line()]
    begin_run(tmp_path, SETTINGS)
    path = tmp_path / "answers-0.jsonl"
    last = len(lines[1])
    for cut in (*range(0, last, 11), last - 2, last - 1, last):
        path.write_bytes(lines[0] + lines[1][:cut])
        whole = 2 if cut >= last - 1 else 1  # without its line break it is whole
        assert len(read_run(tmp_path).records) == whole  # also before it is repaired
        write(tmp_path, record("001-3", response="C"))

        assert path.read_bytes() == b"".join(lines[:whole]) + record("001-3", response="C").line()


def test_zeros_that_a_power_cut_leaves_are_removed(run):
    (run / "answers-0.jsonl").write_bytes(ANSWER.line() + bytes(4096))
    write(run)

    assert (run / "answers-0.jsonl").read_bytes() == ANSWER.line()


def test_no_answer_is_lost_or_given_twice_however_often_the_writer_is_killed(run):
    told, seed = set(), random.Random(0)
    for _ in range(6):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(run)], stdout=subprocess.PIPE, text=True)
        first = int(writer.stdout.readline())
        assert first == max(told, default=-1) + 1  # or the one that was written and could not be told any more
        time.sleep(seed.uniform(0, 0.05))
        writer.send_signal(signal.SIGKILL)
        told |= {first, *map(int, writer.stdout.read().split("\n")[:-1])}
        writer.wait()
        found = [int(each.question_id) for each in read_run(run).records]
        assert set(found) >= told
        told = set(found)
    write(run)
    lines = (run / "answers-0.jsonl").read_bytes().splitlines()

    assert [int(json.loads(line)["question_id"]) for line in lines] == list(range(len(told)))
    assert len(told) > 6


def test_two_processes_do_not_write_to_one_file(run):
    with Journal(run), pytest.raises(RRVideoError, match="another process is writing"):
        Journal(run)
    with Journal(run), Journal(run, 1):
        pass


def test_a_disk_that_is_full_is_told(run, monkeypatch):
    with Journal(run) as opened:
        monkeypatch.setattr(os, "fsync", lambda descriptor: os.open(run / "no" / "such", os.O_RDONLY))
        with pytest.raises(RRVideoError, match=r"answers-0\.jsonl cannot be read or written"):
            opened.append(ANSWER)


def test_the_answers_of_all_processes_count_and_an_answer_more_than_a_failure(run):
    write(run, record("1", response="old"), record("2", error="x"), record("3", response="A"), rank=0)
    write(run, record("1", response="new"), record("2", response="B"), record("3", error="x"), rank=1)
    write(run, record("4", error="first"), record("4", error="last"), record("0", response="C"), rank=10)

    assert read_run(run).records == [
        record("0", response="C"),
        record("1", response="new"),
        record("2", response="B"),
        record("3", response="A"),
        record("4", error="last"),
    ]


def test_merging_may_be_repeated_at_any_time(run):
    write(run, record("2", error="x"), ANSWER)
    write(run, record("1", response="A"), rank=1)
    merged = merge(run)
    content = (run / "answers.jsonl").read_bytes()
    assert merged == merge(run) == read_run(run)
    assert (run / "answers.jsonl").read_bytes() == content

    write(run, record("2", response="B"))
    assert [each.error for each in merge(run).records] == [None] * 3
    assert (run / "answers.jsonl").read_bytes().count(b"\n") == 3
    for path in run.glob("answers-*"):
        path.unlink()
    assert merge(run).records == [ANSWER, record("1", response="A"), record("2", response="B")]


def test_folders_of_several_machines_are_merged_if_their_settings_are_the_same(run, tmp_path):
    other = tmp_path / "other"
    begin_run(other, SETTINGS | {"versions": {}})
    write(run, record("1", response="A"), record("2", error="x"))
    write(other, record("2", response="B"), record("3", response="C"))

    for _ in range(2):
        assert [each.response for each in merge(run, [other], labels=LABELS).records] == ["A", "B", "C"]
    begin_run(tmp_path / "sparser", SETTINGS | {"tau": 0.5})
    with pytest.raises(RRVideoError, match=r"tau is 0\.5 there and 0\.9 here"):
        merge(run, [tmp_path / "sparser"], labels=LABELS)
    assert len(read_run(run).records) == 3


def test_a_run_refuses_other_settings_and_names_them(run):
    begin_run(run, SETTINGS)
    begin_run(run, SETTINGS | {"versions": {"torch": "9"}}, labels=LABELS)
    assert read_run(run).settings == SETTINGS
    with pytest.raises(RRVideoError, match=r"tau is 0\.9 there and 0\.95 here; fps is None there and 2 here") as told:
        begin_run(run, SETTINGS | {"tau": 0.95, "fps": 2})
    assert told.value.hint == "name another folder"
    assert read_run(run).settings == SETTINGS


def test_what_is_no_run_is_told(tmp_path, run):
    with pytest.raises(RRVideoError, match=r"holds no run: there is no settings\.json"):
        read_run(tmp_path)
    write(run, ANSWER)
    (run / "settings.json").unlink()
    with pytest.raises(RRVideoError, match=r"holds answers but no settings\.json"):
        begin_run(run, SETTINGS)
    (run / "settings.json").write_text("{")
    with pytest.raises(RRVideoError, match=r"settings\.json cannot be read"):
        read_run(run)


def test_a_damaged_line_is_told_and_can_be_mended(run):
    (run / "answers-0.jsonl").write_bytes(ANSWER.line() + b'{"question_id": 1}\n' + record("001-2").line())
    with pytest.raises(RRVideoError, match=r"line 2 of .*answers-0\.jsonl is damaged .*delete that line"):
        read_run(run)


def test_half_of_a_settings_file_is_never_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(journal.os, "fsync", lambda descriptor: os.open(tmp_path / "no" / "such", os.O_RDONLY))
    with pytest.raises(RRVideoError, match="cannot be read or written"):
        begin_run(tmp_path / "run", SETTINGS)

    assert not (tmp_path / "run" / "settings.json").exists()
