"""The chat as a person uses it, in a browser: watching, asking, seeking, stopping, and what is refused."""

import json
import re
import time
from pathlib import Path

import pytest
from chatting import (
    CONTRAST,
    SLIDER,
    UPLOAD,
    ask,
    clear,
    observe,
    open_sample,
    opened,
    position,
    seeks_to,
    session_of,
)

from rrdemo.answers import original
from rrdemo.conversation import Settings
from rrvideo import engine
from rrvideo.cli import SAMPLE
from rrvideo.tiny.sample import sample_world

expect = pytest.importorskip("playwright.sync_api").expect
pytest_plugins = ["browsing"]
FIRST, LAST = (sample_world().scenes[number].name for number in (0, -1))


@pytest.fixture
def watches(monkeypatch):
    """A list that grows with each video that is watched."""
    watched, watch = [], engine.watch
    monkeypatch.setattr(engine, "watch", lambda *args, **options: watched.append(1) or watch(*args, **options))
    return watched


def test_a_video_is_uploaded_watched_once_with_progress_and_asked_twice(context, chat, tmp_path, frames, watches):
    path = tmp_path / "my own.mp4"
    path.write_bytes(SAMPLE.read_bytes())
    with opened(context, chat) as page:
        page.set_input_files(UPLOAD, path)
        page.wait_for_function("document.querySelector('#player video')?.duration > 59")
        assert "60 frames" in page.inner_text("#plan")
        assert "my own.mp4" in page.inner_text("#player")

        observe(page, "#progress")
        page.get_by_role("button", name="Watch", exact=True).click()
        page.wait_for_selector("text=Watched 60 frames")
        seen = "\n".join(page.evaluate("window.seen"))
        assert {int(done) for done in re.findall(r"(\d+) of 60 frames", seen)} > {0, 60}
        assert all(phase in seen for phase in ("Decode", "Encode", "Prefill"))
        page.get_by_role("button", name="Watched", disabled=True).wait_for()

        assert FIRST in ask(page, "What appears first?")
        assert LAST in ask(page, "What appears last?")
        assert watches == [1]


def test_an_answer_is_written_piece_by_piece(page, slow_words):
    observe(page, "#chat .bot-row .message-content")
    answer = ask(page, "What appears first?").splitlines()[0]
    seen = [text.splitlines()[0] for text in page.evaluate("window.seen") if text.strip()]

    written = [text for text in dict.fromkeys(seen) if text and answer.startswith(text)]
    assert len(written) >= 2
    assert written == sorted(written, key=len)


def test_times_and_pictures_of_moments_seek_the_player(page):
    ask(page, "What appears last?")
    link = page.locator("#chat .bot-row").last.locator("a").first
    seconds = float(link.get_attribute("href").removeprefix("#t="))
    assert seconds > 30
    link.click()
    seeks_to(page, seconds)
    assert page.url == page.url.split("#")[0]

    moment = page.locator("#moments button").first
    picture = moment.locator("img")
    assert picture.evaluate("image => image.complete && image.naturalHeight") == 90
    moment.focus()
    page.keyboard.press("Enter")
    seeks_to(page, float(moment.get_attribute("data-time")))


def test_the_timeline_seeks_by_mouse_and_by_key_and_says_what_nobody_saw(page):
    assert "what lies between two" in page.inner_text("#timeline")
    track = page.locator(SLIDER)
    box = track.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
    seeks_to(page, 15)

    track.focus()
    step = float(track.get_attribute("data-step"))
    before = position(page)
    page.keyboard.press("ArrowRight")
    seeks_to(page, before + step, tolerance=0.2)
    for key, seconds in (("PageUp", before + step + 6), ("Home", 0), ("End", 60)):
        page.keyboard.press(key)
        seeks_to(page, seconds)
    assert track.get_attribute("aria-valuetext") == "1:00 of 1:00"
    page.keyboard.press("Home")
    page.keyboard.press(" ")
    page.wait_for_function("document.querySelector('#player video').currentTime > 0.2")
    page.keyboard.press(" ")
    assert page.evaluate("document.querySelector('#player video').paused")


