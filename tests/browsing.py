"""Fixtures of the tests that use the chat, in a browser or as programs do; they name this a plugin."""

import threading
import time

import pytest
from chatting import browser, open_sample, opened, served

from rrvideo import engine, video

LARGEST = 1_000_000  # bytes of an upload
WAIT = 20_000  # milliseconds


@pytest.fixture(scope="session")
def chat():
    """One server for all tests; it runs in a thread, so that a patch of `time` itself would stop its timers, too."""
    with served(upload_bytes=LARGEST) as running:
        yield running


@pytest.fixture(scope="module")
def chromium():
    with browser() as running:
        yield running


@pytest.fixture(scope="module")
def context(chromium):
    """One profile for all pages, which spares them loading the same scripts; each page is a person of its own."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    context.set_default_timeout(WAIT)
    pytest.importorskip("playwright.sync_api").expect.set_options(timeout=WAIT)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    yield context
    context.close()


@pytest.fixture(scope="module")
def sample_page(context, chat):
    with opened(context, chat) as page:
        open_sample(page)
        page.get_by_text("Clip, frames and attention").click()
        page.get_by_text("Take it with you").click()
        yield page


@pytest.fixture
def page(sample_page):
    """A page on which the sample is open, watched or not; others have used it before, and left it as it was."""
    yield sample_page
    assert sample_page.problems == []


@pytest.fixture
def frames(monkeypatch):
    """A reader that takes its time, and counts the frames that it has read."""
    read, numbers = video.READERS["pyav"], []

    def slow(*args, **options):
        for number, image in read(*args, **options):
            numbers.append(number)
            time.sleep(0.04)
            yield number, image

    monkeypatch.setitem(video.READERS, "pyav", slow)
    return numbers


@pytest.fixture
def more_words(monkeypatch):
    """A model that after its first word waits for this event."""
    generate, said = engine.Watched.generate, threading.Event()

    def held(self, *args, **options):
        for token in generate(self, *args, **options):
            yield token
            said.wait(WAIT / 1000)

    monkeypatch.setattr(engine.Watched, "generate", held)
    yield said
    said.set()


@pytest.fixture
def slow_words(monkeypatch):
    """A model that takes its time between two tokens."""
    generate = engine.Watched.generate

    def slow(self, *args, **options):
        for token in generate(self, *args, **options):
            time.sleep(0.3)
            yield token

    monkeypatch.setattr(engine.Watched, "generate", slow)
