"""What a person notices of the chat's page: drafts, notices, the timeline, what is copied, colours and sizes."""

import re
import threading

import httpx
import pytest
from chatting import SLIDER, UPLOAD, ask, clear, observe, open_sample, opened, seeks_to
from gradio_client import Client
from gradio_client.exceptions import AppError

from rrdemo.session import Session
from rrvideo.tiny.sample import sample_world

pytest.importorskip("playwright")
pytest_plugins = ["browsing"]
FIRST = sample_world().scenes[0].name
HOSTILE = "a_b * c [x] <y> <b>bold</b> &lt; <!-- z --> 1. $$f$$ http://x.example\n    - and more"


def begin(page, question):
    page.fill("#question textarea", question)
    page.press("#question textarea", "Enter")


def at_rest(page):
    page.wait_for_selector("#ask:not([disabled])")


def numbers(pattern, text):
    return [float(number) for number in re.findall(pattern, text)]


def copied(page):
    page.wait_for_timeout(200)
    return page.evaluate("navigator.clipboard.readText()")


def test_a_draft_written_meanwhile_stays_and_asking_it_too_early_is_told(page, more_words):
    begin(page, "What appears first?")
    page.wait_for_selector("#progress :text('Answering.')")
    assert page.input_value("#question textarea") == ""
    begin(page, "my next question")
    page.wait_for_selector("#notice :text('still being answered')")
    more_words.set()
    at_rest(page)

    assert page.input_value("#question textarea") == "my next question"
    assert FIRST in page.locator("#chat .answer").last.inner_text()
    assert "my next question" not in page.inner_text("#chat")


def test_retry_and_undo_leave_a_draft_alone(page):
    clear(page)
    ask(page, "What appears first?")
    page.fill("#question textarea", "a draft")
    page.get_by_role("button", name="Retry").click()
    page.wait_for_selector("#progress :text('Answered')")
    at_rest(page)
    page.get_by_label("Clip from").fill("50:00")
    page.wait_for_selector("#plan [role=alert]")
    page.get_by_role("button", name="Retry").click()
    page.wait_for_selector("#notice [role=alert]")
    assert page.locator("#chat .answer").count() == 1
    page.get_by_label("Clip from").fill("")
    at_rest(page)
    page.get_by_role("button", name="Undo").click()
    page.wait_for_function("!document.querySelector('#chat .answer')")

    assert page.input_value("#question textarea") == "a draft"


@pytest.mark.parametrize("question", ["   ", "x" * 4001], ids=["empty", "too long"])
def test_a_question_that_is_refused_stays_in_its_field(page, question):
    begin(page, question)
    page.wait_for_selector("#notice [role=alert]")
    at_rest(page)

    assert page.input_value("#question textarea") == question
    assert page.evaluate("getComputedStyle(document.querySelector('#notice p')).color") == "rgb(161, 28, 28)"
    page.fill("#question textarea", "")


def test_without_a_video_nothing_can_be_stopped(context, chat):
    with opened(context, chat) as page:
        begin(page, "hello?")
        page.wait_for_selector("#notice :text('No video is open')")
        page.wait_for_timeout(300)

        assert [page.locator(button).is_disabled() for button in ("#watch", "#ask", "#stop")] == [True] * 3
        assert page.input_value("#question textarea") == "hello?"


def test_numbers_can_be_typed_and_those_that_make_no_sense_are_told_in_the_plan(page):
    field = page.get_by_label("Frames per second")
    field.fill("")
    field.press_sequentially("0.5", delay=250)
    page.wait_for_selector("#plan :text('30 frames')")
    assert page.locator(".toast-body").count() == 0

    for name, wrong, right in (
        ("Frames per second", ("0", "-1", ""), "1"),
        ("Frames at most", ("0", "769", "1.5"), "768"),
    ):
        for value in wrong:
            page.get_by_label(name).fill(value)
            page.wait_for_selector("#plan [role=alert]")
            assert page.locator("#ask").is_disabled()
            page.get_by_label(name).fill(right)
            page.wait_for_selector("#plan :text('60 frames')")


def test_each_phase_counts_its_own_work_and_the_answer_is_announced(page, frames, slow_words):
    page.get_by_label("Clip to").fill("0:40")
    page.wait_for_selector("#plan :text('40 frames')")
    observe(page, "#progress")
    answer = ask(page, "What appears first?")
    told = "\n".join(page.evaluate("window.seen"))
    counted = {phase: numbers(rf"{phase}\s+(\d+) of 40 frames", told) for phase in ("Decode", "Encode")}
    assert {phase: sorted(each) for phase, each in counted.items()} == counted
    assert len({*counted["Decode"]} - {*counted["Encode"]}) > 5  # what is decoded is told before it is encoded
    seconds = numbers(r"Decode\s+\d+ of \d+ frames\s+([\d.]+) s", told)
    assert seconds == sorted(seconds)
    assert "Answering." in told
    assert FIRST in answer
    page.wait_for_selector("#progress :text('Answered in')")
    page.get_by_label("Clip to").fill("")
    page.wait_for_selector("#plan :text('60 frames')")