def test_the_player_moves_the_timeline(page):
    page.evaluate("document.querySelector('#player video').currentTime = 42")
    seeks_to(page, 42)


def test_stop_ends_the_watch_within_a_chunk_and_the_next_question_starts_clean(page, chat, frames, watches):
    page.get_by_label("Clip to").fill("50")
    page.wait_for_selector("#plan :text('50 frames')")
    page.fill("#question textarea", "What appears first?")
    page.press("#question textarea", "Enter")
    page.wait_for_selector("#progress progress")
    assert not chat.visitors.studio.idle
    page.click("#stop")
    page.wait_for_selector("text=Stopped before an answer")
    read = len(frames)
    assert chat.visitors.studio.idle
    time.sleep(0.3)
    assert len(frames) == read < 50

    assert FIRST in ask(page, "What appears first?")
    assert len(watches) == 2
    assert len(frames) - read == 50 + page.locator("#moments button").count()
    page.get_by_label("Clip to").fill("")
    page.wait_for_selector("#plan :text('60 frames')")


def test_questions_are_edited_asked_again_taken_back_and_forgotten(page):
    clear(page)
    ask(page, "What appears first?")
    ask(page, "What shape is pink?")
    page.get_by_role("button", name="Edit").first.click()
    field = page.locator("#chat textarea")
    assert field.input_value() == "What appears first?"
    field.fill("What appears last?")
    page.get_by_role("button", name="Submit").click()
    page.wait_for_function(f"document.querySelector('#chat .bot-row')?.innerText.includes('{LAST}')")
    expect(page.locator("#chat .user-row")).to_have_count(1)  # what came after the edited question is gone

    page.get_by_role("radio", name="Full attention").check()
    page.wait_for_selector("#watch:not([disabled])")
    page.get_by_role("button", name="Retry").click()
    page.wait_for_selector("#chat .figures :text('full attention')")
    expect(page.get_by_role("slider", name="Tau")).to_be_disabled()
    page.get_by_role("radio", name="RRAttention").check()

    page.get_by_role("button", name="Undo").click()
    page.wait_for_function("!document.querySelector('#chat .bot-row')")
    expect(page.locator("#question textarea")).to_have_value("What appears last?")


def test_what_is_written_in_a_chat_is_shown_as_it_is(page):
    hostile = (
        "<img src=x onerror=alert(1)> [a](http://a.example) ![b](b.png) www.c.example **d** `e` $$f$$ <b>g</b> \\*h"
    )
    clear(page)
    ask(page, hostile)

    assert original(page.locator("#chat .user-row").first.inner_text()).strip() == hostile
    assert page.locator("#chat .user-row :is(img, a, b, strong, code, .katex)").count() == 0


def test_a_clip_is_taken_from_where_the_player_stands(page):
    page.evaluate("document.querySelector('#player video').currentTime = 30")
    page.get_by_role("button", name="From where the player stands").click()
    page.wait_for_selector("#plan :text('30 frames')")
    assert page.get_by_label("Clip from").input_value() == "30"
    assert page.locator("#timeline :is(.outside, .planned)").count() == 1

    page.get_by_label("Clip from").fill("nonsense")
    page.wait_for_selector("#plan [role=alert]")
    assert page.locator("#ask").is_disabled()
    page.get_by_label("Clip from").fill("")
    page.wait_for_selector("#plan :text('60 frames')")


def test_the_conversation_is_saved_and_the_same_command_is_shown(page):
    ask(page, "What appears first?")
    saved = {}
    for export in ("Markdown", "JSON"):
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Save as {export}").click()
        saved[download.value.suggested_filename] = download.value.path().read_text()

    assert [*saved] == ["conversation.md", "conversation.json"]
    assert all("What appears first?" in text and FIRST in text for text in saved.values())
    assert json.loads(saved["conversation.json"])
    assert "rrvideo ask" in page.input_value("#command textarea")


PLAYLIST = f"#EXTM3U\n#EXT-X-TARGETDURATION:60\n#EXTINF:60,\n{SAMPLE}\n#EXT-X-ENDLIST\n".encode()


