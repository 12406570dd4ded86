"""`rrvideo demo`: read the options, load the model once, and serve the chat until it is interrupted."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from rrvideo import options
from rrvideo.clock import parse_time
from rrvideo.errors import RRVideoError

if TYPE_CHECKING:
    from rrdemo.guard import Limits

__all__ = ["main"]

LOOPBACK = {"127.0.0.1", "localhost", "::1"}
PORT = 7860


def main() -> int:
    """Run the process's own command line and return the exit code. Raises `RRVideoError`."""
    arguments = _parser().parse_args()
    model = arguments.model or os.environ.get("RRVIDEO_MODEL") or "tiny"
    auth = _auth(arguments.auth)
    _warn_of_strangers(arguments, auth)
    try:
        from rrdemo.app import serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise RRVideoError("the chat needs Gradio, which is not installed", "pip install 'rrvideo[demo]'") from error
    from rrdemo.studio import Studio
    from rrvideo.terminal import hush_transformers

    print(f"rrvideo: loading {model}", file=sys.stderr)
    hush_transformers(keep_downloads=True)
    memory = None if arguments.memory is None else int(arguments.memory * 1e9)
    studio = Studio.load(
        model,
        device=arguments.device,
        dtype=arguments.dtype,
        limits=_limits(arguments),
        memory=memory,
        keep=60 * arguments.keep,
    )
    served = serve(
        studio,
        host=arguments.host,
        port=arguments.port,
        share=arguments.share,
        auth=auth,
        open_browser=arguments.open,
    )
    print(served.url, flush=True)
    print("rrvideo: Ctrl+C ends it", file=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what was uploaded is deleted then too
    try:
        served.wait()
    finally:
        served.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    from rrdemo.guard import Limits

    standard = Limits()
    parser = argparse.ArgumentParser(
        prog="rrvideo demo", description="Chat about videos in the browser. Only this machine can reach it."
    )
    options.add_model(parser)
    where = parser.add_argument_group("who can reach it")
    where.add_argument("--host", metavar="H", default="127.0.0.1", help="listen on this address (default: 127.0.0.1)")
    where.add_argument("--port", metavar="N", type=_port, default=PORT, help=f"(default: {PORT})")
    where.add_argument("--share", action="store_true", help="a public address, through Gradio's tunnel")
    where.add_argument(
        "--auth",
        metavar="USER:PASSWORD",
        help="ask for these first (default: $RRVIDEO_DEMO_AUTH, which other users of this machine cannot read)",
    )
    where.add_argument(
        "--yes", action="store_true", help="let anybody in who can reach it: --share or --host without --auth"
    )
    where.add_argument("--open", action="store_true", help="open it in the browser")
    limits = parser.add_argument_group("what it takes")
    limits.add_argument(
        "--max-upload",
        metavar="MB",
        type=options.positive,
        default=standard.upload_bytes / 1e6,
        help=f"the largest file (default: {standard.upload_bytes / 1e6:.0f})",
    )
    limits.add_argument(
        "--max-length",
        metavar="H:MM:SS",
        type=_length,
        default=standard.duration,
        help="the longest video (default: 4:00:00)",
    )
    limits.add_argument(
        "--max-frames",
        metavar="N",
        type=options.count,
        default=standard.max_frames,
        help=f"frames that one watch may look at (default: {standard.max_frames})",
    )
    limits.add_argument(
        "--max-waiting",
        metavar="N",
        type=options.count,
        default=standard.waiting,
        help=f"people who may wait for the model (default: {standard.waiting})",
    )
    limits.add_argument(
        "--memory",
        metavar="GB",
        type=options.positive,
        help="for all open videos together (default: half of what the GPU has left, or a quarter of the machine's)",
    )
    limits.add_argument(
        "--keep",
        metavar="MINUTES",
        type=options.positive,
        default=30.0,
        help="keep an unused video so long (default: 30)",
    )
    return parser


def _limits(arguments: argparse.Namespace) -> Limits:
    from rrdemo.guard import Limits

    return replace(
        Limits(),
        upload_bytes=int(arguments.max_upload * 1e6),
        duration=arguments.max_length,
        max_frames=arguments.max_frames,
        waiting=arguments.max_waiting,
    )


def _auth(given: str | None) -> tuple[str, str] | None:
    text = given or os.environ.get("RRVIDEO_DEMO_AUTH")
    if not text:
        return None
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise RRVideoError("--auth must be USER:PASSWORD", "neither may be empty")
    return user, password


def _warn_of_strangers(arguments: argparse.Namespace, auth: tuple[str, str] | None) -> None:
    """Whoever reaches the app can use the machine: that must be meant. Raises `RRVideoError` if it is not sure."""
    if auth or not (arguments.share or arguments.host not in LOOPBACK):
        return
    who = "anybody who learns the address" if arguments.share else "anybody in the network"
    print(
        f"rrvideo: warning: {who} can upload videos and use this machine's model, without a password", file=sys.stderr
    )
    if not arguments.yes:
        raise RRVideoError("this needs --auth USER:PASSWORD, or --yes", "--yes says that you mean it")


def _port(text: str) -> int:
    port = options.count(text)
    if port > 65535:
        raise argparse.ArgumentTypeError(f"must be 65535 at most, got {text!r}")
    return port


def _length(text: str) -> float:
    try:
        seconds = parse_time(text)
    except ValueError:
        seconds = 0.0
    if not seconds:
        raise argparse.ArgumentTypeError(f"must be a time such as 1:30:00, got {text!r}")
    return seconds
