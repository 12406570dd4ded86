"""A served chat for tests, and a browser to use it with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from rrdemo.app import Served, serve
from rrdemo.guard import Limits
from rrdemo.samples import samples
from rrdemo.screenshots import FLAGS, browser_path
from rrdemo.studio import Studio

SLIDER = "#timeline [role=slider]"
UPLOAD = "#upload input[type=file]"


@contextmanager
def served(**limits: Any) -> Iterator[Served]:
    """The app with the embedded model, on a free port of this machine; another one may be running already."""
    studio = Studio.load("tiny", device="cpu", limits=Limits(**limits))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", "")  # which serve sets for all of the process
        patch.setattr("rrdemo.app.NOTES_EVERY", 1.0)
        running = serve(studio)
        try:
            yield running
        finally:
            running.close()


@contextmanager
def browser() -> Iterator[Any]:
    """The system's own Chromium, without a window; where there is none, the test is skipped."""
    path = browser_path()
    if path is None:
        pytest.skip("needs Chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


@contextmanager
def opened(context, chat):
    """A fresh page of the chat, in which nothing may go wrong and which asks nobody else for anything."""
    page = context.new_page()
    page.problems = []
    page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda request: page.problems.append(request.url) if elsewhere(request.url, chat.url) else None)
    page.goto(chat.url)
    page.wait_for_selector("#question textarea")
    yield page
    problems = [*page.problems]
    page.close()
    assert problems == []


def elsewhere(url, here):
    return not url.startswith((here, "data:", "blob:"))


def open_sample(page):
    page.get_by_role("button", name=samples()[0].about).click()
    page.wait_for_function("document.querySelector('#player video')?.readyState > 0")
    page.wait_for_selector("#ask:not([disabled])")


def ask(page, question):
    """Ask, and return the text of the answer when it is complete."""
    answers = page.locator("#chat .answer")
    before = answers.count()
    page.fill("#question textarea", question)
    page.press("#question textarea", "Enter")
    answers.nth(before).wait_for()
    return page.locator("#chat .bot-row").last.inner_text()


def position(page):
    return page.evaluate("document.querySelector('#player video').currentTime")


def seeks_to(page, seconds, tolerance=0.6):
    page.wait_for_function(
        "([seconds, near]) => Math.abs(document.querySelector('#player video').currentTime - seconds) < near",
        arg=[seconds, tolerance],
    )
    page.wait_for_function(
        f"([seconds, near]) => Math.abs(document.querySelector('{SLIDER}').ariaValueNow - seconds) < near",
        arg=[seconds, tolerance],
    )


def observe(page, selector):
    """Have the page collect what stands in `selector` whenever it changes."""
    page.evaluate(
        """selector => {
            window.seen = [];
            const look = () => {
                const text = [...document.querySelectorAll(selector)].at(-1)?.innerText ?? "";
                if (text !== window.seen.at(-1)) window.seen.push(text);
            };
            new MutationObserver(look).observe(document.body, {childList: true, subtree: true, characterData: true});
        }""",
        selector,
    )


def clear(page):
    if page.locator("#chat .bot-row").count():
        page.get_by_role("button", name="Clear").click()
        page.wait_for_function("!document.querySelector('#chat .bot-row')")


def session_of(page):
    return page.get_attribute("#player video", "src").split("/")[1].split("?")[0]


# Of every visible text against what stands behind it, by WCAG's formula; disabled controls are exempt there.
CONTRAST = """() => {
    const channels = (colour) => (colour.match(/[\\d.]+/g) ?? []).map(Number);
    const luminance = (rgb) => rgb.slice(0, 3)
        .map((value) => value / 255)
        .map((value) => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
        .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
    const over = (top, below) => {
        const alpha = top[3] ?? 1;
        return [0, 1, 2].map((index) => top[index] * alpha + below[index] * (1 - alpha));
    };
    const behind = (element) => {
        const layers = [];
        for (let each = element; each; each = each.parentElement) {
            layers.unshift(channels(getComputedStyle(each).backgroundColor));
        }
        return layers.filter((layer) => layer.length).reduce((below, layer) => over(layer, below), [255, 255, 255]);
    };
    const poor = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement;
        const text = walker.currentNode.textContent.trim();
        if (!text || !element.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
        if (element.closest(":disabled, [aria-disabled=true], script, style, video")) continue;
        const fill = behind(element);
        const ink = over(channels(getComputedStyle(element).color), fill);
        const [dark, bright] = [luminance(ink), luminance(fill)].sort((one, other) => one - other);
        const ratio = (bright + 0.05) / (dark + 0.05);
        if (ratio < 4.5) poor.push(`${text.slice(0, 40)}: ${ratio.toFixed(2)}`);
    }
    return poor;
}"""
