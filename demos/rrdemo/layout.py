"""What the page is made of: Gradio components and where they stand; what they do is wired in app.py."""

from __future__ import annotations

from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from typing import Any, Self

import gradio as gr
from gradio.data_classes import FileData

from rrdemo.conversation import Settings
from rrdemo.guard import Limits
from rrdemo.samples import Sample
from rrdemo.session import SUFFIXES
from rrdemo.views import size
from rrvideo.clock import format_time

__all__ = ["ASSETS", "Page", "lay_out", "theme"]

ASSETS = Path(__file__).parent / "assets"
PLACEHOLDER = (
    "**Ask anything about the video.**\n\nIt is watched once, at the first question or before it with *Watch*. "
    "Every further question costs only itself."
)


@dataclass(frozen=True, slots=True)
class Page:
    """The components that the wiring needs, in the order in which they stand on the page."""

    upload: gr.File
    refusal: gr.HTML
    samples: list[gr.Button]
    player: gr.HTML
    timeline: gr.HTML
    moments: gr.HTML
    plan: gr.HTML
    watch: gr.Button
    start: gr.Textbox
    start_here: gr.Button
    end: gr.Textbox
    end_here: gr.Button
    fps: gr.Number
    max_frames: gr.Number
    sampling: gr.Radio
    attention: gr.Radio
    tau: gr.Slider
    chat: gr.Chatbot
    progress: gr.HTML
    notice: gr.HTML
    question: gr.Textbox
    ask: gr.Button
    stop: gr.Button
    command: gr.Textbox
    markdown: gr.Button
    json: gr.Button
    exported: gr.Textbox
    returned: gr.Textbox
    planned: gr.Textbox

    @property
    def settings(self) -> list[Any]:
        """What `Settings` are read from, in the order of its fields."""
        return [getattr(self, field.name) for field in fields(Settings)]

    @property
    def plan_and_buttons(self) -> list[Any]:
        """What follows from the settings and from what the session is doing."""
        return [self.plan, self.timeline, self.watch, self.ask, self.stop, self.planned]


def theme() -> gr.themes.Base:
    """Quiet colours, the system's own fonts (nothing is loaded from elsewhere), and enough contrast for everybody."""
    return gr.themes.Base(
        primary_hue="teal",
        neutral_hue="gray",
        radius_size="lg",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "monospace"],
    ).set(
        body_background_fill="#f6f7f8",
        body_background_fill_dark="#121519",
        background_fill_primary_dark="#1a1f25",
        background_fill_secondary_dark="#20262d",
        input_background_fill_dark="#242b33",
        block_background_fill="#ffffff",
        block_background_fill_dark="#1a1f25",
        block_border_width="1px",
        block_shadow="none",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="#ffffff",
        button_secondary_background_fill="*neutral_100",
        button_secondary_background_fill_hover="*neutral_200",
        button_secondary_text_color="*neutral_800",
        button_secondary_background_fill_dark="#2a323b",
        button_secondary_background_fill_hover_dark="#35404b",
        button_border_width="1px",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_600",
        button_cancel_background_fill="*neutral_100",
        button_cancel_background_fill_hover="*neutral_200",
        button_cancel_text_color="*neutral_800",
        button_cancel_border_color="*neutral_300",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        link_text_color="*primary_700",
        link_text_color_hover="*primary_800",
        link_text_color_visited="*primary_700",
        link_text_color_dark="*primary_300",
        link_text_color_hover_dark="*primary_200",
        link_text_color_visited_dark="*primary_300",
        link_text_color_active_dark="*primary_200",
    )


def lay_out(model: str, remark: str, limits: Limits, samples: list[Sample]) -> Page:
    """Put the page's components into the `gr.Blocks` around; `remark` is what is to be known of the model."""
    gr.HTML(
        "<h1>rrvideo</h1><p>Watch a long video once, ask it many questions.</p>"
        f'<p class="model">Model: <strong>{escape(model)}</strong>{". " * bool(remark)}{escape(remark)}</p>',
        elem_id="header",
        js_on_load=None,
    )
    with gr.Row(equal_height=False, elem_id="columns"):
        with gr.Column(scale=6, min_width=280):
            left = _video_column(limits, samples)
        with gr.Column(scale=5, min_width=280):
            right = _chat_column()
    return Page(**left, **right)


def _video_column(limits: Limits, samples: list[Sample]) -> dict[str, Any]:
    with gr.Column(elem_id="screen"):
        player = _region("player")
        timeline = _region("timeline")
        moments = _region("moments")
    with gr.Column(elem_id="desk"):
        with gr.Row(elem_id="plan-row"):
            plan = _region("plan", scale=4)
            watch = gr.Button("Watch", variant="secondary", interactive=False, scale=1, min_width=110, elem_id="watch")
        with gr.Accordion("Clip, frames and attention", open=False):
            settings = _settings(limits)
    upload = _only_uploads(gr.File(label="Video", file_types=[*SUFFIXES], height=200, elem_id="upload"))
    gr.HTML(_what_is_taken(limits), elem_id="taken", js_on_load=None)
    refusal = _region("refusal")
    with gr.Row(elem_id="samples"):
        gr.HTML("<p>Or an example:</p>", js_on_load=None, min_width=90)
        buttons = [gr.Button(sample.about, size="sm", min_width=120) for sample in samples]
    return {
        "player": player,
        "timeline": timeline,
        "moments": moments,
        "upload": upload,
        "refusal": refusal,
        "samples": buttons,
        "plan": plan,
        "watch": watch,
        **settings,
    }