@pytest.mark.parametrize("content", [PLAYLIST, SAMPLE.read_bytes()[:2000]], ids=["playlist called mp4", "damaged"])
def test_what_is_no_video_is_refused_and_what_was_open_stays_open(page, tmp_path, content):
    path = tmp_path / "film.mp4"
    path.write_bytes(content)
    source = page.get_attribute("#player video", "src")
    page.set_input_files(UPLOAD, path)
    page.wait_for_selector("#refusal [role=alert]:has-text('film.mp4')")

    assert page.get_attribute("#player video", "src") == source
    assert FIRST in ask(page, "What appears first?")


def test_a_file_that_is_too_large_is_refused(context, chat, tmp_path):
    path = tmp_path / "large.mp4"
    path.write_bytes(SAMPLE.read_bytes() + bytes(1_000_000))
    with opened(context, chat) as page:
        page.set_input_files(UPLOAD, path)
        page.wait_for_selector("#too-large:has-text('larger than 1 MB')")
        assert page.locator(".toast-body").count() == 0
        assert page.locator("#player video").count() == 0

        path.write_bytes(SAMPLE.read_bytes())
        page.set_input_files(UPLOAD, path)
        page.wait_for_selector("#player video")
        assert page.locator("#too-large").is_hidden()


def test_two_people_do_not_see_each_others_files(context, chat, page):
    source = page.get_attribute("#player video", "src")
    session = chat.visitors.find(session_of(page))
    assert session.file.name == "sample"

    with opened(context, chat) as other:
        assert other.locator("#player video").count() == 0
        assert other.locator("#chat .user-row").count() == 0
        assert other.locator("#ask").is_disabled()
        for address in ("video/somebody", f"gradio_api/file={session.file.path}", f"file={session.file.path}"):
            assert other.request.get(chat.url + address).status in (403, 404)
        open_sample(other)
        assert other.get_attribute("#player video", "src").split("?")[0] != source.split("?")[0]


def test_a_closed_tab_leaves_nothing_behind(context, chat):
    with opened(context, chat) as page:
        open_sample(page)
        ask(page, "What appears first?")
        session = chat.visitors.find(session_of(page))
        path = Path(session.file.path)
        assert path.exists()
        assert chat.visitors.studio.is_open(session.id, Settings())
    deadline = time.monotonic() + 20
    while session.file and time.monotonic() < deadline:
        time.sleep(0.05)

    assert session.file is None
    assert chat.visitors.find(session.id) is None
    assert not path.exists()
    assert not chat.visitors.studio.is_open(session.id, Settings())


UNNAMED = re.compile(r"^\s*- (button|link|textbox|slider|spinbutton|radio|checkbox|combobox)(?: \[\w+.*\])?:?$")


def test_everything_that_can_be_used_has_a_name(page):
    ask(page, "What appears first?")
    tree = page.locator("body").aria_snapshot()

    assert [line for line in tree.splitlines() if UNNAMED.match(line)] == []
    for name in ('button "Stop"', 'textbox "Question"', 'slider "Timeline', 'log "chatbot conversation"'):
        assert name in tree


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(page, scheme):
    ask(page, "What appears first?")
    page.evaluate("dark => document.body.classList.toggle('dark', dark)", scheme == "dark")
    page.wait_for_timeout(400)
    poor = page.evaluate(CONTRAST)
    page.evaluate("document.body.classList.remove('dark')")

    assert page.locator("#chat .figures").count() > 0
    assert poor == []


def test_nothing_is_cut_off_at_400_pixels(page):
    ask(page, "What appears first?")
    page.set_viewport_size({"width": 400, "height": 800})
    page.wait_for_timeout(300)
    width = page.evaluate("document.documentElement.scrollWidth")
    boxes = [page.get_by_role("button", name=name).last.bounding_box() for name in ("Ask", "Stop", "Save as JSON")]
    chat_top, upload_top = (page.locator(part).bounding_box()["y"] for part in ("#chat", "#upload"))
    page.set_viewport_size({"width": 1280, "height": 900})

    assert width <= 400
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 400 for box in boxes)
    assert chat_top < upload_top
