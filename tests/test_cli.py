"""The `rrvideo` command: what it prints where, and how it ends."""

import inspect
import io
import json
import os
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from clips import numbered_frames, write_video

from rrvideo import VideoQA, cli, doctor
from rrvideo.pipeline import MAX_NEW_TOKENS, Answer
from rrvideo.video import probe

QUESTION = "What colour is the circle?"
OTHER = "How many scenes are there?"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", numbered_frames(144, width=84, height=56)))


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in ("RRVIDEO_MODEL", "RRVIDEO_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def rrvideo(capsys):
    """Run a command line; returns the exit code, stdout and stderr."""

    def run(*argv):
        try:
            code = cli.main([str(each) for each in argv])
        except SystemExit as end:  # argparse
            code = end.code
        return code, *capsys.readouterr()

    return run


def expected_answer(model, clip, question, tokens=6, **options):
    return VideoQA.load(model).watch(clip, **options).ask(question, max_new_tokens=tokens)


def test_the_answer_goes_to_stdout_and_everything_else_to_stderr(rrvideo, model, clip):
    code, out, err = rrvideo("ask", clip, QUESTION, "--model", model, "--max-new-tokens", 6)
    answer = expected_answer(model, clip, QUESTION)

    assert code == 0
    assert out.startswith(answer.text + "\n")
    moments = out.removeprefix(answer.text + "\n").splitlines()
    assert len(moments) == len(answer.evidence) > 0
    assert moments[0].startswith("  0:0")
    assert moments[0].endswith(f"  {100 * answer.evidence[0].weight:.0f} %")
    assert err.splitlines()[:3] == [f"loading {model}", "watching clip.mp4", "reading what was seen"]
    assert f"6 frames, {answer.usage.prompt_tokens:,} tokens; decode 0." in err
    assert "density 1.00" in err


def test_several_questions_share_one_prefill(rrvideo, model, clip, monkeypatch):
    watched = []
    watch = VideoQA.watch
    monkeypatch.setattr(VideoQA, "watch", lambda *args, **options: watched.append(1) or watch(*args, **options))
    _, out, _ = rrvideo("ask", clip, QUESTION, OTHER, "--model", model, "--max-new-tokens", 6)

    assert watched == [1]
    assert out.startswith(f"> {QUESTION}\n{expected_answer(model, clip, QUESTION).text}\n")
    assert f"\n\n> {OTHER}\n{expected_answer(model, clip, OTHER).text}\n" in out


def test_json_is_one_document_that_says_everything(rrvideo, model, clip):
    code, out, _ = rrvideo("ask", clip, QUESTION, OTHER, "--model", model, "--max-new-tokens", 6, "--json")
    document = json.loads(out)

    assert code == 0
    assert document["model"] == model
    assert document["video"]["info"] == probe(clip).to_dict()
    assert [answer["question"] for answer in document["answers"]] == [QUESTION, OTHER]
    for found, question in zip(document["answers"], (QUESTION, OTHER), strict=True):
        expected = expected_answer(model, clip, question).to_dict()
        assert {key: found[key] for key in ("text", "evidence", "density", "usage")} == {
            key: expected[key] for key in ("text", "evidence", "density", "usage")
        }


def test_quiet_leaves_stderr_empty(rrvideo, model, clip):
    assert rrvideo("ask", clip, QUESTION, "--model", model, "--quiet")[::2] == (0, "")


def test_options_reach_the_video_and_the_model(rrvideo, model, clip, monkeypatch):
    loaded, watched = {}, {}
    load, watch = VideoQA.load, VideoQA.watch
    monkeypatch.setattr(VideoQA, "load", lambda *args, **options: loaded.update(options) or load(*args, **options))
    monkeypatch.setattr(VideoQA, "watch", lambda *args, **options: watched.update(options) or watch(*args, **options))
    sampling = ("--clip", "0:01-0:04.5", "--fps", 2, "--max-frames", 4, "--sampling", "keyframes", "--reader", "pyav")
    code, _, _ = rrvideo("ask", clip, QUESTION, "--model", model, *sampling, "--attention", "full", "--tau", 0.8)

    assert code == 0
    assert (loaded["attention"], loaded["config"].tau) == ("full", 0.8)
    del watched["progress"]
    assert watched == {
        "start": 1.0, "end": 4.5, "fps": 2.0, "max_frames": 4, "sampling": "keyframes", "reader": "pyav"
    }  # fmt: skip


def test_defaults_are_those_of_the_python_interface():
    given = vars(cli._parser([]).parse_args(["ask", "video", "question"]))
    python = inspect.signature(VideoQA.watch).parameters | inspect.signature(VideoQA.load).parameters

    for name in ("fps", "max_frames", "sampling", "reader", "attention"):
        assert given[name] == python[name].default
    assert given["max_new_tokens"] == MAX_NEW_TOKENS


def test_the_model_is_the_one_named_else_that_of_the_environment_else_the_embedded(rrvideo, model, clip, monkeypatch):
    names = []
    load = VideoQA.load
    monkeypatch.setattr(VideoQA, "load", lambda name, **options: names.append(name) or load(name, **options))
    _, _, err = rrvideo("ask", clip, QUESTION, "--quiet")
    assert err.startswith("rrvideo: this is the embedded model: it knows only coloured shapes")
    assert err.endswith("--model Qwen/Qwen2-VL-7B-Instruct\n")
    assert err.count("\n") == 1

    monkeypatch.setenv("RRVIDEO_MODEL", model)
    assert rrvideo("ask", clip, QUESTION, "--quiet")[2] == ""
    assert rrvideo("ask", clip, QUESTION, "--quiet", "--model", "tiny")[2] == ""
    assert names == ["tiny", model, "tiny"]


def test_sample_is_the_video_that_comes_with_the_package(rrvideo, tmp_path, monkeypatch):
    code, out, _ = rrvideo("info", "sample", "--json")
    assert code == 0
    assert json.loads(out)["duration"] == pytest.approx(60, abs=1)

    monkeypatch.chdir(tmp_path)
    write_video(Path("sample.mp4"), numbered_frames(24, width=64, height=64)).rename("sample")
    assert json.loads(rrvideo("info", "sample", "--json")[1])["duration"] == pytest.approx(1, abs=0.1)


def test_info_says_what_is_in_a_file(rrvideo, tmp_path):
    path = write_video(tmp_path / "turned.mkv", numbered_frames(50, width=64, height=48), fps=25, rotation=90)
    code, out, _ = rrvideo("info", path)

    assert code == 0
    assert "h264 in matroska" in out
    assert "48 x 64, rotated by 270 degrees" in out
    assert "0:02 (2.00 s)" in out
    assert "50 at 25 a second" in out
    assert json.loads(rrvideo("info", path, "--json")[1]) == probe(path).to_dict()


@pytest.mark.parametrize(
    ("argv", "message", "hint"),
    [
        (["ask", "missing.mp4", QUESTION], "missing.mp4", None),
        (["info", "missing.mp4"], "missing.mp4", None),
        (["ask", "CLIP", QUESTION, "--model", "no/such/folder"], "there is no model folder no/such/folder", "hub id"),
        (["ask", "CLIP", QUESTION, "--model", "MODEL", "--clip", "2:00-"], "the clip starts at 120 s", None),
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
    ],
    ids=lambda value: " ".join(value[2:]) or "-" if isinstance(value, list) else "",
)
def test_wrong_usage_ends_with_2_and_says_what_is_wrong(rrvideo, argv, told):
    code, out, err = rrvideo(*argv)

    assert (code, out) == (2, "")
    assert err.startswith("usage: rrvideo")
    assert told in err


def test_help_is_there_for_every_command(rrvideo):
    code, out, _ = rrvideo("--help")
    assert code == 0
    assert all(command in out for command in ("ask", "info", "doctor", "bench"))
    for command in ("ask", "info", "doctor"):
        assert rrvideo(command, "--help")[0] == 0


def test_other_packages_add_commands(rrvideo, monkeypatch):
    seen = []
    fake = type(sys)("fake_plugin")
    fake.main = lambda: seen.append(sys.argv) or (3 if "--fail" in sys.argv else None)
    monkeypatch.setitem(sys.modules, "fake_plugin", fake)
    entry = metadata.EntryPoint("demo", "fake_plugin:main", "rrvideo.commands")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [entry] if group == "rrvideo.commands" else [])
    monkeypatch.setattr(sys, "argv", sys.argv)

    assert "demo" in rrvideo("--help")[1]
    assert seen == []
    assert rrvideo("demo", "--port", 80, "--help")[0] == 0
    assert rrvideo("demo", "--fail")[0] == 3
    assert seen == [["rrvideo demo", "--port", "80", "--help"], ["rrvideo demo", "--fail"]]


