"""What this machine can run, and what to do about what is missing.

Each check stands alone and imports what it looks at, so that a broken package is a finding and not a crash.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal

__all__ = ["Check", "examine"]

Status = Literal["ok", "note", "missing"]

EMBEDDED = Path(__file__).parent / "tiny" / "checkpoint" / "model.safetensors"
MODELS = {"Qwen/Qwen2-VL-2B-Instruct": 2.2, "Qwen/Qwen2-VL-7B-Instruct": 8.3}  # billions of weights


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. Nothing works without what is "missing"; a "note" tells of a limit, or of what could be had."""

    name: str
    status: Status
    found: str
    advice: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON takes them."""
        return asdict(self)


def examine() -> list[Check]:
    """Look at the machine, its packages and its models, without using the network."""
    return [_attempt(name, look) for name, look in LOOKS.items()]


def _attempt(name: str, look: Callable[[], tuple[Status, str, str]]) -> Check:
    try:
        return Check(name, *look())
    except (ImportError, OSError) as error:  # of a package that other checks tell of
        return Check(name, "note", f"cannot be looked at: {error}")


def _python() -> tuple[Status, str, str]:
    return "ok", f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores", ""


def _package(name: str, advice: str, *, without: Status = "missing") -> tuple[Status, str, str]:
    try:
        import_module(name)  # its compiled parts may be broken though it is there
    except (ImportError, OSError) as error:
        return without, f"cannot be imported: {error}", advice
    return "ok", metadata.version(name), ""


def _gpu() -> tuple[Status, str, str]:
    name, memory = _accelerator()
    if name:
        return "ok", f"{name}, {memory:.0f} GB", ""
    if shutil.which("nvidia-smi"):
        return "note", "there is one that torch cannot use", "install a CUDA build of torch: see pytorch.org"
    return "note", "none: models run on the CPU, large ones slowly", ""


def _embedded_model() -> tuple[Status, str, str]:
    if not EMBEDDED.is_file():
        return "missing", f"{EMBEDDED} is not there", "install rrvideo again"
    return "ok", f"{EMBEDDED.stat().st_size / 1e6:.0f} MB", "try it: rrvideo ask sample 'What appears first?'"


def _real_models() -> tuple[Status, str, str]:
    name, memory = _accelerator()
    place = name or f"the CPU (slowly) with {memory:.0f} GB of memory"
    weight = 2 if name else 4  # bytes
    fitting = [model for model, billions in MODELS.items() if 1.2 * billions * weight + 2 <= memory]
    if not fitting:
        return "note", f"none fits {place}", f"the smallest is {next(iter(MODELS))}"
    return "ok" if name else "note", f"{', '.join(fitting)} fits {place}", f"--model {fitting[-1]}"


def _downloaded_models() -> tuple[Status, str, str]:
    from huggingface_hub.constants import HF_HUB_CACHE

    from rrvideo.model import FAMILIES

    cache = Path(HF_HUB_CACHE)
    found = set()
    for config in cache.glob("models--*/snapshots/*/config.json"):
        if json.loads(config.read_text(encoding="utf-8")).get("model_type") in FAMILIES:
            found.add(config.parts[len(cache.parts)].removeprefix("models--").replace("--", "/", 1))
    if not found:
        return "note", f"none in {cache}", f"hf download {next(iter(MODELS))}, or pass a folder to --model"
    return "ok", f"{', '.join(sorted(found))} in {cache}", ""


def _chosen_model() -> tuple[Status, str, str]:
    chosen = os.environ.get("RRVIDEO_MODEL")
    if chosen:
        return "ok", chosen, ""
    return "ok", "the embedded one, which knows only its own world of shapes", "set RRVIDEO_MODEL to choose another"


def _accelerator() -> tuple[str, float]:
    """The name of the GPU that models would run on, "" if there is none, and the gigabytes that they would have."""
    import torch

    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        return gpu.name, gpu.total_memory / 1e9
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9 if hasattr(os, "sysconf") else 0.0
    return "Apple's GPU" if torch.backends.mps.is_available() else "", memory


LOOKS: dict[str, Callable[[], tuple[Status, str, str]]] = {
    "python": _python,
    "torch": lambda: _package("torch", "pip install torch"),
    "transformers": lambda: _package("transformers", "pip install transformers"),
    "av": lambda: _package("av", "pip install av"),
    "decord": lambda: _package("decord", "pip install decord, if --reader decord is wanted", without="note"),
    "triton": lambda: _package("triton", "it comes with torch on Linux; the GPU kernels need it", without="note"),
    "gpu": _gpu,
    "embedded model": _embedded_model,
    "real models": _real_models,
    "downloaded": _downloaded_models,
    "default model": _chosen_model,
}