def test_who_waits_is_told_at_once_and_only_for_as_long(context, chat, page, more_words):
    with opened(context, chat) as other:
        open_sample(other)
        other.click("#watch")
        other.wait_for_selector("#progress :text('Watched')")
        observe(other, "#progress .said")
        begin(page, "What appears first?")
        page.wait_for_selector("#progress :text('Answering.')")
        begin(other, "What appears first?")
        other.wait_for_selector("#progress :text('Waiting for 1 other.')")
        assert page.inner_text("#progress").strip() == "Answering."
        more_words.set()
        other.wait_for_selector("#progress :text('Answered in')")
        told = [text for text in other.evaluate("window.seen") if "Answered" not in text]

    assert told[told.index("Waiting for 1 other.") :] == ["Waiting for 1 other.", "Answering."]
    at_rest(page)


def test_the_timeline_keeps_its_place_and_its_words_when_an_answer_or_a_plan_comes(page):
    clear(page)
    page.get_by_label("Frames per second").fill("0.1")
    page.wait_for_selector("#plan :text('6 frames')")
    page.evaluate("document.querySelector('#player video').currentTime = 30")
    seeks_to(page, 30)
    ask(page, "What appears first?")
    at_rest(page)
    saw = re.search("it saw 6 frames, at most [\\d.]+ s apart", page.inner_text("#timeline"))[0]
    page.get_by_label("Frames per second").fill("1")
    page.wait_for_selector("#timeline :text('The next watch takes 60 frames')")

    assert saw in page.inner_text("#timeline")
    seeks_to(page, 30)
    page.locator(SLIDER).press("PageUp")
    seeks_to(page, 36)


def test_the_timeline_keeps_the_keyboard_when_it_is_drawn_anew(page):
    page.locator(SLIDER).focus()
    page.evaluate("document.querySelector('#timeline [role=slider]').dataset.old = 1")
    page.evaluate(
        """() => {
            const track = document.querySelector("#timeline [role=slider]");
            const parent = track.parentElement;
            parent.innerHTML = parent.innerHTML.replace('data-shown=""', "").replace('data-old="1"', "");
        }"""
    )
    page.wait_for_function(f"document.activeElement === document.querySelector('{SLIDER}:not([data-old])')")
    page.get_by_label("Clip to").focus()
    page.get_by_label("Clip to").fill("0:50")
    page.wait_for_selector("#plan :text('50 frames')")
    assert page.get_by_label("Clip to").evaluate("(field) => field === document.activeElement")
    page.get_by_label("Clip to").fill("")
    page.wait_for_selector("#plan :text('60 frames')")


def test_a_short_clip_is_zoomed_to(page):
    clear(page)
    page.get_by_label("Clip from").fill("0:20")
    page.get_by_label("Clip to").fill("0:30")
    page.get_by_role("button", name="Zoom to 0:20–0:30").click()
    track = page.locator(SLIDER)
    box = track.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    seeks_to(page, 25)
    track.press("End")
    seeks_to(page, 30)
    assert page.inner_text("#timeline .scale").split("\n")[0] == "0:20"

    page.get_by_role("button", name="Zoom to 0:20–0:30").click()
    assert track.get_attribute("aria-valuemax") == "60"
    for label in ("Clip from", "Clip to"):
        page.get_by_label(label).fill("")
    page.wait_for_selector("#plan :text('60 frames')")


def test_a_late_plan_for_older_settings_does_not_stay(page, monkeypatch):
    planned, asked, go_on = Session.plan, [], threading.Event()

    def plan(self, settings):
        asked.append(settings)
        view = planned(self, settings)
        if settings.end is None:
            go_on.wait(20)
        return view

    def rests():  # when the plan is the right one
        asked.clear()
        page.wait_for_timeout(2500)
        return not asked

    ask(page, "What appears first?")
    at_rest(page)
    monkeypatch.setattr(Session, "plan", lambda self, settings: asked.append(settings) or planned(self, settings))
    assert any(rests() for _ in range(8))
    monkeypatch.setattr(Session, "plan", plan)
    page.get_by_role("button", name="Clear").click()  # after which the plan is made again
    while not asked:
        page.wait_for_timeout(50)
    page.get_by_label("Clip to").fill("0:40")
    page.wait_for_selector("#plan :text('40 frames')")
    observe(page, "#plan")
    go_on.set()
    page.wait_for_function("window.seen.some((text) => text.includes('60 frames'))")
    page.wait_for_function("window.seen.at(-1).includes('40 frames')")
    page.get_by_label("Clip to").fill("")
    page.wait_for_selector("#plan :text('60 frames')")


