"""What the chat takes from its page, who comes to it, and its command; the browser has its own tests."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import httpx
import pytest

from rrdemo.app import serve
from rrdemo.guard import Limits
from rrdemo.handlers import Handlers, read_settings
from rrdemo.layout import theme
from rrdemo.visitors import PATIENCE, Visitors
from rrvideo import cli
from rrvideo.errors import RRVideoError


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
        ({"start": "soon"}, "soon"),
        ({"start": "9", "end": "3"}, "ends before"),
        ({"end": "-5"}, "'-5'"),
        ({"fps": None}, "frames per second must be a number"),
        ({"fps": -1}, "above 0"),
        ({"max_frames": 0.5}, "frames at most must be a whole number"),
        ({"max_frames": None}, "frames at most must be a whole number"),
    ],
)
def test_settings_that_make_no_sense_are_told(changed, told):
    given = {"start": "", "end": "", "fps": 1, "max_frames": 768, "sampling": "uniform", "attention": "rr", "tau": 0.9}
    with pytest.raises(RRVideoError, match=told):
        read_settings(**given | changed)


def test_a_plan_for_older_settings_that_reaches_the_page_last_is_made_good():
    names = ("plan", "timeline", "watch", "ask", "stop", "notice", "planned")
    session = SimpleNamespace(file=None, busy=False, turns=[], notes=list, is_open=lambda settings: False)
    handlers = Handlers(SimpleNamespace(**{name: name for name in names}), SimpleNamespace(session=lambda key: session))
    request = SimpleNamespace(session_hash="tab")

    newer, older = (("", end, 1, 768, "uniform", "rr", 0.95) for end in ("", "50"))
    late, shown = handlers.plan(request, *older), handlers.plan(request, *newer)
    assert "plan" not in handlers.notes(request, shown["planned"], *newer), "nothing has changed"
    mended = handlers.notes(request, late["planned"], *newer)
    assert mended["planned"] == shown["planned"]
    session.busy = True
    assert "plan" in handlers.notes(request, shown["planned"], *newer), "its buttons are for a session at rest"


def test_a_plan_of_no_file_or_from_before_a_watch_that_reaches_the_page_last_is_made_good(monkeypatch):
    monkeypatch.setattr("rrdemo.handlers.views.plan", lambda view: "a plan")
    monkeypatch.setattr("rrdemo.handlers.timeline", lambda *_, **__: "a timeline")
    names = ("plan", "timeline", "watch", "ask", "stop", "notice", "planned")
    view = SimpleNamespace(fits=True, watched=False)
    session = SimpleNamespace(
        **{"file": None, "busy": False, "turns": [], "notes": list},
        **{"plan": lambda settings: view, "is_open": lambda settings: view.watched},
    )
    handlers = Handlers(SimpleNamespace(**{name: name for name in names}), SimpleNamespace(session=lambda key: session))
    request, settings = SimpleNamespace(session_hash="tab"), ("", "", 1, 768, "uniform", "rr", 0.95)

    late = [handlers.plan(request, *settings)]
    for folder in ("one", "two"):
        session.file = SimpleNamespace(path=f"/tmp/{folder}/video.mp4", duration=9.0)
        late.append(handlers.plan(request, *settings))
    view.watched = True
    shown = handlers.plan(request, *settings)
    assert (shown["watch"]["interactive"], shown["ask"]["interactive"]) == (False, True)
    assert "plan" not in handlers.notes(request, shown["planned"], *settings)
    assert [handlers.notes(request, each["planned"], *settings) for each in late] == [shown] * 3


class Counted:
    """A session that knows whether it was closed."""

    def __init__(self, studio):
        self.id, self.closed = str(id(self)), False

    def close(self):
        self.closed = True


def test_each_tab_has_a_session_of_its_own_which_ends_with_it_or_after_half_a_day(monkeypatch):
    monkeypatch.setattr("rrdemo.visitors.Session", Counted)
    now = 0.0
    visitors = Visitors(None, clock=lambda: now)
    one, other = visitors.session("one"), visitors.session("other")
    assert visitors.session("one") is one is not other
    assert visitors.find(other.id) is other
    assert visitors.find("nobody") is None

    visitors.leave("one")
    visitors.leave("one")
    assert (one.closed, other.closed, len(visitors)) == (True, False, 1)
    now += PATIENCE + 1
    third = visitors.session("third")
    assert (other.closed, third.closed, len(visitors)) == (True, False, 1)
    visitors.close()
    assert third.closed


def test_fonts_and_styles_come_from_nowhere_else():
    css = theme()._get_theme_css()

    assert theme()._stylesheets == []
    assert re.findall(r"@import.*|url\((?!.data:).*", css) == []


def test_a_port_that_is_taken_is_told_in_our_words_and_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    studio = SimpleNamespace(model="tiny", limits=Limits())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RRVideoError, match=f"port {taken.getsockname()[1]}: is it taken") as told:
            serve(studio, port=taken.getsockname()[1])

    assert "GRADIO" not in str(told.value)
    assert [*tmp_path.iterdir()] == []


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
    assert loading["limits"].upload_bytes == 2_000_000_000
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
