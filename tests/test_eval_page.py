"""The page of a report: complete in itself, true to the figures, and fit to be read in any way."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from journals import SETTINGS, altered, draw_records, unread

from rreval.journal import Run
from rreval.page import as_page
from rreval.plots import Axis, accuracies, differences, scatters, stages
from rreval.report import Report

CHROMIUM = Path("/usr/bin/chromium")


class Page(HTMLParser):
    """What a page is made of; raises if tags are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attributes for each, attributes in self.tags if each == tag]


@pytest.fixture(scope="module")
def report():
    full = draw_records(30)
    sparse = altered(full, (0.1, 0.12))
    sparse[4] = unread(sparse[4], "<script>alert(1)</script>\u202e & more")
    names = {"full": SETTINGS, "<b>sparse</b>": SETTINGS | {"attention": "rr"}}
    return Report.of({name: Run(None, names[name], run) for name, run in zip(names, (full, sparse), strict=True)})


@pytest.fixture(scope="module")
def text(report):
    return as_page(report)


def test_the_page_loads_nothing_and_runs_nothing(text):
    page = Page(text)
    tags = {tag for tag, _ in page.tags}

    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert "@import" not in text
    assert "url(" not in text
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "style")]
        assert attributes.get("href", "#").startswith("#")


def test_what_models_and_folders_say_is_text_and_nothing_else(text):
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\x202e &amp; more" in text
    assert "<b>sparse" not in text


def test_every_plot_has_a_title_a_caption_and_its_figures_in_words(report, text):
    page = Page(text)
    pictures = [each["aria-label"] for each in page.all("div") if each.get("role") == "img"]
    duration = next(label for label in pictures if label.startswith("Accuracy by duration. full: short "))

    assert len(pictures) == len(page.all("figure")) == len(page.all("figcaption")) == len(page.all("h3")) == 8
    for run in report.runs:
        for score in run.groups["duration"]:
            assert f"{score.name} {100 * score.accuracy.value:.1f} (" in duration


def test_marks_lie_where_their_figures_are(report):
    plot = next(accuracies(report))
    scores = [{score.name: score.accuracy for score in run.groups["duration"]} for run in report.runs]

    assert plot.line == 25
    for row in plot.rows:
        for mark, score in zip(row.marks, scores, strict=True):
            expected = [100 * each for each in (score[row.name].value, score[row.name].low, score[row.name].high)]
            assert [mark.at, mark.low, mark.high] == pytest.approx(expected, abs=0.01)


def test_a_difference_of_nothing_lies_in_the_middle_and_better_lies_to_its_right(report):
    (plot,) = differences(report)
    changes = {change.name: change.difference.value for change in report.comparisons[0].groups["domain"]}

    assert plot.line == 50
    assert plot.runs == ("<b>sparse</b>",)
    assert plot.rows[0].name == "all"
    for row in plot.rows:
        if row.name in changes:
            assert (row.marks[0].at > 50) == (changes[row.name] > 0)
            assert (row.marks[0].at < 50) == (changes[row.name] < 0)


def test_each_video_is_a_point(report):
    density, prefill = scatters(report)
    longest = max(report.runs[0].watches, key=lambda watch: watch.visual_tokens)
    highest = min(point[2] for point in prefill.points)

    assert len(density.points) == len(prefill.points) == 60
    assert max(density.points, key=lambda point: point[1])[3].startswith(f"{longest.video_id}: ")
    assert [point[0] for point in prefill.points if point[2] == highest] == ["full"]


def test_a_run_alone_with_full_attention_has_no_difference_and_no_density_to_show():
    alone = Report.of({"full": Run(None, SETTINGS, draw_records(6))})

    assert list(differences(alone)) == []
    assert [plot.title for plot in scatters(alone)] == ["Prefill"]
    assert [row.name for plot in stages(alone) for row in plot.rows] == ["decode", "encode", "prefill", "generate"]
    Page(as_page(alone))


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-0.13, 0.13), (0, 86_412), (0, 0.01), (0, 3), (-0.99, 0.99), (0, 1e-3)]
)
def test_an_axis_holds_its_values_and_has_a_few_round_ticks(low, high):
    axis = Axis.of(low, high, "{:g}".format)
    labels = [float(label) for _, label in axis.ticks]

    assert axis.low <= low < high <= axis.high
    assert 3 <= len(labels) <= 7
    assert (axis.ticks[0][0], axis.ticks[-1][0]) == (0, 100)
    for (at, _), value in zip(axis.ticks, labels, strict=True):
        assert axis.at(value) == pytest.approx(at, abs=0.01)
        assert len(f"{value:g}".lstrip("-0.").rstrip("0")) <= 3


@pytest.mark.skipif(not CHROMIUM.exists(), reason="there is no Chromium")
def test_a_browser_shows_it_at_any_width_and_it_can_be_read_without_strain(text, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    path = tmp_path / "page.html"
    path.write_text(text, encoding="utf-8")
    said = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("request", lambda request: said.append(request.url))
        page.goto(path.as_uri())
        for width in (320, 768, 1440):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            tracks = page.evaluate("[...document.querySelectorAll('.track')].map(each => each.clientWidth)")
            assert min(tracks) >= 90
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            paper, card = (luminance(page, name, "backgroundColor") for name in ("body", ".tile"))
            assert (paper < 0.2) == (card < 0.2) == (scheme == "dark")
            for name, ground in (("body", paper), ("figcaption", card), ("th", card), ("footer", paper)):
                dark, light = sorted((luminance(page, name, "color"), ground))
                assert (light + 0.05) / (dark + 0.05) >= 4.5  # what WCAG asks for at level AA
        browser.close()

    assert said == [path.as_uri()]


def luminance(page, name, colour):
    """The relative luminance of an element's colour, as WCAG defines it."""
    found = page.evaluate(f"getComputedStyle(document.querySelector('{name}')).{colour}")
    shares = [int(each) / 255 for each in re.findall(r"\d+", found)[:3]]
    red, green, blue = (each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