def test_what_is_copied_and_edited_is_what_was_written(page):
    clear(page)
    ask(page, HOSTILE)
    page.get_by_role("button", name="Copy message").first.click()
    assert copied(page) == HOSTILE
    page.locator("#chat .copy").last.click()
    assert re.fullmatch(r"[^<]*\n\nLooked at [\d:–, ]+", copied(page))

    page.get_by_role("button", name="Edit").first.click()
    field = page.locator("#chat textarea")
    assert field.input_value().replace("\u2060", "") == HOSTILE
    field.press("End")
    field.press_sequentially(" <i>")
    page.get_by_role("button", name="Submit").click()
    page.wait_for_selector("#progress :text('Answered')")
    at_rest(page)
    page.wait_for_function("document.querySelector('#chat .user-row')?.innerText.includes('<\u2060i>')")


def test_what_is_refused_is_told_under_the_upload_where_it_is_seen(context, chat, tmp_path):
    path = tmp_path / "film.mp4"
    path.write_bytes(b"no video")
    with opened(context, chat) as page:
        page.set_viewport_size({"width": 400, "height": 800})
        assert "up to 1 MB" in page.inner_text("#taken")
        page.set_input_files(UPLOAD, path)
        told = page.locator("#refusal [role=alert]")
        told.wait_for()
        box = told.bounding_box()

        assert box["y"] + box["height"] <= 800
        open_sample(page)
        assert told.count() == 0
        page.wait_for_function("document.querySelector('#player video').getBoundingClientRect().top >= 0")
        page.set_viewport_size({"width": 1280, "height": 900})


def test_a_video_that_is_put_away_is_told_and_the_plan_knows(context, chat):
    studio = chat.visitors.studio
    with opened(context, chat) as page:
        open_sample(page)
        ask(page, "What appears first?")
        page.get_by_role("button", name="Watched", disabled=True).wait_for()
        keep, studio.keep = studio.keep, -1.0
        try:
            studio.sweep()
        finally:
            studio.keep = keep
        page.wait_for_selector("#notice :text('The video was put away')")

        assert "questions are answered at once" not in page.inner_text("#plan")
        assert page.get_by_role("button", name="Watch", exact=True).is_enabled()


@pytest.mark.parametrize("width", [400, 320])
def test_all_that_can_be_used_is_wide_and_high_enough_and_nothing_sticks_out(page, width):
    ask(page, "What appears first?")
    page.set_viewport_size({"width": width, "height": 800})
    page.wait_for_timeout(300)
    sizes = page.evaluate(
        """() => [...document.querySelectorAll("#screen button, #desk button, #chat button, #asking button")]
            .filter((button) => button.checkVisibility())
            .map((button) => [button.getAttribute("aria-label") ?? button.innerText, button.getBoundingClientRect()])
            .map(([name, box]) => [name, box.width, box.height])"""
    )
    total = page.evaluate("document.documentElement.scrollWidth")
    page.set_viewport_size({"width": 1280, "height": 900})

    assert [each for each in sizes if each[1] < 24 or each[2] < 24] == []
    assert total <= width


def test_warnings_of_the_plan_are_coloured(page):
    at_rest(page)
    colour = page.evaluate(
        """() => {
            const list = document.createElement("ul");
            list.className = "warnings";
            list.innerHTML = "<li>fewer frames</li>";
            document.querySelector("#plan .prose").append(list);
            const colour = getComputedStyle(list.firstChild).color;
            list.remove();
            return colour;
        }"""
    )
    assert colour == "rgb(138, 75, 0)"


@pytest.mark.parametrize("video", ["http://127.0.0.1:9/film.mp4", "/etc/passwd", 3])
def test_programs_are_told_to_upload_and_shown_how(chat, video):
    client = Client(chat.url, verbose=False)
    with pytest.raises(AppError, match="must be uploaded"):
        client.predict(video=video, api_name="/watch")
    told = httpx.get(f"{chat.url}gradio_api/info").json()["named_endpoints"]["/watch"]["parameters"][0]

    assert told["example_input"]["path"] == "match.mp4"
    client.close()
