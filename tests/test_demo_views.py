"""What the chat's page shows: HTML and messages in which no outside text becomes markup."""

import html
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from rrdemo import answers, views
from rrdemo.conversation import (
    Answering,
    Done,
    FileView,
    Pause,
    Phase,
    Piece,
    PlanView,
    Queued,
    Settings,
    Stopped,
    Turn,
    Watched,
)
from rrdemo.handlers import Board
from rrdemo.timeline import timeline
from rrvideo.evidence import Evidence
from rrvideo.pipeline import Timings, Usage

TURN = Turn(
    question="What *is* it?",
    answer="a circle, from 0:12 on",
    settings=Settings(),
    evidence=(Evidence(12.0, 16.0, 0.6), Evidence(40.0, 41.0, 0.2)),
    attention=((0.0, 0.1), (2.0, 0.3), (4.0, 0.6)),
    timings=Timings(decode=1.5, encode=0.25, prefill=2.0, generate=0.04),
    density=0.4567,
    usage=Usage(frames=6, visual_tokens=1000, prompt_tokens=1234, answer_tokens=7),
    interval=1.0,
    clip=(0.0, 60.0),
    times=(0.0, 1.0, 2.0, 3.0, 4.0, 5.0),
)
PLAN = PlanView(
    frames=60,
    wanted_frames=60,
    interval=1.0,
    width=112,
    height=84,
    tokens=1234,
    visual_tokens=1000,
    kv_bytes=6_550_000,
    memory_bytes=58_900_000,
    fits=True,
    watched=False,
    start=0.0,
    end=60.0,
    times=tuple(range(60)),
)
HOSTILE = (
    "<script>alert(1)</script> <img src=x onerror=alert(1)>",
    "[a link](http://a.example) ![a picture](http://b.example/c.png) <http://d.example>",
    "*bold* __too__ ~~not~~ `code` $$x^2$$ | a | table | &lt; &amp; \\* \\\\",
    "# heading\n- list\n+ list\n=====\n1. one\n1234) many\n    indented\n\ttoo\n```\nfence\n```",
    "1.",
    "http://a.example www.b.example c@d.example it's 3*4*5 and a_b_c",
)


def text_of(markup):
    return html.unescape(re.sub(r"<[^>]*>", "", markup))


class Read(HTMLParser):
    """The text and the tags that a page shows."""

    def __init__(self, markup):
        super().__init__()
        self.text, self.tags = "", []
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        self.tags.append(("comment", {}))


@pytest.mark.parametrize("text", HOSTILE)
def test_outside_text_is_shown_as_it_is_and_never_becomes_markup(text):
    question, answer = (
        message["content"] for message in answers.messages([replace(TURN, question=text, answer=text)], 60)
    )
    shown = Read(question["text"])
    assert (answers.original(shown.text), shown.tags) == (text, [])
    assert answers.original(answers.inert(text)) == text

    page = Read(answer["value"])
    ours = {"div", "p", "a", "dl", "dt", "dd", "button"}
    assert {tag for tag, _ in page.tags} <= ours
    assert page.text.startswith(text)
    assert next(attributes["data-copy"] for tag, attributes in page.tags if tag == "button").startswith(text)


@pytest.mark.parametrize("text", HOSTILE)
def test_not_even_in_the_names_of_files_in_warnings_or_in_errors(text):
    file = FileView(text, "/x/video.mp4", 1, 60.0, 10, 10, 25.0, 1500, "h264", "mp4")
    for markup in (
        views.player(file, "video/x"),
        views.notice([text]),
        views.notice([text], error=True),
        views.plan(replace(PLAN, warnings=(text,))),
    ):
        assert set(re.findall(r"<(\w+)", markup)) <= {"video", "p", "strong", "span", "div", "ul", "li", "br"}
        assert " ".join(text.split()).lower() in " ".join(text_of(markup).split()).lower()
    assert 'onerror="' not in views.player(replace(file, name='" onerror="alert(1)'))


