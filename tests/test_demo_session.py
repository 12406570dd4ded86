"""One person's chat: what is watched once, what is said, what stops, and what is left of it: nothing."""

import math
import stat
import threading
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rrdemo.conversation import Done, Note, Phase, Piece, Queued, Settings, Stopped, Watched
from rrdemo.guard import Limits
from rrdemo.session import Session
from rrdemo.studio import Studio
from rrvideo import RRConfig, RRVideoError, VideoError, VideoQA, engine
from rrvideo.model import Checkpoint

QUESTION = "What colour is the circle?"
OTHER = "How many scenes are there?"
THIRD = "Describe the video."
SPARSE = RRConfig(block_size=16, stride=4, tau=0.3, min_tokens=0)
LOOK = Settings(fps=4.0, tau=0.3)
FULL = Settings(fps=4.0, attention="full")
TOKENS = 8
LIMITS = Limits(answer_tokens=TOKENS)
SOON = 20.0  # seconds in which whatever is to happen has happened


@pytest.fixture(scope="module")
def qa(folder):
    return VideoQA.load(folder, device="cpu", config=SPARSE)


@pytest.fixture
def begin(qa, clip, monkeypatch):
    """Makes sessions of one studio, with a file open that needs no check."""
    from rrdemo import guard
    from rrvideo.video import probe

    with ExitStack() as stack:
        studios = {}

        def make(*, limits=LIMITS, **options):
            key = str((limits, options))
            if key not in studios:
                studios[key] = Studio(qa, limits=limits, **options)
                stack.callback(studios[key].close)
            session = Session(studios[key])
            stack.callback(session.close)
            with monkeypatch.context() as patched:
                patched.setattr(guard, "check", lambda path, limits, name: probe(path))
                session.open_file(clip, name="clip.mp4")
            return session

        yield make


@pytest.fixture
def watches(monkeypatch):
    """How often a video is prefilled."""
    calls, watch = [], engine.watch
    monkeypatch.setattr(engine, "watch", lambda *a, **o: (calls.append(1), watch(*a, **o))[1])
    return calls


def of_kind(events, kind):
    return [event for event in events if isinstance(event, kind)]


def slow_passes(monkeypatch):
    """Make the model slow enough to be stopped in the middle of an answer; returns a list that its passes lengthen."""
    passes, forward = [], Checkpoint.forward

    def slow(*arguments, **options):
        passes.append(1)
        time.sleep(0.02)
        return forward(*arguments, **options)

    monkeypatch.setattr(Checkpoint, "forward", slow)
    return passes


def wait_for(condition):
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_video_is_watched_once_for_the_whole_conversation(begin, qa, clip, watches):
    session = begin()
    first, second = list(session.ask(QUESTION, LOOK)), list(session.ask(OTHER, LOOK))
    with qa.watch(clip, fps=4.0) as video:
        chat = video.chat()
        expected = [chat.ask(text, max_new_tokens=TOKENS) for text in (QUESTION, OTHER)]

    assert len(watches) == 2  # one of them is the test's own
    assert of_kind(first, Phase)
    assert not of_kind(second, Phase)
    assert len(session.thumbnails(session.turns[0], count=3)) == 3
    assert [turn.answer for turn in session.turns] == [answer.text for answer in expected]
    assert [turn.attention for turn in session.turns] == [answer.attention for answer in expected]
    assert [list(turn.evidence) for turn in session.turns] == [answer.evidence for answer in expected]
    for events, turn in zip((first, second), session.turns, strict=True):
        assert "".join(piece.text for piece in of_kind(events, Piece)) == turn.answer
        assert events[-1] == Done(turn)


def test_watching_first_leaves_the_question_nothing_to_watch(begin, watches):
    session = begin()
    assert not session.plan(LOOK).watched
    events = list(session.watch(LOOK))
    assert session.plan(LOOK).watched
    again = list(session.watch(LOOK))
    answered = list(session.ask(QUESTION, LOOK))

    assert len(watches) == 1
    assert isinstance(events[-1], Watched)
    assert events[-1].density < 1
    assert again == [events[-1]]
    assert not of_kind(answered, Phase)
    assert session.settings == LOOK
    assert session.turns[0].density == events[-1].density


