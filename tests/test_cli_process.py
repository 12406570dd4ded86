"""The `rrvideo` command among others: on a terminal, as a process of its own, behind a pipe, and interrupted."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest

from rrvideo import VideoQA
from rrvideo.pipeline import Answer

pytest_plugins = ["commands"]
pytestmark = pytest.mark.usefixtures("no_settings")
QUESTION = "What colour is the circle?"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_one_line_is_written_anew(rrvideo, model, clip, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    code, _, _ = rrvideo("ask", clip, QUESTION, "--model", model, "--max-new-tokens", 3)
    shown = terminal.getvalue()

    assert code == 0
    assert "\r\033[Kwatching clip.mp4 6 of 6 frames" in shown
    parts = shown.split("\r\033[K")
    assert all(len(part) < 40 for part in parts[:-1])
    assert parts[-1].startswith("\033[2m6 frames")  # the line is cleared before the last word is said
    assert parts[-1].endswith("\033[0m\n")
    assert shown.count("\n") == 1


def test_frames_and_tokens_that_are_counted_by_turns_are_told_once(rrvideo, model, clip, monkeypatch):
    watch = VideoQA.watch

    def counting(self, path, *, progress, **options):
        for done in range(1, 9):
            progress("decoded", done, 8, 0.1 * done)
            progress("frames", done, 8, 0.2 * done)
            progress("tokens", 80 * done, 1640, 0.3 * done)
        return watch(self, path, **options)

    monkeypatch.setattr(VideoQA, "watch", counting)
    _, _, err = rrvideo("ask", clip, QUESTION, "--model", model, "--max-new-tokens", 3)
    assert err.count("watching clip.mp4\n") == 1

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    rrvideo("ask", clip, QUESTION, "--model", model, "--max-new-tokens", 3)
    assert "\r\033[Kwatching clip.mp4 3 of 8 frames, 240 of 1,640 tokens\r" in terminal.getvalue()
    parts = terminal.getvalue().split("\r\033[K")
    assert [part for part in parts if "decoded" in part] == ["watching clip.mp4 1 of 8 decoded"]
    assert len([part for part in parts if "watching" in part]) == 1 + 2 * 8  # nothing is written twice


def run_apart(*argv, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "rrvideo", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_the_embedded_model_answers_about_the_sample_from_a_cold_start(tmp_path):
    process = run_apart("ask", "sample", "What appears first?", "--json", cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    answer = json.loads(out)["answers"][0]

    assert process.returncode == 0, err
    assert "Loading weights" not in err
    assert answer["text"]
    assert answer["evidence"]
    assert answer["usage"]["frames"] == 60


def test_a_reader_that_has_seen_enough_is_no_failure():
    with run_apart("info", "sample") as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.fixture
def interruptible():
    """What a shell starts in the background ignores interrupts, the tests too; not here."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_quietly(rrvideo, monkeypatch, model, clip):
    def interrupt(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        return Answer

    monkeypatch.setattr(VideoQA, "watch", interrupt)
    code, out, err = rrvideo("ask", clip, QUESTION, "--model", model, "--quiet")

    assert (code, out, err) == (130, "", "")
