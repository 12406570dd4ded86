"""What the chat's page shows, who comes to it, and its command; the browser has its own tests."""

import html
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from xml.etree import ElementTree

import httpx
import pytest
from markdown_it import MarkdownIt

from rrdemo import views
from rrdemo.conversation import FileView, Phase, PlanView, Queued, Settings, Turn, Watched
from rrdemo.handlers import read_settings
from rrdemo.layout import theme
from rrdemo.timeline import timeline
from rrdemo.visitors import PATIENCE, Visitors
from rrvideo import cli
from rrvideo.errors import RRVideoError
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


def rendered(markdown):
    """The HTML of `markdown`, by a reader that is not the browser's."""
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown)


def text_of(markup):
    return html.unescape(re.sub(r"<[^>]*>", "", markup))


@pytest.mark.parametrize("text", HOSTILE)
def test_outside_text_is_shown_as_it_is_and_never_becomes_markup(text):
    page = rendered(views.escape_markdown(text))

    assert set(re.findall(r"</?(\w+)", page)) <= {"p", "br"}
    assert text_of(page).split() == text.split()
    assert views.unescape(views.escape_markdown(text)).split() == text.split()


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
        assert " ".join(text.split()) in " ".join(text_of(markup).split())
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
    page = rendered(views.link_times(text, 5400.0))

    assert text_of(page).strip() == text
    found = re.findall(r'<a href="#t=([\d.]+)">([^<]*)</a>', page)
    assert {shown: float(seconds) for seconds, shown in found} == links


def test_a_conversation_becomes_messages_and_each_message_knows_its_turn():
    stopped = Turn("And?", "It", Settings(), stopped=True)
    turns = [TURN, stopped, TURN]
    shown = views.messages(turns, 60.0, pending=("Why?", ""))

    assert [message["role"] for message in shown] == [
        *("user", "assistant", "assistant"),
        *("user", "assistant"),
        *("user", "assistant", "assistant"),
        *("user", "assistant"),
    ]
    assert [views.turn_of(turns, number) for number in range(10)] == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert "(#t=12)" in shown[1]["content"]
    assert "0:12–0:16" in shown[1]["content"].replace("\\", "")
    assert "Stopped" in shown[4]["content"]
    assert shown[-1]["content"]


def test_beside_an_answer_stand_its_times_tokens_density_and_the_comparison():
    _, _, figures = views.messages([TURN], 60.0)
    assert figures["metadata"] == {"title": "40 ms · RRAttention · density 0.46", "status": "done"}
    for figure in ("1.5 s, 250 ms, 2.0 s", "1,234", "1,000", "at most 1 s apart", "0.457", "tau 0.95"):
        assert figure in figures["content"]
    assert "not known" in figures["content"]

    _, _, figures = views.messages([replace(TURN, speed_up=2.5)], 60.0)
    assert figures["metadata"]["title"].endswith("prefill 2.5× as fast as full attention")
    full = replace(TURN, settings=Settings(attention="full"), speed_up=0.4)
    assert "0.40× as fast as RRAttention" in views.messages([full], 60.0)[-1]["content"]


def test_a_plan_says_what_it_takes_and_what_is_wrong():
    markup = views.plan(PLAN)
    for figure in ("60 frames", "at most 1 s apart", "112 × 84", "1,234 tokens", "58.9 MB", "6.55 MB"):
        assert figure in text_of(markup)
    assert "warnings" not in markup

    warned = text_of(views.plan(replace(PLAN, frames=40, wanted_frames=60, fits=False, warnings=("cut off",))))
    assert all(words in warned for words in ("20 fewer frames", "does not fit", "cut off"))


def test_progress_has_a_bar_for_each_phase_and_tells_it_to_those_who_do_not_see():
    phases = [Phase("decode", 30, 60, 0.5), Phase("encode", 0, 60, 0.0), Phase("prefill", 256, 1024, 1.25)]
    page = ElementTree.fromstring(f"<div>{views.progress(phases)}</div>")
    bars = {bar.get("aria-label"): float(bar.get("value")) for bar in page.iter("progress")}

    assert bars == {"Decode": 50, "Encode": 0, "Prefill": 25}
    assert "256 of 1,024 tokens" in views.progress(phases)
    assert page.find("p[@role='status']").text == "Watching the video."
    assert "Waiting for 2 others" in views.progress([], Queued(2))
    assert "prefill 2.0 s" in views.progress(phases, watched=Watched(PLAN, {"prefill": 2.0}, 0.5))
    assert views.progress([]) == ""


def test_the_timeline_is_a_slider_whose_bars_stand_where_the_model_looked():
    markup = timeline(60.0, times=(10.0, 20.0), interval=10.0, clip=(10.0, 30.0), turn=TURN)
    page = ElementTree.fromstring(f"<div>{markup}</div>")
    slider = page.find("div[@role='slider']")
    bars = [{name: float(bar.get(name)) for name in ("x", "width", "height")} for bar in page.iter("rect")]
    outside, bars = bars[:2], bars[2:]

    assert (slider.get("tabindex"), float(slider.get("aria-valuemax")), slider.get("data-step")) == ("0", 60, "10.000")
    assert "0:12 to 0:16" in slider.get("aria-label")
    assert [(each["x"], each["width"]) for each in outside] == [(0, 10), (30, 30)]
    assert [(bar["x"], bar["width"]) for bar in bars] == [(0, 2), (2, 2), (4, 2)]
    assert [bar["height"] for bar in bars] == pytest.approx([6, 18, 36], abs=0.01)  # the highest nearly fills it
    assert "at most 10 s apart" in markup
    assert "Bars" not in timeline(60.0)


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [("", "", (None, None)), ("1:30", "", (90, None)), (" 5 ", "1:00", (5, 60)), (None, "7.5", (None, 7.5))],
)
def test_a_clip_is_read_as_people_write_it(start, end, expected):
    settings = read_settings(start, end, 2.0, 100.0, "keyframes", "full", 0.9)

    assert (settings.start, settings.end) == expected
    assert (settings.fps, settings.max_frames, settings.sampling, settings.attention) == (2, 100, "keyframes", "full")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"start": "soon"}, "a time is"),
        ({"start": "9", "end": "3"}, "ends before"),
        ({"fps": None}, "must be numbers"),
        ({"fps": -1}, "above 0"),
    ],
)
def test_settings_that_make_no_sense_are_told(changed, told):
    given = {"start": "", "end": "", "fps": 1, "max_frames": 768, "sampling": "uniform", "attention": "rr", "tau": 0.9}
    with pytest.raises(RRVideoError, match=told):
        read_settings(**given | changed)