def test_a_plan_is_what_the_watch_then_takes_and_decodes_nothing(begin, monkeypatch):
    session = begin()
    with monkeypatch.context() as patched:
        patched.setattr("rrvideo.readers.read_pyav", lambda *_, **__: pytest.fail("it was decoded"))
        plan = session.plan(Settings(fps=2.0, start=1.0, end=5.0, tau=0.3))
    list(session.ask(QUESTION, Settings(fps=2.0, start=1.0, end=5.0, tau=0.3)))
    usage = session.turns[0].usage

    assert (plan.frames, plan.visual_tokens) == (usage.frames, usage.visual_tokens) == (8, plan.visual_tokens)
    assert (plan.start, plan.end, plan.fits) == (1.0, 5.0, True)
    assert plan.interval == pytest.approx(max(np.diff(plan.times)))
    assert plan.kv_bytes < plan.memory_bytes
    assert not begin(memory=plan.memory_bytes - 1).plan(Settings(fps=2.0, start=1.0, end=5.0)).fits
    with pytest.raises(VideoError, match="the clip starts at 0:07"):
        session.plan(Settings(start=7.0))


@pytest.mark.parametrize("where", ["prefill", "queue"])
def test_a_stop_while_it_watches_ends_the_work_and_the_next_question_starts_clean(begin, monkeypatch, where):
    monkeypatch.setattr("rrvideo.budget.CHUNK_FRAMES", 2)
    monkeypatch.setattr(engine, "chunk_tokens", lambda device: 16)
    session, forward, passes, at_stop = begin(), Checkpoint.forward, [], []

    def counted(*arguments, **options):
        passes.append(1)
        if len(passes) == 2 and where == "prefill":
            session.stop()
            at_stop.append(len(passes))
        return forward(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "forward", counted)
        if where == "queue":
            with session.studio.watching.turn(engine.Cancel(), print):
                events = session.ask(QUESTION, LOOK)
                assert isinstance(next(events), Queued)
                session.stop()
                events = list(events)
        else:
            events = list(session.ask(QUESTION, LOOK))
    assert events[-1] == Stopped(session.turns[-1])
    assert len(passes) == len(at_stop) * 2  # no chunk was begun after the stop
    assert (session.busy, session.studio.idle, session.studio.taken) == (False, True, 0)
    assert (session.turns[-1].answer, session.turns[-1].stopped) == ("", True)

    assert isinstance(list(session.regenerate())[-1], Done)
    assert [turn.stopped for turn in session.turns] == [False]


def test_a_stop_while_it_answers_ends_within_a_token_and_is_not_remembered(begin, monkeypatch):
    session = begin(limits=Limits(answer_tokens=60))
    list(session.watch(LOOK))
    with monkeypatch.context() as patched:
        passes = slow_passes(patched)
        events = session.ask(QUESTION, LOOK)
        said = next(event.text for event in events if isinstance(event, Piece))
        session.stop()
        at_stop = len(passes)
        rest = list(events)
    assert len(passes) <= at_stop + 1  # the one that was under way
    stopped = rest[-1].turn
    assert isinstance(rest[-1], Stopped)
    assert stopped.answer == said + "".join(piece.text for piece in of_kind(rest, Piece))
    assert stopped.stopped
    assert session.turns == [stopped]

    list(session.ask(OTHER, LOOK))
    after_stop = session.turns[1].answer
    session.clear()
    list(session.ask(OTHER, LOOK))
    assert session.turns[0].answer == after_stop


@pytest.mark.parametrize("when", ["watching", "answering"])
def test_a_reader_that_leaves_stops_the_work(begin, monkeypatch, when):
    session = begin(limits=Limits(answer_tokens=60))
    with monkeypatch.context() as patched:
        slow_passes(patched)
        with closing(session.ask(QUESTION, LOOK)) as events:
            next(event for event in events if isinstance(event, Phase if when == "watching" else Piece))
        wait_for(lambda: not session.busy)

    assert [turn.stopped for turn in session.turns] == [True]
    assert isinstance(list(session.ask(QUESTION, LOOK))[-1], Done)