def test_bench_is_one_of_them(rrvideo, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    code, out, _ = rrvideo("bench", "--help")

    assert code == 0
    assert "sampling" in out


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


def test_damage_is_told_beside_the_answer(rrvideo, model, tmp_path):
    whole = write_video(
        tmp_path / "whole.mp4",
        numbered_frames(144, width=84, height=56),
        container_options={"movflags": "faststart"},
    )
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    code, out, err = rrvideo("ask", cut, QUESTION, "--model", model, "--json", "--quiet")

    warnings = json.loads(out)["video"]["warnings"]
    assert code == 0
    assert warnings
    assert err.splitlines() == [f"rrvideo: {warning}" for warning in warnings]


def test_doctor_says_what_works_and_what_to_do_about_the_rest(rrvideo, monkeypatch):
    monkeypatch.setenv("RRVIDEO_MODEL", "my/model")
    code, out, _ = rrvideo("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(out)["checks"]}

    assert code == 0
    assert checks["torch"]["found"] == metadata.version("torch")
    assert checks["embedded model"]["status"] == "ok"
    assert checks["default model"]["found"] == "my/model"
    assert all(check["advice"] for check in checks.values() if check["status"] == "missing")
    lines = rrvideo("doctor")[1].splitlines()
    assert sum(line.startswith(("ok ", "note ", "missing ")) for line in lines) == len(checks)


def test_doctor_survives_what_it_finds_broken(rrvideo, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "decord", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(doctor, "EMBEDDED", tmp_path / "model.safetensors")
    code, out, _ = rrvideo("doctor", "--json")
    status = {check["name"]: check["status"] for check in json.loads(out)["checks"]}

    assert code == 1
    assert [name for name in status if status[name] == "missing"] == ["torch", "av", "embedded model"]
    assert {status[name] for name in ("decord", "gpu", "real models")} == {"note"}


def test_doctor_finds_downloaded_models(monkeypatch, tmp_path):
    from huggingface_hub import constants

    for name, kind in (("Qwen--Qwen2-VL-2B-Instruct", "qwen2_vl"), ("meta--Llama", "llama")):
        snapshot = tmp_path / f"models--{name}" / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(json.dumps({"model_type": kind}))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    found = next(check for check in doctor.examine() if check.name == "downloaded")

    assert (found.status, found.found) == ("ok", f"Qwen/Qwen2-VL-2B-Instruct in {tmp_path}")


@pytest.mark.parametrize(
    ("name", "memory", "status", "advice"),
    [
        ("NVIDIA H100", 85.0, "ok", "--model Qwen/Qwen2-VL-7B-Instruct"),
        ("NVIDIA RTX 4090", 25.3, "ok", "--model Qwen/Qwen2-VL-7B-Instruct"),
        ("NVIDIA RTX 4060", 8.2, "ok", "--model Qwen/Qwen2-VL-2B-Instruct"),
        ("", 16.8, "note", "--model Qwen/Qwen2-VL-2B-Instruct"),
        ("", 4.1, "note", "the smallest is Qwen/Qwen2-VL-2B-Instruct"),
    ],
    ids=["h100", "4090", "4060", "laptop", "small"],
)
def test_doctor_knows_which_models_fit(monkeypatch, name, memory, status, advice):
    monkeypatch.setattr(doctor, "_accelerator", lambda: (name, memory))

    found = doctor._real_models()
    assert (found[0], found[2]) == (status, advice)


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


def test_an_interrupt_ends_quietly(rrvideo, monkeypatch, model, clip):
    def interrupt(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        return Answer

    monkeypatch.setattr(VideoQA, "watch", interrupt)
    code, out, err = rrvideo("ask", clip, QUESTION, "--model", model, "--quiet")

    assert (code, out, err) == (130, "", "")
