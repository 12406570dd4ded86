"""A conversation on its way out: as Markdown, JSON, a command and pictures; and the examples on their way in."""

import html
import json
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
from clips import number_of, numbered_frames, write_video
from markdown_it import MarkdownIt
from PIL import Image

from rrdemo import export
from rrdemo.conversation import FileView, Settings, Turn
from rrdemo.samples import Sample, samples
from rrdemo.thumbnails import strongest
from rrvideo import Evidence, RRVideoError, Timings, Usage
from rrvideo.cli import SAMPLE, _parser, video_path
from rrvideo.frameindex import scan
from rrvideo.options import watch_options
from rrvideo.tiny.world import draw_world
from rrvideo.video import probe

FILE = FileView("-my'film'<1>.mp4", "/secret/video.mp4", 1000, 83.5, 320, 240, 25.0, 2087, "h264", "mov")
ANSWERED = Turn(
    question="What is\nin *it*?",
    answer="1. A <b>dog</b> & a [cat](http://example.com)\n# no heading\n- no list",
    settings=Settings(start=1.5, end=61.25, fps=0.5, max_frames=100, sampling="keyframes", tau=0.9),
    evidence=(Evidence(60.0, 62.0, 0.75),),
    attention=((0.0, 0.25), (60.0, 0.75)),
    timings=Timings(1.0, 2.0, 3.0, 0.027),
    density=0.4,
    usage=Usage(30, 900, 1000, 12),
    interval=1800.0,
    speed_up=1.5,
    compared=Settings(attention="full"),
)
HOSTILE = (
    "<script>alert(1)</script> <img src=x onerror=alert(1)>",
    "[a link](http://a.example) ![a picture](http://b.example/c.png) <http://d.example>",
    "*bold* __too__ ~~not~~ `code` $$x^2$$ | a | table | &lt; &amp; \\* \\\\",
    "# heading\n- list\n+ list\n=====\n1. one\n1234) many\n    indented\n\ttoo\n```\nfence\n```",
    "1.",
    "http://a.example www.b.example c@d.example it's 3*4*5 and a_b_c",
)
STOPPED = Turn("-And then?", "It", Settings(attention="full"), stopped=True)


@pytest.mark.parametrize(
    "settings",
    [Settings(), ANSWERED.settings, Settings(start=100000.123, attention="full", tau=0.5), Settings(end=2.0)],
    ids=["defaults", "all", "open end", "open start"],
)
@pytest.mark.parametrize("model", ["tiny", "my models/-7B"])
def test_the_command_asks_the_same_with_the_same_settings(settings, model):
    turns = [ANSWERED, Turn("-Why?", "", settings)]
    words = shlex.split(export.command(FILE, model, turns))
    arguments = _parser([]).parse_args(words[1:])
    read = watch_options(arguments)

    assert words[:2] == ["rrvideo", "ask"]
    assert (arguments.video, arguments.questions) == (FILE.name, [turn.question for turn in turns])
    assert (arguments.model or "tiny", arguments.attention) == (model, settings.attention)
    assert arguments.tau == (settings.tau if settings.attention == "rr" else 0.95)
    assert (read["start"] or None, read["end"]) == (settings.start, settings.end)
    assert {name: read[name] for name in ("fps", "max_frames", "sampling")} == {
        name: getattr(settings, name) for name in ("fps", "max_frames", "sampling")
    }
    assert read["fit"]  # as the chat does


