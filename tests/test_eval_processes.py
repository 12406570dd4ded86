"""The `rrvideo eval videomme` command as users start it: alone or as several processes, killed, and started again."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import chain

import pytest
import torch
from checkpoints import make_checkpoint
from videomme import write_set

from rreval.journal import read_run
from rrvideo import VideoQA, cli


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set") / "set", videos=6)


@pytest.fixture
def videomme(model, whole, tmp_path, monkeypatch):
    """Run the command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv("WORLD_SIZE", "1")

    def command(*arguments, folder=whole, out=tmp_path / "run"):
        line = ["videomme", str(folder), "--out", str(out), "--model", str(model), "--device", "cpu"]
        return cli.main(["eval", *line, "--max-new-tokens", "8", *arguments])

    return command


@pytest.fixture
def watched(monkeypatch):
    """The names of the files that are watched."""
    names = []
    watch = VideoQA.watch
    monkeypatch.setattr(
        VideoQA, "watch", lambda self, path, **rest: names.append(path.name) or watch(self, path, **rest)
    )
    return names


def responses(folder):
    return {record.question_id: record.response for record in read_run(folder).records}


def kill_after(command, answered, folder):
    """Run `command` in a child, and kill -9 it once so many more answers are in the journal."""

    def lines():
        return sum(path.read_bytes().count(b"\n") for path in folder.glob("answers-*.jsonl"))

    enough, deadline = lines() + answered, time.monotonic() + 60
    child = os.fork()  # all that takes long to import is there
    if child == 0:
        torch.set_num_threads(1)  # threads of the parent's do not live on in a child
        command()
        os._exit(0)
    while lines() < enough and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    return lines()