@pytest.mark.parametrize(
    ("text", "links"),
    [
        ("at 0:12.", {"0:12": 12}),
        ("from 0:12 to 0:45", {"0:12": 12, "0:45": 45}),
        ("0:12-0:45", {"0:12": 12, "0:45": 45}),
        ("(1:02:03)", {"1:02:03": 3723}),
        ("at 12.5 seconds, or 7s, or 1 second", {"12.5 seconds": 12.5, "7s": 7, "1 second": 1}),
        ("at 2:00:00, after the end", {}),
        ("at 99:00", {}),
        ("ratio 16:9:4, version 1.2:30, 5 sheep, 1:234", {}),
        ("no time", {}),
    ],
)
def test_times_within_the_video_become_links_that_seek(text, links):
    page = answers.link_times(text, 5400.0)

    assert text_of(page) == text
    found = re.findall(r'<a href="#t=([\d.]+)">([^<]*)</a>', page)
    assert {shown: float(seconds) for seconds, shown in found} == links


def test_a_conversation_becomes_two_messages_for_each_turn():
    stopped = Turn("And?", "It", Settings(), stopped=True)
    silent = replace(TURN, answer="")
    shown = answers.messages([TURN, stopped, silent], 60.0, pending=("Why?", ""))

    assert [message["role"] for message in shown] == ["user", "assistant"] * 4
    said = [message["content"].get("text") or text_of(message["content"]["value"]) for message in shown]
    assert said[0] == "What *is* it?"
    assert "Looked at 0:12–0:16\N{NO-BREAK SPACE}60\N{NO-BREAK SPACE}%, 0:40" in said[1]
    assert (said[3], said[-1]) == ("ItStopped.Copy", "…")
    assert "The model said nothing." in said[5]
    assert 'href="#t=12"' in shown[1]["content"]["value"]


def test_beside_an_answer_stand_its_times_tokens_density_and_the_comparison():
    figures = text_of(answers.messages([TURN], 60.0)[1]["content"]["value"]).replace("\N{NO-BREAK SPACE}", " ")
    times = ("Decode1.5 s", "Encode250 ms", "Prefill2.0 s", "Answer40 ms")
    for figure in (*times, "Tokens in1,234", "Tokens out7", "Density0.46"):
        assert figure in figures
    assert "Watched once with RRAttention, tau 0.95: 6 frames, at most 1 s apart." in figures
    assert "as fast" not in figures

    full = Settings(attention="full")
    for turn, told in (
        (replace(TURN, speed_up=2.54, compared=full), "Prefill 2.5× as fast as with full attention"),
        (
            replace(TURN, settings=full, speed_up=0.4, compared=Settings(tau=0.6)),
            "0.4× as fast as with RRAttention, tau 0.6",
        ),
    ):
        assert told in text_of(answers.messages([turn], 60.0)[1]["content"]["value"])


def test_a_plan_says_what_it_takes_and_what_is_wrong():
    markup = views.plan(PLAN)
    for figure in ("60 frames", "at most 1 s apart", "112 × 84", "1,234 tokens", "58.9 MB", "6.55 MB"):
        assert figure in text_of(markup)
    assert "warnings" not in markup

    warned = text_of(views.plan(replace(PLAN, frames=1, fits=False, warnings=("cut off",))))
    assert all(words in warned for words in ("1 frame of 112 × 84", "does not fit", "Cut off"))
    assert "apart" not in warned


def test_progress_has_a_bar_for_each_phase_and_tells_it_to_those_who_do_not_see():
    phases = [Phase("decode", 30, 60, 0.5), Phase("encode", 0, 60, 0.0), Phase("prefill", 256, 1024, 1.25)]
    page = ElementTree.fromstring(f"<div>{views.progress('Watching the video.', phases)}</div>")
    bars = {bar.get("aria-label"): float(bar.get("value")) for bar in page.iter("progress")}

    assert bars == {"Decode": 50, "Encode": 0, "Prefill": 25}
    assert "256 of 1,024 tokens" in views.progress("Watching the video.", phases)
    assert page.find("p[@role='status']").text == "Watching the video."
    assert views.progress("") == ""