def test_the_command_for_an_example_finds_it_and_does_not_say_whose_home_it_lies_in(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    bundled, drawn, _ = samples()
    shutil.copyfile(SAMPLE, make_parent(Path(drawn.source)))

    for sample in (bundled, drawn):
        words = export.command(replace(FILE, name=sample.name, source=sample.source), "tiny", [ANSWERED])
        assert str(tmp_path) not in words
        shown = subprocess.run(["sh", "-c", f"printf '%s\\n' {words}"], capture_output=True, text=True, check=True)
        video = shown.stdout.splitlines()[shown.stdout.splitlines().index("--") + 1]
        assert probe(video_path(video)).duration == 60
    elsewhere = replace(FILE, source="/var/my cache/upright.mp4")
    assert shlex.split(export.command(elsewhere, "tiny", [ANSWERED]))[-2] == elsewhere.source


def make_parent(path):
    path.parent.mkdir(parents=True)
    return path


def test_there_is_no_command_before_there_is_a_question():
    assert export.command(None, "tiny", [ANSWERED]) == export.command(FILE, "tiny", []) == ""


def test_markdown_says_all_and_makes_nothing_of_what_people_and_models_write():
    text = export.markdown(FILE, "tiny", [ANSWERED, STOPPED])
    tokens = MarkdownIt().parse(text)
    kinds = [token.type for token in tokens] + [child.type for token in tokens for child in token.children or []]
    lines = ["".join(child.content or "\n" for child in token.children) for token in tokens if token.children]
    read = "\n".join(lines)

    assert [lines[0], lines[2]] == [f"A chat about {FILE.name}", "Question 1"]
    assert kinds.count("heading_open") == 3
    assert not {"html_block", "html_inline", "link_open", "ordered_list_open", "code_block"} & {*kinds}
    assert kinds.count("list_item_open") == 1  # the moment
    for words in (*ANSWERED.question.split("\n"), *ANSWERED.answer.split("\n"), "1:00-1:02: 75 %", "Stopped."):
        assert words in read
    for words in (
        "Keyframes sampling, 0.5 frames a second, 100 at most, 0:01 to 1:01; RRAttention, tau 0.9. 30 frames",
        "Density 0.40",
        "Uniform sampling, 1 frame a second, 768 at most; full attention",
    ):
        assert words in read
    assert "at most 1,800 s apart; 1,000 tokens. Decode 1.0 s, encode 2.0 s, prefill 3.0 s, answer 27 ms" in read
    assert "Prefill took 1.50 times as long with full attention" in read
    assert FILE.path not in text


def test_markdown_says_where_there_is_no_answer_and_what_one_was_compared_with():
    silent = replace(ANSWERED, answer=" ", settings=Settings(attention="full"), compared=Settings(tau=0.6))
    text = export.markdown(FILE, "tiny", [silent, replace(STOPPED, answer="")])

    assert "*The model said nothing.*" in text
    assert "*Stopped before an answer.*" in text
    assert "Prefill took 1.50 times as long with RRAttention, tau 0.6" in text


@pytest.mark.parametrize("text", HOSTILE)
def test_outside_text_is_shown_as_it_is_and_never_becomes_markup(text):
    page = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(export.escape_markdown(text))

    assert set(re.findall(r"</?(\w+)", page)) <= {"p", "br"}
    assert html.unescape(re.sub(r"<[^>]*>", "", page)).split() == text.split()


def test_json_holds_all_but_where_the_file_lies():
    document = json.loads(export.as_json(FILE, "tiny", [ANSWERED, STOPPED]))
    first, second = document["turns"]

    assert document["model"] == "tiny"
    assert document["video"]["name"] == FILE.name
    assert FILE.path not in json.dumps(document)
    assert Settings(**first["settings"]) == ANSWERED.settings
    assert [Evidence(**moment) for moment in first["evidence"]] == [*ANSWERED.evidence]
    assert (first["timings"]["prefill"], first["usage"]["frames"], first["attention"][1]) == (3.0, 30, [60.0, 0.75])
    assert (second["question"], second["answer"], second["stopped"]) == ("-And then?", "It", True)


def test_a_chat_without_a_word_can_be_exported_too():
    assert export.markdown(None, "tiny", []).startswith("# A chat")
    assert json.loads(export.as_json(None, "tiny", []))["turns"] == []


def test_thumbnails_are_of_the_moments_with_most_attention_in_order_of_time(tmp_path):
    clip = write_video(tmp_path / "clip.mp4", numbered_frames(144, width=84, height=56))
    attention = [(0.0, 0.1), (1.0, 0.3), (2.0, 0.05), (3.0, 0.1), (4.0, 0.4), (5.0, 0.05)]
    found = strongest(scan(clip), attention, count=2, height=60)
    pictures = [np.asarray(Image.open(BytesIO(jpeg))) for _, jpeg in found]

    assert [time for time, _ in found] == [1.0, 4.0]
    assert [number_of(picture) for picture in pictures] == [24, 96]
    assert {picture.shape for picture in pictures} == {(60, 90, 3)}
    assert strongest(scan(clip), [], count=2, height=60) == []


def test_no_two_thumbnails_are_of_the_same_moment(tmp_path):
    clip = write_video(tmp_path / "clip.mp4", numbered_frames(144, width=84, height=56))
    attention = [(number / 24, number / 144) for number in range(144)]  # ever more, towards the end
    times = [time for time, _ in strongest(scan(clip), attention, count=3, height=60)]

    assert times[-1] == pytest.approx(143 / 24)
    assert [after - before for before, after in pairwise(times)] == pytest.approx([6 / 24] * 2)


def test_the_examples_come_with_questions_and_are_told_apart_by_their_names():
    found = samples()

    assert len({sample.name for sample in found}) == len(found) >= 3
    assert found[0].file() == SAMPLE
    assert all(sample.about and len(sample.questions) >= 4 for sample in found)
    assert [sample.questions for sample in samples()] == [sample.questions for sample in found]


def test_an_example_is_drawn_when_it_is_first_wanted_and_never_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sample = Sample("short.mp4", "A second", (), draw_world(Random(1), 1, 1, shortest=1), 64, 48, 8)
    assert [*tmp_path.iterdir()] == []
    path = sample.file()
    drawn = probe(path)

    assert (drawn.width, drawn.height, drawn.duration) == (64, 48, 1.0)
    path.write_bytes(b"kept")
    assert sample.file().read_bytes() == b"kept"
    path.unlink()
    assert probe(sample.file()) == drawn
    assert [*path.parent.iterdir()] == [path]


def test_an_example_that_cannot_be_drawn_says_where_it_could(tmp_path, monkeypatch):
    Path(tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(RRVideoError, match="XDG_CACHE_HOME"):
        samples()[1].file()
