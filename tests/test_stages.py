"""Threads that work ahead of each other, and what ends them."""

import threading
import time
import traceback
from itertools import count

import pytest

from rrvideo import stages
from rrvideo.errors import Cancelled, VideoError
from rrvideo.stages import Cancel, Stages

SOON = 5.0  # seconds in which whatever is to happen has happened


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = {*threading.enumerate()}
    yield
    assert {*threading.enumerate()} <= before


def numbers(stop, made=None):
    for number in range(stop):
        if made is not None:
            made.append(number)
        yield number


def test_all_items_come_in_order_through_several_stages():
    with Stages(Cancel()) as threads:
        doubled = (2 * number for number in threads.ahead(numbers(500), room=3))
        assert [*threads.ahead(doubled, room=1)] == [*range(0, 1000, 2)]


@pytest.mark.parametrize("room", [1, 4])
def test_a_stage_works_ahead_as_far_as_there_is_room_and_no_farther(room):
    made = []
    with Stages(Cancel()) as threads:
        items = threads.ahead(numbers(100, made), room=room)
        for taken in range(1, 4):
            next(items)
            deadline = time.monotonic() + SOON
            while len(made) < taken + room and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.02)
            assert len(made) == taken + room


def test_an_error_in_a_thread_reaches_the_taker_with_where_it_happened():
    error = ZeroDivisionError("as asked")

    def fail_in_here():
        yield 1
        raise error

    with Stages(Cancel()) as threads:
        passed_on = (number for number in threads.ahead(fail_in_here(), room=9))
        items = threads.ahead(passed_on, room=9)
        assert next(items) == 1
        with pytest.raises(ZeroDivisionError) as failure:
            next(items)
    assert failure.value is error
    assert "fail_in_here" in {frame.name for frame in traceback.extract_tb(failure.value.__traceback__)}


def test_leaving_ends_the_threads_and_closes_their_sources_there():
    closed = []

    def endless():
        try:
            yield from count()
        finally:
            closed.append(threading.current_thread())

    with pytest.raises(KeyboardInterrupt), Stages(Cancel()) as threads:
        further = (number for number in threads.ahead(endless(), room=2))
        next(threads.ahead(further, room=2))
        raise KeyboardInterrupt
    assert len(closed) == 1
    assert closed[0] is not threading.current_thread()


def test_cancelling_wakes_whoever_waits():
    cancel, gate = Cancel(), threading.Event()

    def waiting():
        gate.wait(SOON)
        yield 1

    threading.Timer(0.05, cancel.cancel).start()
    start = time.monotonic()
    with pytest.raises(Cancelled), Stages(cancel) as threads:
        try:
            next(threads.ahead(waiting(), room=1))
        finally:
            gate.set()
    assert time.monotonic() - start < SOON / 2


def test_what_is_cancelled_gives_nothing_more_even_if_there_is_something():
    cancel = Cancel()
    with Stages(cancel) as threads:
        items = threads.ahead(numbers(100), room=50)
        assert next(items) == 0
        cancel.cancel()
        with pytest.raises(Cancelled):
            next(items)
    assert cancel.cancelled


def test_a_reader_that_stalls_is_an_error_and_is_left_to_itself(monkeypatch):
    monkeypatch.setattr(stages, "GRACE", 0.1)
    gate, closed = threading.Event(), threading.Event()

    def stalling():
        try:
            yield 1
            gate.wait(SOON)
            yield 2
        finally:
            closed.set()

    start = time.monotonic()
    with pytest.raises(VideoError, match=r"no frame for 0\.2 seconds"), Stages(Cancel()) as threads:
        list(threads.ahead(stalling(), room=1, patience=0.2))
    assert 0.2 <= time.monotonic() - start < SOON / 2
    (abandoned,) = (thread for thread in threading.enumerate() if thread.daemon and "stages" in repr(thread._target))
    gate.set()
    abandoned.join(SOON)
    assert closed.is_set()


def test_patience_is_with_the_reader_and_not_with_the_taker():
    with Stages(Cancel()) as threads:
        items = threads.ahead(numbers(3), room=1, patience=0.1)
        assert [(time.sleep(0.15), item)[1] for item in items] == [0, 1, 2]
