"""The `rrvideo` command: what it prints where, and how it ends."""

import inspect
import json
import shutil
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from clips import numbered_frames, write_video

from rrattention import RRConfig
from rrattention.config import RULES
from rrvideo import VideoQA, bench, budget, cli, options
from rrvideo.pipeline import MAX_NEW_TOKENS
from rrvideo.scan import scan
from rrvideo.video import probe

pytest_plugins = ["commands"]
pytestmark = pytest.mark.usefixtures("no_settings")
QUESTION = "What colour is the circle?"
OTHER = "How many scenes are there?"


@pytest.fixture(scope="module")
def narrow(folder, tmp_path_factory):
    """A model with a short context."""
    folder = shutil.copytree(folder, tmp_path_factory.mktemp("narrow") / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = budget.ROOM + 120
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


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
    assert err.splitlines()[:2] == [f"loading {model}", "watching clip.mp4"]
    assert err.count("\n") == 3
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


def test_options_reach_the_video_and_the_model(rrvideo, model, clip, weights, tmp_path, monkeypatch):
    loaded, watched = {}, {}
    load, watch = VideoQA.load, VideoQA.watch
    monkeypatch.setattr(VideoQA, "load", lambda *args, **options: loaded.update(options) or load(*args, **options))
    monkeypatch.setattr(VideoQA, "watch", lambda *args, **options: watched.update(options) or watch(*args, **options))
    sampling = ("--clip", "0:01-0:04.5", "--fps", 2, "--max-frames", 4, "--sampling", "keyframes", "--reader", "pyav")
    memory = ("--fit", "--cache", "offload", "--device", "cpu", "--dtype", "float16")
    (tmp_path / "weights.json").write_text(json.dumps(weights))
    rule = ("--attention", "full", "--tau", 0.8, "--rule", "fine", "--head-weights", tmp_path / "weights.json")
    code, _, _ = rrvideo("ask", clip, QUESTION, "--model", model, *sampling, *memory, *rule)

    assert code == 0
    assert loaded["attention"] == "full"
    assert loaded["config"] == replace(RRConfig.fine(0.8), head_weights=weights)
    assert (loaded["device"], loaded["dtype"]) == ("cpu", "float16")
    del watched["progress"]
    assert watched == {
        "start": 1.0, "end": 4.5, "fps": 2.0, "max_frames": 4, "sampling": "keyframes", "reader": "pyav",
        "fit": True, "cache": "offload",
    }  # fmt: skip


def test_every_rule_that_can_be_chosen_is_one_of_rrattentions():
    assert set(options.RULES) == set(RULES)


@pytest.mark.parametrize(
    "argv", [["ask", "video", "question"], ["scan", "video", "--ask", f"red=yes/no: {QUESTION}"]], ids=["ask", "scan"]
)
def test_defaults_are_those_of_the_python_interface(argv):
    given = vars(cli._parser([]).parse_args(argv))
    python = {name: each for call in (VideoQA.watch, VideoQA.load, scan) for name, each in parameters(call)}

    names = ["fps", "max_frames", "sampling", "reader", "fit", "cache", "attention", "device", "dtype"]
    for name in [*names, "every", "window"] if argv[0] == "scan" else names:
        assert given[name] == python[name].default
    assert given["max_new_tokens"] == python["max_new_tokens"].default == MAX_NEW_TOKENS


def parameters(call):
    return inspect.signature(call).parameters.items()


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


def plan_of(rrvideo, *argv):
    """The lines of `info --plan`, by their first word."""
    code, out, _ = rrvideo("info", *argv, "--plan")
    assert code == 0
    return dict(line.split(maxsplit=1) for line in out.splitlines()), json.loads(
        rrvideo("info", *argv, "--plan", "--json")[1]
    )


def test_a_plan_says_what_a_watch_would_take(rrvideo, model, clip):
    lines, document = plan_of(rrvideo, clip, "--model", model, "--fps", 4, "--max-frames", 10)
    answer = expected_answer(model, clip, QUESTION, fps=4.0, max_frames=10)
    plan = document.pop("plan")

    assert document == probe(clip).to_dict()
    assert (plan["frames"], plan["wanted_frames"], plan["fits"]) == (answer.usage.frames, 24, True)
    assert plan["visual_tokens"] == answer.usage.visual_tokens
    assert lines["plan"] == f"10 frames of {plan['width']} x {plan['height']}, one every 0.6 s"
    assert lines["cut"] == "14 of the 24 frames that 4 a second would be"
    assert lines["tokens"] == f"{plan['prompt_tokens']:,}, of which {plan['visual_tokens']:,} are the video's"
    assert lines["positions"] == f"{plan['positions']:,} of 4,096, where a question and its answer need 512"
    assert f"KV cache {plan['kv_bytes'] / 1e6:.1f} MB" in lines["memory"]
    assert lines["fits"] == "yes"


def test_a_plan_is_the_model_s_own_and_loads_no_weights(rrvideo, model, clip, tmp_path, monkeypatch):
    outline = shutil.copytree(model, tmp_path / "outline", ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setenv("RRVIDEO_MODEL", str(outline))
    _, named = plan_of(rrvideo, clip, "--model", model)
    _, found = plan_of(rrvideo, clip)

    assert found["plan"]["model"] == str(outline)
    assert {**found["plan"], "model": model} == named["plan"]
    half = plan_of(rrvideo, clip, "--dtype", "bfloat16")[1]
    assert 2 * half["plan"]["kv_bytes"] == found["plan"]["kv_bytes"]


def test_a_plan_that_does_not_fit_says_what_would_and_fit_takes_it(rrvideo, narrow, clip):
    lines, document = plan_of(rrvideo, clip, "--model", narrow, "--fps", 24)
    most = document["plan"]["largest_frames"]

    assert not document["plan"]["fits"]
    assert lines["fits"] == f"no: {most} frames would: --fit or --max-frames {most} takes them"
    lines, document = plan_of(rrvideo, clip, "--model", narrow, "--fps", 24, "--fit")
    assert (document["plan"]["frames"], lines["fits"]) == (most, "yes")
    assert lines["cut"] == f"{144 - most} of the 144 frames that 24 a second would be"


def test_too_many_frames_are_refused_or_with_fit_thinned(rrvideo, narrow, clip):
    argv = ["ask", clip, QUESTION, "--model", narrow, "--fps", 24, "--max-new-tokens", 3, "--quiet"]
    code, out, err = rrvideo(*argv)
    assert (code, out) == (1, "")
    message, hint = err.splitlines()
    assert message.startswith("rrvideo: 144 frames need ")
    assert "--fit" in hint

    code, out, _ = rrvideo(*argv, "--fit", "--json")
    assert code == 0
    assert json.loads(out)["answers"][0]["usage"]["frames"] == int(hint.split()[0])


def test_help_is_there_for_every_command(rrvideo):
    code, out, _ = rrvideo("--help")
    assert code == 0
    assert all(command in out for command in ("ask", "scan", "info", "doctor", "bench"))
    for command in ("ask", "scan", "info", "doctor"):
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


def test_benchmarks_of_the_kernels_are_those_of_the_checkout_that_one_is_in(tmp_path, monkeypatch):
    own = bench.kernel_benchmark("prefill")
    assert own == Path(cli.__file__).parent.parent / "kernels" / "benchmarks" / "prefill.py"
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "site-packages" / "rrvideo" / "bench.py"))  # a wheel
    monkeypatch.chdir(own.parent.parent.parent)
    assert bench.kernel_benchmark("prefill") == own
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="prefill comes with the repository and not with the package"):
        bench.kernel_benchmark("prefill")


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
