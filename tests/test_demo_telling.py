"""What a session tells while it works, and what each answer says of itself afterwards."""

import math
import re
import time
from contextlib import closing
from dataclasses import fields
from types import SimpleNamespace

import pytest

from rrdemo import guard, handlers
from rrdemo import session as session_module
from rrdemo.conversation import Answering, Done, Pause, Phase, Piece, Queued, Settings
from rrdemo.guard import Limits
from rrdemo.layout import Page
from rrdemo.session import Session
from rrdemo.studio import Studio
from rrvideo import RRConfig, VideoQA, engine
from rrvideo.model import Checkpoint
from rrvideo.video import probe

QUESTION = "What colour is the circle?"
SPARSE = RRConfig(block_size=16, stride=4, tau=0.3, min_tokens=0)
LOOK = Settings(fps=4.0, tau=0.3)
MORE = Settings(fps=4.0, tau=0.6)
FULL = Settings(fps=4.0, attention="full")


@pytest.fixture(scope="module")
def qa(folder):
    return VideoQA.load(folder, device="cpu", config=SPARSE)


@pytest.fixture
def session(qa, clip, monkeypatch):
    """A session with a file open that needs no check."""
    monkeypatch.setattr(guard, "check", lambda path, limits, name: probe(path))
    studio = Studio(qa, limits=Limits(answer_tokens=8))
    with closing(studio), closing(Session(studio)) as session:
        session.open_file(clip)
        yield session


def kinds(events):
    return [type(event) for event in events]


def test_where_nothing_happens_for_a_moment_that_is_told_once(session, monkeypatch):
    list(session.watch(LOOK))
    forward = Checkpoint.forward
    monkeypatch.setattr(Checkpoint, "forward", lambda *a, **k: time.sleep(0.05) or forward(*a, **k))
    monkeypatch.setattr(session_module, "PAUSE", 0.01)
    told = kinds(session.ask(QUESTION, LOOK))
    pauses = [number for number, kind in enumerate(told) if kind is Pause]

    assert len(pauses) >= told.count(Piece) > 1  # a word takes five times as long
    assert all(told[number - 1] is not Pause for number in pauses)
    assert told[-1] is Done


def test_the_page_shows_the_end_of_each_phase_however_seldom_it_looks(session, monkeypatch):
    monkeypatch.setattr(handlers, "GLANCE", math.inf)
    page = SimpleNamespace(**{field.name: field.name for field in fields(Page)})
    chat = handlers.Handlers(page, SimpleNamespace(session=lambda key: session))
    updates = chat.watch(SimpleNamespace(session_hash="tab"), "", "", 4.0, 768, "uniform", "rr", 0.3)
    shown = " ".join(update.get("progress", "") for update in updates)
    counts = re.findall(r"([\d,]+) of ([\d,]+) (frames|tokens)", shown)

    assert {done == total for done, total, _ in counts[-3:]} == {True}
    assert [unit for _, _, unit in counts[-3:]] == ["frames", "frames", "tokens"]


def test_it_is_told_when_the_model_begins_to_answer_with_or_without_a_watch_before(session):
    first, second = (kinds(session.ask(QUESTION, LOOK)) for _ in range(2))
    with session.studio.answering.turn(engine.Cancel(), print):
        events = session.ask(QUESTION, LOOK)
        waiting = [next(events), next(events)]
    third = kinds(events)

    for told in (first, second, third):
        assert told.count(Answering) == 1
        assert told.index(Answering) < told.index(Piece)
    assert first.index(Answering) > max(number for number, kind in enumerate(first) if kind is Phase)
    assert kinds(waiting) == [Queued, Pause]  # not yet


def test_an_answer_knows_what_was_seen_of_the_video_whatever_is_planned_later(session):
    seen = Settings(fps=1.0, start=1.0, end=5.0, tau=0.3)
    plan = session.plan(seen)
    list(session.ask(QUESTION, seen))
    session.plan(Settings(fps=8.0))

    (turn,) = session.turns
    assert (turn.clip, turn.times, turn.interval) == ((1.0, 5.0), plan.times, plan.interval)


def test_each_answer_says_how_it_compares_with_the_other_attention_once_both_were_run(session):
    list(session.ask(QUESTION, LOOK))
    assert (session.turns[0].speed_up, session.turns[0].compared) == (None, None)
    list(session.ask(QUESTION, FULL))
    sparse, full = session.turns

    assert sparse.density < full.density == 1
    assert sparse.speed_up == pytest.approx(full.timings.prefill / sparse.timings.prefill)
    assert full.speed_up == pytest.approx(1 / sparse.speed_up)
    assert (sparse.compared, full.compared.mode) == (FULL.watched, "RRAttention, tau 0.3")
    list(session.ask(QUESTION, Settings(fps=2.0, tau=0.3)))
    assert session.turns[2].speed_up is None  # of other frames


def test_a_comparison_that_was_made_stays_and_a_new_one_is_with_what_was_run_last(session):
    for settings in (LOOK, FULL, MORE):
        list(session.ask(QUESTION, settings))
    before = session.turns[1]
    assert before.compared == LOOK  # not MORE, which came later

    list(session.ask(QUESTION, LOOK))
    list(session.regenerate(FULL))
    assert session.turns[1] == before
    list(session.ask(QUESTION, MORE))
    list(session.ask(QUESTION, LOOK))
    list(session.ask(QUESTION, FULL))
    assert session.turns[-1].compared == LOOK
    assert session.turns[-1].speed_up == pytest.approx(
        session.turns[-2].timings.prefill / session.turns[-1].timings.prefill
    )