def _what_is_taken(limits: Limits) -> str:
    """What may be uploaded, and what page.js shows in place of Gradio's words for what is too large."""
    most, longest = size(limits.upload_bytes), format_time(limits.duration)
    return (
        f'<p class="facts">MP4, MOV, MKV, WebM, AVI and other files, up to {most}, and {longest} long.</p>'
        f'<div id="too-large" class="notice error" role="alert" data-limit="{limits.upload_bytes}" hidden><p>'
        f"The file is larger than {most}, the most that is taken here: cut it, or save it in a lower quality.</p></div>"
    )


def _settings(limits: Limits) -> dict[str, Any]:
    standard = Settings()
    with gr.Row():
        with gr.Column(min_width=130):
            start = gr.Textbox("", label="Clip from", placeholder="0:00", max_lines=1)
            start_here = gr.Button("From where the player stands", size="sm")
        with gr.Column(min_width=130):
            end = gr.Textbox("", label="Clip to", placeholder="the end", max_lines=1)
            end_here = gr.Button("To where the player stands", size="sm")
    with gr.Row():
        fps = gr.Number(standard.fps, label="Frames per second", step=0.5, min_width=130)
        frames = min(standard.max_frames, limits.max_frames)
        max_frames = gr.Number(frames, label="Frames at most", step=1, min_width=130)
    sampling = gr.Radio(
        [("Evenly spread", "uniform"), ("Keyframes, many times faster", "keyframes")],
        value=standard.sampling,
        label="Which frames",
    )
    attention = gr.Radio(
        [("RRAttention", "rr"), ("Full attention", "full")],
        value=standard.attention,
        label="Attention",
        info="Ask the same with both to compare them.",
    )
    tau = gr.Slider(
        0.5,
        1.0,
        value=standard.tau,
        step=0.01,
        label="Tau",
        info="The share of the attention that RRAttention keeps.",
    )
    return {
        "start": start,
        "start_here": start_here,
        "end": end,
        "end_here": end_here,
        "fps": fps,
        "max_frames": max_frames,
        "sampling": sampling,
        "attention": attention,
        "tau": tau,
    }


def _chat_column() -> dict[str, Any]:
    chat = gr.Chatbot(
        label="Conversation",
        placeholder=PLACEHOLDER,
        elem_id="chat",
        height="min(58vh, 640px)",
        layout="bubble",
        buttons=["copy"],
        editable="user",
        render_markdown=False,
        latex_delimiters=[],
        feedback_options=None,
        allow_file_downloads=False,
    )
    progress = _region("progress")
    notice = _region("notice")
    with gr.Row(elem_id="asking"):
        question = gr.Textbox(
            label="Question",
            show_label=False,
            container=False,
            placeholder="Ask a question",
            lines=1,
            max_lines=5,
            scale=5,
            elem_id="question",
        )
        ask = gr.Button("Ask", variant="primary", interactive=False, scale=1, min_width=76, elem_id="ask")
        stop = gr.Button("Stop", variant="stop", interactive=False, scale=1, min_width=76, elem_id="stop")
    with gr.Accordion("Take it with you", open=False):
        with gr.Row():
            markdown = gr.Button("Save as Markdown", size="sm")
            json = gr.Button("Save as JSON", size="sm")
        command = gr.Textbox(
            label="The same on the command line",
            info="A video of yours must lie in the folder where you run it.",
            interactive=False,
            max_lines=8,
            buttons=["copy"],
            elem_id="command",
        )
    exported = gr.Textbox(visible="hidden", label="Exported")
    returned = gr.Textbox(visible="hidden", label="Returned")
    planned = gr.Textbox(visible="hidden", label="Planned for")
    return {
        "chat": chat,
        "progress": progress,
        "notice": notice,
        "question": question,
        "ask": ask,
        "stop": stop,
        "markdown": markdown,
        "json": json,
        "command": command,
        "exported": exported,
        "returned": returned,
        "planned": planned,
    }


def _region(name: str, **options: Any) -> gr.HTML:
    """A part of the page whose HTML views.py writes, and that page.js and style.css find by its id."""
    return gr.HTML(elem_id=name, js_on_load=None, **options)


class _Uploaded(FileData):
    """An uploaded video file, as handle_file("match.mp4") gives it."""  # which Gradio tells on its API page

    @classmethod
    def model_validate(cls, given: Any, **options: Any) -> Self:
        if not isinstance(given, dict):
            raise _not_uploaded()
        return super().model_validate(given, **options)


def _only_uploads(field: gr.File) -> gr.File:
    """Have `field` refuse what a client names by its address, where Gradio would fetch it."""
    take = field.async_move_resource_to_block_cache

    async def take_no_address(path: str | Path | None) -> str | None:
        if path and "://" in str(path):
            raise _not_uploaded()
        taken: str | None = await take(path)
        return taken

    # In place of a subclass, for which Gradio would write a stub file beside this one.
    field.async_move_resource_to_block_cache = take_no_address
    field.data_model = _Uploaded
    field.example_payload = lambda: {"path": "match.mp4", "meta": {"_type": "gradio.FileData"}}
    return field


def _not_uploaded() -> gr.Error:
    return gr.Error(
        'A video must be uploaded, with handle_file("match.mp4"): addresses are not opened.', print_exception=False
    )