class Counted:
    """A session that knows whether it was closed."""

    def __init__(self, studio):
        self.id, self.closed = str(id(self)), False

    def close(self):
        self.closed = True


def test_each_tab_has_a_session_of_its_own_which_ends_with_it_or_after_half_a_day(monkeypatch):
    monkeypatch.setattr("rrdemo.visitors.Session", Counted)
    visitors = Visitors(None)
    one, other = visitors.session("one"), visitors.session("other")
    assert visitors.session("one") is one is not other
    assert visitors.find(other.id) is other
    assert visitors.find("nobody") is None

    visitors.leave("one")
    visitors.leave("one")
    assert (one.closed, other.closed, len(visitors)) == (True, False, 1)
    tomorrow = time.monotonic() + PATIENCE + 1
    monkeypatch.setattr(time, "monotonic", lambda: tomorrow)
    third = visitors.session("third")
    assert (other.closed, third.closed, len(visitors)) == (True, False, 1)
    visitors.close()
    assert third.closed


def test_fonts_and_styles_come_from_nowhere_else():
    css = theme()._get_theme_css()

    assert theme()._stylesheets == []
    assert re.findall(r"@import.*|url\((?!.data:).*", css) == []


@pytest.fixture
def starts(monkeypatch):
    """How the demo would be served, without loading or serving anything."""
    calls = []

    class Served:
        url = "http://here/"

        def wait(self):
            """Return at once."""

        def close(self):
            calls.append("closed")

    monkeypatch.setattr("rrdemo.app.serve", lambda studio, **options: calls.append(options) or Served())
    monkeypatch.setattr("rrdemo.studio.Studio.load", lambda model, **options: calls.append((model, options)))
    monkeypatch.delenv("RRVIDEO_MODEL", raising=False)
    monkeypatch.delenv("RRVIDEO_DEMO_AUTH", raising=False)
    handler = signal.getsignal(signal.SIGTERM)
    yield calls
    signal.signal(signal.SIGTERM, handler)


def test_the_demo_is_for_this_machine_alone_unless_told_otherwise(starts, capsys):
    assert cli.main(["demo"]) == 0
    (model, loading), serving, closed = starts

    assert (model, closed, capsys.readouterr().out) == ("tiny", "closed", "http://here/\n")
    assert loading["limits"].upload_bytes == 2 * 2**30
    assert serving == {"host": "127.0.0.1", "port": 7860, "share": False, "auth": None, "open_browser": False}


@pytest.mark.parametrize("options", [["--share"], ["--host", "0.0.0.0"], ["--host", "::"]])
def test_letting_others_in_needs_a_password_or_a_yes(starts, capsys, monkeypatch, options):
    assert cli.main(["demo", *options]) == 1
    assert starts == []
    assert "without a password" in capsys.readouterr().err

    assert cli.main(["demo", *options, "--yes"]) == 0
    assert "without a password" in capsys.readouterr().err
    assert cli.main(["demo", *options, "--auth", "me:secret:too"]) == 0
    assert "without a password" not in capsys.readouterr().err
    assert starts[-2]["auth"] == ("me", "secret:too")
    monkeypatch.setenv("RRVIDEO_DEMO_AUTH", "you:word")
    assert cli.main(["demo", *options]) == 0
    assert starts[-2]["auth"] == ("you", "word")


def test_limits_are_given_on_the_command_line(starts):
    options = "--max-upload 5 --max-length 1:30 --max-frames 64 --max-waiting 3 --memory 0.5 --keep 2 --port 9"
    assert cli.main(["demo", *options.split()]) == 0
    (_, loading), serving, _ = starts
    limits = loading["limits"]

    assert (limits.upload_bytes, limits.duration, limits.max_frames, limits.waiting) == (5_000_000, 90, 64, 3)
    assert (loading["memory"], loading["keep"], serving["port"]) == (500_000_000, 120, 9)


@pytest.mark.parametrize("options", [["--auth", "me"], ["--auth", ":x"], ["--auth", "me:"]])
def test_half_a_password_is_no_password(starts, capsys, options):
    assert cli.main(["demo", *options]) == 1
    assert "USER:PASSWORD" in capsys.readouterr().err


def test_without_gradio_it_is_told_what_to_install(starts, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "rrdemo.app", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)

    assert cli.main(["demo"]) == 1
    assert "pip install 'rrvideo[demo]'" in capsys.readouterr().err


def test_the_command_serves_until_it_is_told_to_end_and_leaves_nothing_behind(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "rrvideo", "demo", "--port", str(port), "--auth", "me:secret"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
    ) as process:
        url = process.stdout.readline().strip()
        assert url == f"http://127.0.0.1:{port}/"
        assert httpx.get(f"{url}config").status_code == 401
        assert [*tmp_path.glob("rr*")] != []
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0

    assert [*tmp_path.glob("rr*")] == []