def test_a_run_killed_again_and_again_answers_every_question_once_whatever_the_number_of_processes(
    videomme, model, whole, tmp_path
):
    folder, answered = tmp_path / "killed", [0]
    for more in (0, 1, 3, 2, 4):
        answered.append(kill_after(lambda: videomme(out=folder), more, folder))
    assert sorted(answered) == answered
    assert 10 <= len(responses(folder)) == answered[-1] < 18

    line = ["videomme", str(whole), "--out", str(folder), "--model", str(model), "--device", "cpu"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    finished = subprocess.run(
        [*launcher, "-m", "rrvideo", "eval", *line, "--max-new-tokens", "8"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert finished.stdout.count("18 of 18 questions answered") == 1  # by one of the two
    journals = {path.name: path.read_text().splitlines() for path in folder.glob("answers*")}
    assert set(journals) == {"answers-0.jsonl", "answers-1.jsonl", "answers.jsonl"}
    assert len(journals["answers-0.jsonl"]) > answered[-1]
    merged = journals.pop("answers.jsonl")
    assert sorted(chain(*journals.values())) == sorted(merged)
    assert len({json.loads(each)["question_id"] for each in merged}) == len(merged) == 18

    videomme(out=tmp_path / "undisturbed")
    assert responses(folder) == responses(tmp_path / "undisturbed")


def test_processes_that_mpi_starts_find_each_other():
    told = (
        "from rreval.processes import Processes; p = Processes.join(); print(p.rank, p.count, p.local_count); p.leave()"
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    sizes = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", f"from rreval.processes import Processes; {told}"],
            env={
                **{name: value for name, value in os.environ.items() if name != "WORLD_SIZE"},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **sizes},
                **{"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank},
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    assert [process.communicate(timeout=100)[0] for process in started] == ["0 2 2\n", "1 2 2\n"]


def test_a_launch_for_cpus_that_starts_but_one_process_says_so(videomme, monkeypatch, capsys):
    assert videomme("--limit", "1") == 0
    assert "--multi_gpu" not in capsys.readouterr().err
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert videomme("--limit", "1") == 0
    assert "--multi_gpu in its place it starts several" in capsys.readouterr().err


def test_a_finished_run_watches_nothing_and_says_so(videomme, tmp_path, watched, capsys):
    assert videomme("--limit", "2") == 0
    assert "6 of 6 questions answered" in capsys.readouterr().out
    assert watched == ["-clip_1.mp4", "-clip_2.mp4"]
    assert videomme("--limit", "3", "--ids", "001,002-1,003-2") == 0
    assert watched[2:] == ["-clip_3.mp4"]
    assert "5 of 5 questions answered" in capsys.readouterr().out
    assert videomme("--ids=-clip_2") == 0
    assert len(watched) == 3
    assert len(read_run(tmp_path / "run").records) == 7


def test_settings_are_printed_stored_and_not_mixed(videomme, tmp_path, capsys):
    assert videomme("--limit", "1", "--preset", "rrattention-paper", "--tau", "0.9") == 0
    told = capsys.readouterr().err
    stored = json.loads((tmp_path / "run" / "settings.json").read_text())

    assert (stored["preset"], stored["tau"], stored["fps"], stored["questions"]) == ("rrattention-paper", 0.9, 2.0, 18)
    assert all(f"{name:16} {value}\n" in told for name, value in stored.items())
    assert "arXiv 2602.05853" in told
    assert videomme("--limit", "1", "--preset", "rrattention-paper") == 1
    assert "begun with other settings: tau is 0.9 there and 0.95 here" in capsys.readouterr().err
    assert videomme("--limit", "1", "--fps", "2") == 1
    assert "attention" not in capsys.readouterr().err.split("other settings")[1].split("rrattention")[0]


def test_what_failed_is_told_and_asked_again_only_on_request(videomme, whole, tmp_path, watched, capsys):
    shutil.copytree(whole, tmp_path / "set")
    hidden = (tmp_path / "set" / "data" / "-clip_1.mp4").rename(tmp_path / "elsewhere.mp4")

    def again(*arguments):
        code = videomme("--limit", "2", *arguments, folder=tmp_path / "set")
        return code, *capsys.readouterr()

    code, out, error = again()
    assert (code, out.split()[0]) == (0, "3")
    assert error.count("there is no file") == 2  # before the run, and once for its three questions
    assert "3 failed: --retry-failed" in error
    hidden.rename(tmp_path / "set" / "data" / "-clip_1.mp4")
    assert again()[1].startswith("3 of 6")
    assert len(watched) == 2
    assert again("--retry-failed")[1].startswith("6 of 6")
    assert len(watched) == 3


def test_a_set_without_videos_is_not_run(videomme, whole, tmp_path, capsys):
    assert videomme("--videos", str(tmp_path)) == 1
    assert "none of the 6 videos is in" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_subtitles_that_are_asked_for_and_missing_are_told_before_the_run(videomme, whole, tmp_path, capsys):
    assert videomme("--subtitles", "--limit", "2") == 0
    assert "1 of 2 videos have no subtitles" in capsys.readouterr().err
    shutil.copytree(whole, tmp_path / "set", ignore=shutil.ignore_patterns("*.srt"))
    assert videomme("--subtitles", folder=tmp_path / "set", out=tmp_path / "silent") == 1
    assert "the set has no subtitles" in capsys.readouterr().err
    assert not (tmp_path / "silent").exists()


def test_a_set_is_checked_without_a_model(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [])

    assert cli.main(["eval", "check", str(whole)]) == 0
    assert capsys.readouterr().out == "6 videos, 18 questions, 1 with subtitles; problems: 0\n"
    assert cli.main(["eval", "check", str(whole), "--videos", str(tmp_path), "--duration", "short,medium"]) == 1
    assert capsys.readouterr().out.endswith("4 videos, 12 questions, 0 with subtitles; problems: 4\n")


def test_runs_of_two_machines_become_one(videomme, tmp_path, monkeypatch, capsys):
    for machine, duration in (("one", "short"), ("two", "medium,long")):
        assert videomme("--duration", duration, out=tmp_path / machine) == 0
    monkeypatch.setattr(sys, "argv", [])

    assert cli.main(["eval", "merge", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    assert capsys.readouterr().out.endswith("one has 18 of 18 questions\n")
    assert len(read_run(tmp_path / "one").records) == 18