def test_one_thing_at_a_time(begin):
    session = begin()
    events = session.ask(QUESTION, LOOK)
    next(events)
    with pytest.raises(RRVideoError, match="still being answered"):
        list(session.ask(OTHER, LOOK))
    assert isinstance(list(events)[-1], Done)
    assert [turn.question for turn in session.turns] == [QUESTION]


def test_regenerate_edit_and_undo_change_what_the_model_remembers(begin, qa, clip):
    session = begin()
    for question in (QUESTION, OTHER):
        list(session.ask(question, LOOK))
    before = list(session.turns)
    list(session.regenerate())
    assert [turn.answer for turn in session.turns] == [turn.answer for turn in before]

    list(session.edit(0, THIRD))
    with qa.watch(clip, fps=4.0) as video:
        chat = video.chat()
        expected = [chat.ask(text, max_new_tokens=TOKENS).text for text in (THIRD, OTHER)]
    assert [turn.question for turn in session.turns] == [THIRD]
    list(session.ask(OTHER, LOOK))
    assert [turn.answer for turn in session.turns] == expected
    assert session.undo().question == OTHER
    assert session.undo().question == THIRD
    assert session.undo() is None
    with pytest.raises(RRVideoError, match="no such question"):
        list(session.regenerate())


def test_a_chat_that_outgrows_the_context_forgets_its_beginning_and_says_so(begin, monkeypatch):
    session = begin()
    for question in (QUESTION, OTHER):
        list(session.ask(question, LOOK))
    need = session.studio.plan(session._index(), LOOK)[1]
    context = need.positions + session.turns[1].usage.prompt_tokens - need.prompt_tokens + TOKENS + 5
    monkeypatch.setattr(Checkpoint, "context_length", property(lambda _: context))
    events = list(session.ask(THIRD, LOOK))

    assert isinstance(events[-1], Done)
    assert "remembers all but the first" in of_kind(events, Note)[0].text


def test_what_happened_meanwhile_is_told_once(begin):
    session = begin()
    list(session.ask(QUESTION, LOOK))
    session.studio.keep = -1.0
    session.studio.sweep()
    session.studio.keep = 1000.0
    events = list(session.ask(OTHER, LOOK))

    assert "put away" in of_kind(events, Note)[0].text
    assert of_kind(events, Phase)
    assert session.notes() == []


def test_what_cannot_be_asked_is_refused_and_leaves_no_turn(begin):
    session, few = begin(limits=Limits(characters=30, max_frames=100)), Settings(max_frames=100)
    for question, settings, said in (
        (" \n", few, "must not be empty"),
        ("why? " * 10, few, "up to 30 characters, and this has 50"),
        (QUESTION, Settings(max_frames=101), "ask for 100 at most"),
        (QUESTION, replace(few, start=60.0), "the clip starts at 1:00"),
    ):
        with pytest.raises(RRVideoError, match=said):
            list(session.ask(question, settings))
    assert session.turns == []
    assert not session.busy
    with pytest.raises(RRVideoError, match="no video is open"):
        list(Session(session.studio).ask(QUESTION, LOOK))


