"""What sessions share: the model, the line before it, and the memory for open videos."""

import gc
import subprocess
import sys
import threading
import time
import weakref
from contextlib import ExitStack
from itertools import islice

import pytest
from checkpoints import make_checkpoint
from clips import numbered_frames, write_video

from rrdemo.conversation import Note, Phase, Queued, Settings
from rrdemo.guard import Limits
from rrdemo.studio import Line, Studio
from rrvideo import BudgetError, Cancel, Cancelled, RRConfig, RRVideoError, VideoQA, engine
from rrvideo.frameindex import scan
from rrvideo.video import FrameStream

SPARSE = RRConfig(block_size=16, stride=4, tau=0.3, min_tokens=0)
SOON = 20.0  # seconds in which whatever is to happen has happened
ALL = Settings(fps=4.0)
HALF = Settings(fps=4.0, end=3.0)


@pytest.fixture(scope="module")
def qa(tmp_path_factory):
    return VideoQA.load(make_checkpoint(tmp_path_factory.mktemp("model")), device="cpu", config=SPARSE)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Six seconds, in which every frame is another."""
    return scan(write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", numbered_frames(144, width=84, height=56)))


@pytest.fixture
def make_studio(qa):
    with ExitStack() as stack:

        def make(**options):
            studio = Studio(qa, **options)
            stack.callback(studio.close)
            return studio

        yield make


class Clock:
    """A clock that goes when it is told to."""

    now = 0.0

    def __call__(self):
        return self.now


def opened(studio, session, index, settings, *, cancel=None, events=None, remarks=None):
    return studio.video(
        session,
        index,
        settings,
        cancel=cancel or Cancel(),
        tell=(events if events is not None else []).append,
        remark=(remarks if remarks is not None else []).append,
    )


def use(*arguments, **options):
    with opened(*arguments, **options) as video:
        return video


def until_cancelled(context, left):
    """Enter and leave `context`, and note if that ends in `Cancelled`."""
    try:
        with context:
            pass
    except Cancelled:
        left.append("cancelled")


def need(studio, index, settings):
    """Bytes that are kept, and that a watch needs."""
    _, budget = studio.plan(index, settings)
    return budget.kv_bytes, budget.kv_bytes + budget.activation_bytes


def wait_for(condition):
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_people_have_their_turns_in_the_order_in_which_they_came():
    line, served, told = Line(10), [], {}
    gate = threading.Event()

    def come(name):
        with line.turn(Cancel(), told.setdefault(name, []).append):
            served.append(name)
            if name == "a":
                gate.wait(SOON)

    threads = [threading.Thread(target=come, args=(name,)) for name in "abcd"]
    for number, thread in enumerate(threads, start=1):
        thread.start()
        wait_for(lambda number=number: len(line) == number)
    wait_for(lambda: told["d"])
    gate.set()
    for thread in threads:
        thread.join(SOON)

    assert served == [*"abcd"]
    assert told["a"] == []
    assert told["b"] == [1]
    assert told["d"] == sorted(told["d"], reverse=True)
    assert told["d"][0] == 3
    assert len(line) == 0


def test_who_is_cancelled_leaves_the_line_and_too_many_are_not_let_in():
    line, cancel, left = Line(1), Cancel(), []
    with line.turn(Cancel(), print):
        waiting = threading.Thread(target=until_cancelled, args=(line.turn(cancel, print), left))
        waiting.start()
        wait_for(lambda: len(line) == 2)
        cancelled = Cancel()
        cancelled.cancel()
        with pytest.raises(RRVideoError, match="1 person is waiting"), line.turn(cancelled, print):
            pass
        cancel.cancel()
        waiting.join(SOON)
        assert left == ["cancelled"]
        assert len(line) == 1
    assert len(line) == 0


def test_one_watches_at_a_time_and_the_others_are_told_where_they_stand(make_studio, index, monkeypatch):
    studio, watch, at_once, together = make_studio(), engine.watch, [], []
    gate = threading.Event()

    def counted(*arguments, **options):
        together.append(1)
        at_once.append(len(together))
        gate.wait(SOON)
        watched = watch(*arguments, **options)
        together.pop()
        return watched

    monkeypatch.setattr(engine, "watch", counted)
    events = {name: [] for name in "abc"}
    threads = [
        threading.Thread(target=use, args=(studio, name, index, ALL), kwargs={"events": events[name]}) for name in "abc"
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: sum(isinstance(event, Queued) for told in events.values() for event in told) >= 2)
    assert not studio.idle
    gate.set()
    for thread in threads:
        thread.join(SOON)

    assert at_once == [1, 1, 1]
    assert sorted(len([e for e in told if isinstance(e, Queued)]) for told in events.values()) in ([0, 1, 1], [0, 1, 2])
    assert studio.idle


def test_a_watch_tells_of_each_phase_and_ends_with_its_own_seconds(make_studio, index):
    studio, events = make_studio(), []
    video = use(studio, "a", index, ALL, events=events)
    phases = {name: [e for e in events if isinstance(e, Phase) and e.name == name] for name in video.seconds}

    for name, told in phases.items():
        assert [event.done for event in told] == sorted(event.done for event in told)
        assert (told[0].done, told[-1].done) == (0, told[-1].total)
        assert [event.finished for event in told] == [False] * (len(told) - 1) + [True]
        assert told[-1].seconds == video.seconds[name]
        assert [event.seconds for event in told] == sorted(event.seconds for event in told)
    assert phases["encode"][-1].total == len(video.plan.indices) == 24
    assert [event.done for event in phases["decode"]] == [*range(25), 24]  # each frame, and not when it is encoded


def test_what_could_not_be_decoded_is_not_told_as_done(make_studio, index, monkeypatch):
    studio, events, iterate = make_studio(), [], FrameStream.__iter__
    monkeypatch.setattr(FrameStream, "__iter__", lambda stream: islice(iterate(stream), 18))
    video = use(studio, "a", index, ALL, events=events)
    last = {event.name: event for event in events if isinstance(event, Phase)}

    assert all(event.finished for event in last.values())
    assert (last["decode"].done, last["decode"].total, last["encode"].done) == (18, 24, 18)
    assert last["prefill"].done == last["prefill"].total == len(video._watched.prefix)


def test_frames_are_told_as_they_are_decoded_before_any_is_encoded(make_studio, index, monkeypatch):
    studio, events, encode, by_then = make_studio(), [], engine._encode, []

    def encoding(*arguments):
        by_then.append(max(event.done for event in events if isinstance(event, Phase) and event.name == "decode"))
        return encode(*arguments)

    monkeypatch.setattr(engine, "_encode", encoding)
    use(studio, "a", index, ALL, events=events)
    phases = [event for event in events if isinstance(event, Phase) and event.done and not event.finished]

    assert by_then == [24]
    assert [event.name for event in phases][:25] == ["decode"] * 24 + ["encode"]


def test_both_kinds_of_attention_watch_with_one_set_of_weights(make_studio, index, qa):
    studio = make_studio()
    sparse, full = (use(studio, "a", index, Settings(fps=4.0, attention=kind, tau=0.3)) for kind in ("rr", "full"))

    assert sparse.density < full.density == 1
    assert sparse.density == qa.watch(index, fps=4.0).density
    assert next(sparse._watched.checkpoint.model.parameters()) is next(full._watched.checkpoint.model.parameters())
    assert use(studio, "a", index, Settings(fps=4.0, attention="full", tau=0.5)) is full  # which has no tau
    assert use(studio, "b", index, Settings(fps=4.0, attention="full")) is not full  # nobody shares what is theirs


def test_the_least_recently_used_video_is_closed_to_make_room_and_its_memory_is_free(make_studio, index):
    kept, watching = need(make_studio(), index, ALL)
    studio, remarks = make_studio(memory=2 * kept + watching - 1), {name: [] for name in "abc"}
    for name in "aba":
        use(studio, name, index, ALL, remarks=remarks[name])
    keys = weakref.ref(use(studio, "b", index, ALL)._watched.cache)
    use(studio, "a", index, ALL)
    assert studio.taken == 2 * kept
    use(studio, "c", index, ALL)
    gc.collect()

    assert keys() is None
    assert [len(remarks[name]) for name in "abc"] == [0, 1, 0]
    assert "make room" in remarks["b"][0]
    assert [studio.is_open(name, ALL) for name in "abc"] == [True, False, True]
    assert studio.taken == 2 * kept


def test_a_video_that_answers_is_not_closed_but_awaited(make_studio, index):
    kept, watching = need(make_studio(), index, ALL)
    studio, cancel, left = make_studio(memory=kept + watching - 1), Cancel(), []
    use(studio, "a", index, ALL)
    with opened(studio, "a", index, ALL) as video:
        impatient = threading.Thread(
            target=until_cancelled, args=(opened(studio, "b", index, ALL, cancel=cancel), left)
        )
        patient = threading.Thread(target=use, args=(studio, "c", index, ALL))
        for thread in (impatient, patient):
            thread.start()
            wait_for(lambda: not studio.idle)
        cancel.cancel()
        impatient.join(SOON)
        patient.join(0.3)
        assert left == ["cancelled"]
        assert patient.is_alive()
        assert video.ask("What?", max_new_tokens=2)
    patient.join(SOON)

    assert [studio.is_open(name, ALL) for name in "abc"] == [False, False, True]


def test_a_watch_that_needs_more_than_there_is_says_so_before_it_begins(make_studio, index, monkeypatch):
    _, watching = need(make_studio(), index, ALL)
    studio = make_studio(memory=watching - 1)
    monkeypatch.setattr(engine, "watch", lambda *_, **__: pytest.fail("it was watched"))

    with pytest.raises(BudgetError, match="fewer frames"):
        use(studio, "a", index, ALL)
    with pytest.raises(BudgetError, match=r"768 frames are more .* \(ask for 10 at most"):
        use(make_studio(limits=Limits(max_frames=10)), "a", index, ALL)
    assert (studio.taken, studio.idle) == (0, True)


def test_a_watch_that_is_stopped_or_fails_leaves_nothing_behind(make_studio, index, monkeypatch):
    studio, cancel, events = make_studio(), Cancel(), []

    def stop_at_the_first_chunk(event):
        events.append(event)
        if isinstance(event, Phase) and event.done:
            cancel.cancel()

    with (
        pytest.raises(Cancelled),
        studio.video("a", index, ALL, cancel=cancel, tell=stop_at_the_first_chunk, remark=print),
    ):
        pass
    assert (studio.taken, studio.idle, studio.is_open("a", ALL)) == (0, True, False)

    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(engine, "watch", lambda *_, **__: 1 // 0)
        use(studio, "a", index, ALL)
    assert (studio.taken, studio.idle) == (0, True)
    assert use(studio, "a", index, HALF).ask("What?", max_new_tokens=2)


def test_what_nobody_uses_is_put_away_after_a_while(make_studio, index):
    clock = Clock()
    studio, remarks = make_studio(keep=100.0, clock=clock), []
    use(studio, "a", index, ALL, remarks=remarks)
    use(studio, "b", index, HALF)
    clock.now = 60.0
    use(studio, "b", index, HALF)
    with opened(studio, "c", index, HALF):
        clock.now = 150.0
        studio.sweep()
        assert [studio.is_open(*key) for key in (("a", ALL), ("b", HALF), ("c", HALF))] == [False, True, True]
        clock.now = 1000.0
        studio.sweep()
        assert studio.is_open("c", HALF)
    assert len(remarks) == 1
    assert not studio.is_open("b", HALF)


def test_old_videos_are_put_away_without_being_asked_to(make_studio, index):
    studio = make_studio(keep=0.05)
    use(studio, "a", index, HALF)
    wait_for(lambda: not studio.is_open("a", HALF))


def test_one_session_that_ends_takes_only_its_own_with_it(make_studio, index):
    studio = make_studio()
    mine, yours = use(studio, "a", index, HALF), use(studio, "b", index, HALF)
    studio.release("a")

    with pytest.raises(RuntimeError, match="closed"):
        mine.ask("What?")
    assert yours.ask("What?", max_new_tokens=2)


def test_frames_for_which_the_model_has_no_room_are_left_out_and_told(make_studio, index, monkeypatch):
    studio, events = make_studio(), []
    monkeypatch.setattr("rrvideo.budget.ROOM", studio.qa.checkpoint.context_length - 60)
    plan, budget = studio.plan(index, ALL)
    use(studio, "a", index, ALL, events=events)
    notes = [event.text for event in events if isinstance(event, Note)]

    assert budget.fits
    assert 0 < budget.frames == len(plan.indices) < 24
    assert notes == [
        f"24 frames need {notes[0].split()[3]} positions, and the model's context has 60 for a video: "
        f"{budget.frames} frames are taken"
    ]


def test_the_embedded_model_goes_by_its_short_name():
    studio = Studio.load(device="cpu", memory=10**9)
    studio.close()

    assert (studio.model, studio.memory) == ("tiny", 10**9)


def test_the_state_of_a_chat_is_made_without_gradio_and_loads_nothing_heavy():
    script = "import sys, rrdemo.session, rrdemo.samples; print(*{'gradio', 'torch', 'transformers'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout == "\n"
