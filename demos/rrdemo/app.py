"""The app: the page of layout.py, wired to the handlers, and the server that it runs on."""

from __future__ import annotations

import mimetypes
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route

from rrdemo.api import Endpoints
from rrdemo.handlers import Handlers
from rrdemo.layout import ASSETS, Page, lay_out, theme
from rrdemo.samples import samples
from rrdemo.studio import Studio
from rrdemo.visitors import Visitors
from rrvideo.errors import RRVideoError

__all__ = ["Served", "build", "serve"]

UPLOADS_LIVE = 600  # seconds: by then a session has made an upload its own
NOTES_EVERY = 10.0  # seconds
THREADS = 24  # for those who do not wait in the studio's line
# Nothing but the endpoints is for programs; what answers at once needs no place in Gradio's queue.
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
QUICK: dict[str, Any] = {**QUIET, "queue": False}
EMBEDDED = (
    "It comes with rrvideo and knows one small world: coloured shapes that cross coloured backgrounds, as in the "
    "examples."
)


def build(studio: Studio, visitors: Visitors) -> gr.Blocks:
    """Lay out the page and wire it."""
    # Uploads are private and temporary: sessions keep their own copies.
    with gr.Blocks(
        title="rrvideo", analytics_enabled=False, delete_cache=(UPLOADS_LIVE // 2, UPLOADS_LIVE), fill_width=True
    ) as app:
        examples = samples()
        page = lay_out(studio.model, EMBEDDED if studio.model == "tiny" else "", studio.limits, examples)
        handlers = Handlers(page, visitors)
        _wire_api(page, handlers)  # first: Gradio gives a name to whoever asks for it first
        _wire_video(page, handlers, [handlers.open_sample(sample) for sample in examples])
        _wire_conversation(page, handlers)
        _wire_exports(page, handlers)
        outputs = [page.notice, *page.plan_and_buttons]
        gr.Timer(NOTES_EVERY).tick(handlers.notes, [page.planned, *page.settings], outputs, **QUICK)
        app.unload(handlers.leave)
    app.queue(max_size=studio.limits.waiting + THREADS, default_concurrency_limit=None)
    return app


def _wire_video(page: Page, handlers: Handlers, opened: Sequence[Callable[..., Any]]) -> None:
    outputs = [
        *(page.upload, page.refusal, page.player, page.start, page.end, page.moments, page.chat, page.progress),
        *(page.notice, page.command, *page.plan_and_buttons),
    ]
    options = {"outputs": outputs, "api_visibility": "private", "show_progress_on": page.upload}
    page.upload.upload(handlers.open, [page.upload, *page.settings], **options)
    for button, open_sample in zip(page.samples, opened, strict=True):
        button.click(open_sample, page.settings, **options)
    gr.on(
        [component.change for component in page.settings],
        handlers.plan,
        page.settings,
        page.plan_and_buttons,
        trigger_mode="always_last",
        **QUIET,
    )
    page.attention.change(
        None, page.attention, page.tau, js="(mode) => ({__type__: 'update', interactive: mode === 'rr'})"
    )
    for button, field in ((page.start_here, page.start), (page.end_here, page.end)):
        button.click(None, None, field, js="() => window.rrdemo.now()", api_visibility="private")


def _wire_conversation(page: Page, handlers: Handlers) -> None:
    rest = [page.chat, page.moments, page.progress, page.notice, page.command, page.returned]
    work = {"outputs": [page.question, *rest, page.watch, page.ask, page.stop], **QUIET}
    asking = gr.on(
        [page.ask.click, page.question.submit],
        handlers.ask,
        [page.question, *page.settings],
        trigger_mode="multiple",  # so that who asks while an answer is written is told to wait
        **work,
    )
    begun = [
        asking,
        page.watch.click(handlers.watch, page.settings, **work),
        page.chat.example_select(handlers.ask_example, page.settings, **work),
        page.chat.retry(handlers.regenerate, page.settings, **work),
        page.chat.edit(handlers.edit, page.settings, **work),
        page.chat.undo(handlers.undo, None, rest, **QUIET),
        page.chat.clear(handlers.clear, None, rest, **QUIET),
    ]
    for event in begun:
        event.then(handlers.plan, page.settings, page.plan_and_buttons, **QUIET)
        event.then(
            None,
            [page.question, page.returned],
            page.question,
            js="(written, returned) => written || returned",
            api_visibility="private",
        )
    page.stop.click(handlers.stop, **QUICK)


def _wire_exports(page: Page, handlers: Handlers) -> None:
    for button, export, name in (
        (page.markdown, handlers.export_markdown, "conversation.md"),
        (page.json, handlers.export_json, "conversation.json"),
    ):
        save = f"(text) => window.rrdemo.save(text, '{name}')"
        button.click(export, None, page.exported, **QUICK).success(
            None, page.exported, None, js=save, api_visibility="private"
        )


def _wire_api(page: Page, handlers: Handlers) -> None:
    result = gr.JSON(visible=False)
    question = gr.Textbox(visible=False, label="question")
    endpoints = Endpoints(handlers)
    gr.Button(visible=False).click(endpoints.watch, [page.upload, *page.settings], result, api_name="watch")
    gr.Button(visible=False).click(endpoints.ask, question, result, api_name="ask")


@dataclass(frozen=True, slots=True)
class Served:
    """A running app: where it is, and how it ends."""

    url: str
    app: gr.Blocks
    visitors: Visitors
    folder: Path  # of uploads

    def wait(self) -> None:
        """Serve until interrupted."""
        self.app.block_thread()

    def close(self) -> None:
        """End the server, and delete what was uploaded."""
        self.app.close(verbose=False)
        self.visitors.close()
        self.visitors.studio.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def serve(
    studio: Studio,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    auth: tuple[str, str] | None = None,
    open_browser: bool = False,
) -> Served:
    """Start the app and return while it runs; `port` None takes a free one.

    Raises `RRVideoError` if the port is taken; then nothing is left behind.
    """
    folder = Path(tempfile.mkdtemp(prefix="rrvideo-demo-"))
    os.environ["GRADIO_TEMP_DIR"] = str(folder)  # where Gradio puts uploads: not beside those of other apps
    os.environ.pop("GRADIO_ALLOWED_PATHS", None)
    visitors = Visitors(studio)
    try:
        app = build(studio, visitors)
        _, url, shared = app.launch(
            server_name=host,
            server_port=port,
            share=share,
            auth=auth,
            inbrowser=open_browser,
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,  # what is known is told in our words; the rest is for the log
            max_file_size=studio.limits.upload_bytes,
            max_threads=studio.limits.waiting + THREADS,
            allowed_paths=[],
            enable_monitoring=False,
            run_history=False,
            footer_links=["api", "settings"],
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            theme=theme(),
            head=_head(),
            app_kwargs={"routes": _routes(visitors)},
        )
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise RRVideoError(_refusal(host, port), "choose another --port, or --host") from error
        raise
    return Served(shared or url, app, visitors, folder)


def _refusal(host: str, port: int | None) -> str:
    """Why the server does not start, in place of Gradio's words, which name options that are not ours."""
    return f"the server cannot listen on {host}" + (f", port {port}: is it taken?" if port else "")


def _head() -> str:
    """Our style and script; Gradio's own way to take CSS would rewrite its selectors, and not always rightly."""
    style, script = ((ASSETS / name).read_text() for name in ("style.css", "page.js"))
    return f"<style>{style}</style><script>{script}</script>"


def _routes(visitors: Visitors) -> list[Route]:
    """Where files come from, before Gradio is asked.

    It would give an upload to whoever knows its path, and have an ffmpeg open what anybody sends as a recording.
    """
    closed = [
        Route(f"{prefix}/{path}", _closed, methods=["GET", "POST"])
        for prefix in ("", "/gradio_api")
        for path in ("file={path:path}", "file/{path:path}", "process_recording")
    ]
    return [Route("/video/{session_id}", partial(_video, visitors)), *closed]


def _closed(_: Request) -> Response:
    return PlainTextResponse("Files are for those who have uploaded them.", status_code=403)


def _video(visitors: Visitors, request: Request) -> Response:
    """The file that is open in a session, in the parts that the player asks for; only its own page knows where."""
    session = visitors.find(request.path_params["session_id"])
    if session is None or session.file is None:
        return PlainTextResponse("There is no such video.", status_code=404)
    headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, no-store"}
    kind = mimetypes.guess_type(session.file.path)[0] or ""
    kind = kind if kind.startswith("video/") else "video/mp4"  # never a page, whatever the machine takes .ts for
    return FileResponse(session.file.path, media_type=kind, headers=headers)