@pytest.mark.parametrize(
    "wrong",
    [*({name: value} for name in ("fps", "max_frames", "tau") for value in (0, -1, 1e9, math.nan, math.inf, None, "x")
       if (name, value) != ("max_frames", 1e9)),
     {"max_frames": 0.5}, {"sampling": "random"}, {"attention": "half"}, {"tau": 1.1}, {"start": -1.0},
     {"start": 2.0, "end": 1.0}],
    ids=str,
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused_in_words(wrong):
    with pytest.raises(RRVideoError) as refusal:
        Settings(**wrong)
    name = [*wrong][-1]
    named = {"fps": "frames per second", "max_frames": "frames at most", "start": "clip", "end": "clip"}
    assert named.get(name, name) in refusal.value.message


def test_a_budget_that_json_has_made_a_fraction_is_a_whole_number():
    assert str(Settings(max_frames=8.0).max_frames) == "8"
    assert isinstance(Settings(max_frames=8.0).max_frames, int)


def test_each_session_has_a_copy_of_its_own_that_goes_with_it(begin, clip, monkeypatch):
    def not_here(*_):
        raise OSError("another disk")

    one = begin()
    assert clip.samefile(one.file.path)  # which costs nothing
    with monkeypatch.context() as patched:
        patched.setattr("os.link", not_here)
        other = begin()
    paths = [Path(session.file.path) for session in (one, other)]

    assert one.id != other.id
    assert paths[0] != paths[1] != clip
    assert all(stat.S_IMODE(path.parent.stat().st_mode) == 0o700 for path in paths)
    assert all(path.read_bytes() == clip.read_bytes() for path in paths)
    list(one.ask(QUESTION, LOOK))
    list(other.ask(OTHER, LOOK))
    assert [turn.question for turn in other.turns] == [OTHER]
    one.close()
    one.close()
    assert [path.parent.exists() for path in paths] == [False, True]
    assert not one.studio.is_open(one.id, LOOK)
    assert one.studio.is_open(other.id, LOOK)
    assert clip.exists()


def test_no_name_that_somebody_gave_becomes_part_of_a_path(begin, clip, tmp_path):
    upload = tmp_path / "a;b$(c).exe"
    upload.write_bytes(clip.read_bytes())
    session = Session(begin().studio)
    with closing(session):
        view = session.open_file(upload, name="../../etc/<b>.mp4")
        assert view.name == "../../etc/<b>.mp4"
        assert Path(view.path).name == "video"
        assert "path" not in view.to_dict()


def test_a_new_file_takes_the_place_of_the_old_one_and_a_refused_one_does_not(begin, clip, tmp_path):
    session = begin()
    list(session.ask(QUESTION, LOOK))
    before, turns = session.file, session.turns
    playlist = tmp_path / "list.mp4"
    playlist.write_text(f"#EXTM3U\n#EXTINF:2,\n{clip}\n#EXT-X-ENDLIST\n")
    with pytest.raises(VideoError, match=r"mine\.mp4 is a playlist"):
        session.open_file(playlist, name="mine.mp4")
    assert (session.file, session.turns) == (before, turns)
    assert isinstance(list(session.ask(OTHER, LOOK))[-1], Done)

    with pytest.raises(RRVideoError, match="did not arrive"):
        session.open_file(tmp_path / "nowhere.mp4")
    session.open_file(clip, name="new.mp4")
    assert not Path(before.path).exists()
    assert (session.file.name, session.turns, session.studio.taken) == ("new.mp4", [], 0)


def test_an_upload_goes_when_it_is_refused_or_with_the_file_that_was_made_of_it(begin, clip, tmp_path):
    session, uploads = begin(), [tmp_path / f"{number}.mp4" for number in range(3)]
    for upload in uploads:
        upload.write_bytes(clip.read_bytes())
    session.open_file(uploads[0], upload=True)
    session.open_file(uploads[0], upload=True)  # once more, which programs may do
    assert uploads[0].exists()
    session.open_file(uploads[1], upload=True)
    assert not uploads[0].exists()

    again = tmp_path / "again.mp4"
    again.write_bytes(clip.read_bytes())
    again.replace(uploads[1])  # somebody else has uploaded the same
    session.open_file(uploads[2], upload=True)
    uploads[0].write_text("no video")
    with pytest.raises(VideoError):
        session.open_file(uploads[0], upload=True)
    session.close()
    assert [upload.exists() for upload in uploads] == [False, True, False]
    assert clip.exists()


def test_closing_in_the_middle_of_the_work_frees_all_as_soon_as_it_has_ended(begin, monkeypatch):
    session, gate, forward = begin(), threading.Event(), Checkpoint.forward
    monkeypatch.setattr(Checkpoint, "forward", lambda *a, **o: (gate.wait(SOON), forward(*a, **o))[1])
    path, events = Path(session.file.path), session.ask(QUESTION, LOOK)
    next(events)
    session.close()
    assert path.exists()
    gate.set()
    assert isinstance(list(events)[-1], Stopped)

    assert not path.parent.exists()
    assert (session.studio.taken, session.file, session.turns, session.busy) == (0, None, [], False)
