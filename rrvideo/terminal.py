"""What is said on stderr while the answer is on its way: a line that is written anew on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from shutil import get_terminal_size

__all__ = ["Status", "hush_transformers"]


class Status:
    """What is going on: one line that is written anew on a terminal, one for each stage elsewhere."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._live = sys.stderr.isatty()
        self._stage = ""

    def show(self, stage: str, detail: str = "") -> None:
        """Say what goes on; `detail` is only for a terminal."""
        if self._quiet:
            return
        if self._live:
            line = f"{stage} {detail}"[: get_terminal_size().columns - 1]
            self._write(f"\r\033[K{line}")
        elif stage != self._stage:
            self._write(f"{stage}\n")
        self._stage = stage

    def watching(self, name: str) -> Callable[[str, int, int, float], None]:
        """A progress callback for `VideoQA.watch`: frames and tokens are counted side by side.

        Until the first are encoded it is decoded frames that are told.
        """
        counts: dict[str, str] = {}

        def progress(unit: str, done: int, total: int, _: float) -> None:
            count = f"{done:,} of {total:,} {unit}"
            if unit != "decoded":
                counts[unit] = count
            elif counts:
                return
            self.show(f"watching {name}", ", ".join(counts.values()) or count)

        return progress

    def clear(self) -> None:
        """Leave a clean line to others."""
        if self._live and self._stage:
            self._write("\r\033[K")
            self._stage = ""

    def remark(self, text: str) -> None:
        """Say something that stays."""
        if not self._quiet:
            self._write(f"\033[2m{text}\033[0m\n" if self._live else f"{text}\n")

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


def hush_transformers(*, keep_downloads: bool) -> None:
    """Keep its loading bars off the screen, but not those of a download, which takes long."""
    from rrvideo.compat import mend_torchvision

    mend_torchvision()
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars  # type: ignore[attr-defined]
    from transformers.utils import logging

    downloads = keep_downloads and not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if downloads:
        enable_progress_bars()
