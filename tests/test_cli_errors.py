"""How the `rrvideo` command fails: in one line with a hint where that is known, and with 2 where it is used wrongly."""

import json
import os
import shutil
import subprocess
import sys

import pytest

pytest_plugins = ["commands"]
pytestmark = pytest.mark.usefixtures("no_settings")
QUESTION = "What colour is the circle?"


@pytest.mark.parametrize(
    ("argv", "message", "hint"),
    [
        (["ask", "missing.mp4", QUESTION], "missing.mp4", None),
        (["info", "missing.mp4"], "missing.mp4", None),
        (["ask", "CLIP", QUESTION, "--model", "no/such/folder"], "there is no model folder no/such/folder", "hub id"),
        (["ask", "CLIP", QUESTION, "--model", "MODEL", "--clip", "2:00-"], "the clip starts at 2:00 (120.00 s)", None),
    ],
    ids=["no-file", "no-file-info", "no-model", "no-such-clip"],
)
def test_a_known_failure_is_one_line_and_perhaps_a_hint(rrvideo, model, clip, argv, message, hint):
    argv = [{"CLIP": clip, "MODEL": model}.get(each, each) for each in argv]
    code, out, err = rrvideo(*argv)

    assert (code, out) == (1, "")
    first, *rest = [line for line in err.splitlines() if not line.startswith("loading")]
    assert first.startswith("rrvideo: ")
    assert message in first
    assert len(rest) == (hint is not None)
    assert hint is None or hint in rest[0]


def test_an_address_is_told_to_be_none_of_a_file(rrvideo):
    code, out, err = rrvideo("ask", "https://example.com/film.mp4", QUESTION)
    assert (code, out) == (1, "")
    assert err.splitlines() == [
        "rrvideo: there is no file https:/example.com/film.mp4",  # a path has no empty parts
        "  addresses are not opened: download the video first",
    ]


@pytest.mark.parametrize("json_too", [[], ["--json"]])
def test_a_name_that_is_no_text_is_told_all_the_same(clip, tmp_path, json_too):
    path = tmp_path / os.fsdecode(b"caf\xe9.mp4")
    try:
        shutil.copy(clip, path)
    except OSError:
        pytest.skip("no file can have such a name here")
    command = [sys.executable, "-m", "rrvideo", "info", path, *json_too]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"}, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"caf\\udce9.mp4" in done.stdout
    if json_too:
        assert json.loads(done.stdout)["path"] == str(path)


def test_debugging_shows_the_traceback_of_a_known_failure(rrvideo, monkeypatch):
    monkeypatch.setenv("RRVIDEO_DEBUG", "1")
    code, _, err = rrvideo("info", "missing.mp4")

    assert code == 1
    assert err.startswith("Traceback")
    assert "\nrrvideo: " in err


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], "required: COMMAND"),
        (["watch"], "invalid choice: 'watch'"),
        (["ask", "clip.mp4"], "required: QUESTION"),
        (["ask", "clip.mp4", " "], "a question must not be empty"),
        (["ask", "clip.mp4", QUESTION, "--clip", "2:45-1:30"], "ends before it starts"),
        (["ask", "clip.mp4", QUESTION, "--clip", "soon"], "such as 1:30-2:45"),
        (["ask", "clip.mp4", QUESTION, "--fps", "0"], "argument --fps: must be a number above 0, got '0'"),
        (["ask", "clip.mp4", QUESTION, "--fps", "nan"], "must be a number above 0, got 'nan'"),
        (["ask", "clip.mp4", QUESTION, "--max-frames", "2.5"], "must be a whole number above 0, got '2.5'"),
        (["ask", "clip.mp4", QUESTION, "--max-new-tokens", "many"], "must be a whole number above 0, got 'many'"),
        (["ask", "clip.mp4", QUESTION, "--tau", "1.5"], "above 0, and 1 at most, got '1.5'"),
        (["ask", "clip.mp4", QUESTION, "--attention", "some"], "invalid choice: 'some'"),
        (["ask", "clip.mp4", QUESTION, "--rule", "coarse"], "invalid choice: 'coarse'"),
        (["scan", "clip.mp4"], "required: --ask"),
        (["scan", "clip.mp4", "--ask", "Is it red?"], "argument --ask: a question is NAME=KIND: QUESTION"),
        (["scan", "clip.mp4", *["--ask", "red=yes/no: Is it?"] * 2], "two answers are named red, red_probability"),
        (["scan", "clip.mp4", "--ask", "a=text: What?", "--out", "a.txt"], "must end with .jsonl or .csv, got 'a.txt'"),
        (["scan", "clip.mp4", "--ask", "a=text: What?", "--every", "0"], "argument --every: must be a number above 0"),
    ],
    ids=lambda value: " ".join(value[2:]) or "-" if isinstance(value, list) else "",
)
def test_wrong_usage_ends_with_2_and_says_what_is_wrong(rrvideo, argv, told):
    code, out, err = rrvideo(*argv)

    assert (code, out) == (2, "")
    assert err.startswith("usage: rrvideo")
    assert told in err


def test_weights_of_another_model_are_refused(rrvideo, model, clip, weights, tmp_path):
    (tmp_path / "weights.json").write_text(json.dumps(weights[1:]))
    code, out, err = rrvideo("ask", clip, QUESTION, "--model", model, "--head-weights", tmp_path / "weights.json")

    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith(f"rrvideo: {model} cannot attend so: head_weights must be those of this ")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read: No such file"),
        ("heads", "is not what rrvideo bench calibrate writes: Expecting value"),
        ("null", "is not what rrvideo bench calibrate writes: head_weights must be positive"),
        ("[[1, 2], [3]]", "rows of different lengths"),
        ("[[1, -2]]", "-2.0 among them"),
        ('{"heads": 1}', "is not what rrvideo bench calibrate writes: could not convert"),
    ],
)
def test_a_file_without_weights_of_heads_is_wrong_usage(rrvideo, clip, tmp_path, content, told):
    file = tmp_path / "weights.json"
    if content is not None:
        file.write_text(content)
    code, out, err = rrvideo("ask", clip, QUESTION, "--head-weights", file)

    assert (code, out) == (2, "")
    assert f"argument --head-weights: {file}" in err
    assert told in err
