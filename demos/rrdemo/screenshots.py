"""Make the README's pictures of the chat, with the embedded model: `python -m rrdemo.screenshots [FOLDER]`.

It needs Chromium and Playwright, which come with the development tools; Playwright's own browsers do not.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from rrvideo.errors import RRVideoError

__all__ = ["browser_path", "main"]

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
FOLDER = Path(__file__).parent.parent / "screenshots"
# What the browser window is like in each picture.
PICTURES: dict[str, dict[str, Any]] = {
    "light": {"viewport": {"width": 1280, "height": 1000}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 1000}, "color_scheme": "dark"},
    "narrow": {"viewport": {"width": 400, "height": 1500}, "color_scheme": "light"},
}
QUESTIONS = ("What appears first?", "What is the last thing to appear?")


def browser_path() -> str | None:
    """The system's Chromium, if there is one."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def main() -> None:
    """Write a picture of each kind to the folder that the command line names (default: demos/screenshots)."""
    from playwright.sync_api import sync_playwright

    from rrdemo.app import serve
    from rrdemo.studio import Studio

    path = browser_path()
    if path is None:
        raise RRVideoError("pictures need Chromium", f"install one of {', '.join(BROWSERS)}")
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    served = serve(Studio.load("tiny"))
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
            for name, options in PICTURES.items():
                page = browser.new_context(**options).new_page()
                page.goto(served.url)
                _converse(page)
                page.screenshot(path=folder / f"{name}.png", full_page=name == "narrow")
            browser.close()
    finally:
        served.close()


def _converse(page: Any) -> None:
    """Ask about the ten-minute example, with either kind of attention, and stop the video where the model looked."""
    page.get_by_role("button", name="Ten minutes").click()
    page.wait_for_selector("#ask:not([disabled])", timeout=60_000)
    page.get_by_text("Clip, frames and attention").click()
    for number, (question, attention) in enumerate(zip(QUESTIONS, ("RRAttention", "Full attention"), strict=True)):
        page.get_by_role("radio", name=attention).check()
        page.fill("#question textarea", question)
        page.press("#question textarea", "Enter")
        page.locator("#chat .answer").nth(number).wait_for(timeout=60_000)
    page.get_by_role("radio", name="RRAttention").check()
    page.get_by_text("Clip, frames and attention").click()
    page.locator("#moments button").last.click()
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    page.mouse.move(0, 0)
    page.wait_for_timeout(1500)


if __name__ == "__main__":
    main()