def test_what_is_told_is_what_goes_on_now():
    board, told = Board(), []
    watched = Watched(PLAN, {"prefill": 2.0}, 0.5)
    for event in (
        *(Queued(2), Queued(1), Phase("decode", 1, 60, 0.1), Phase("encode", 1, 60, 0.1), Pause(), watched),
        *(Queued(1), Answering(), Piece("a "), Piece("b"), Done(TURN), Stopped(None)),
    ):
        board.take(event)
        told.append((board.said, len(board.phases)))

    assert told == [
        *(("Waiting for 2 others.", 0), ("Waiting for 1 other.", 0)),
        *(("Watching the video.", 1), ("Watching the video.", 2), ("Watching the video.", 2)),
        ("Watched 60 frames: prefill 2.0 s. Density 0.50.", 0),
        *(("Waiting for 1 other.", 0), ("Answering.", 0), ("Answering.", 0), ("Answering.", 0)),
        *(("Answered in 40 ms.", 0), ("Stopped.", 0)),
    ]
    assert board.text == "a b"


def parts(markup, kind):
    page = ElementTree.fromstring(f"<div>{markup}</div>")
    found = [part for part in page.iter("rect") if part.get("class") == kind]
    return [tuple(float(part.get(name)) for name in ("x", "width", "height")) for part in found]


def test_the_timeline_is_a_slider_whose_bars_stand_where_the_model_looked():
    turn = replace(TURN, clip=(10.0, 30.0), times=(10.0, 20.0), interval=10.0)
    markup = timeline(60.0, turn=turn)
    slider = ElementTree.fromstring(f"<div>{markup}</div>").find("div[@role='slider']")

    assert (slider.get("tabindex"), float(slider.get("aria-valuemax")), slider.get("data-step")) == ("0", 60, "10.000")
    assert "0:12 to 0:16" in slider.get("aria-label")
    assert [part[:2] for part in parts(markup, "outside")] == [(0, 10), (30, 30)]
    assert [part[:2] for part in parts(markup, "bar")] == [(0, 2), (2, 2), (4, 2)]
    heights = [part[2] for part in parts(markup, "bar")]  # by the root of the share, so that small ones are seen, too
    assert heights == pytest.approx([30 / 6**0.5, 30 / 2**0.5, 30], abs=0.01)
    assert "it saw 2 frames, at most 10 s apart" in markup
    assert "Bars" not in timeline(60.0)


def test_the_timeline_tells_what_was_seen_apart_from_what_is_planned():
    before = timeline(60.0, plan=PLAN)
    assert "Frames are at most 1 s apart: nobody sees what lies between two." in before
    assert before.count("M") == 60  # a tick for each frame

    coarse = replace(TURN, times=(0.0, 12.0, 24.0), interval=12.0, clip=(0.0, 60.0))
    other = timeline(60.0, plan=replace(PLAN, start=20.0, end=40.0), turn=coarse)
    assert "it saw 3 frames, at most 12 s apart: nobody saw what lies between two." in other
    assert "The next watch takes 60 frames, at most 1 s apart, where the line above is." in other
    assert (other.count("M"), parts(other, "outside")) == (3, [])
    assert parts(other, "planned") == [(20, 20, 3)]

    same = timeline(60.0, plan=replace(PLAN, times=coarse.times), turn=coarse)
    assert "next watch" not in same
    assert "planned" not in same


def test_frames_that_stand_too_close_for_a_tick_each_make_a_band():
    ticks = timeline(60.0, plan=replace(PLAN, times=(0.0, 10.0, 10.1, 10.2, 50.0)))

    assert 'd="M0.000 40v-4M10.000 40v-4H10.200v4zM50.000 40v-4"' in ticks


def test_a_short_clip_can_be_looked_at_closely():
    zoom = re.search("<button[^>]*>([^<]*)", timeline(600.0, turn=replace(TURN, clip=(300.0, 320.0))))

    assert zoom[1] == "Zoom to 5:00–5:20"
    assert 'data-start="300.000" data-end="320.000"' in zoom[0]
    assert "<button" not in timeline(60.0, turn=TURN)
