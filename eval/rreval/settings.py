"""What the answers of a run depend on, and the published configurations."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rreval.data import VideoItem, digest
from rrvideo.errors import RRVideoError
from rrvideo.options import rr_config

if TYPE_CHECKING:
    from rrattention import RRConfig
    from rrvideo.model import Checkpoint
    from rrvideo.pipeline import VideoQA

__all__ = ["DEFAULTS", "LABELS", "PRESETS", "Preset", "RunSettings", "choices_of", "config_of", "rule_of", "versions"]

TOKEN = 28 * 28  # pixels of a visual token of Qwen2-VL and Qwen2.5-VL, in each of the two frames that it stands for

# What a run does unless it is told otherwise; None is for the checkpoint to say.
DEFAULTS: dict[str, Any] = {
    "attention": "rr",
    "tau": 0.95,
    "rule": "default",
    "head_weights": None,
    "fps": 1.0,
    "max_frames": 768,
    "sampling": "uniform",
    "fit": False,
    "reader": "pyav",
    "timestamps": None,
    "min_pixels": None,
    "max_pixels": None,
    "total_pixels": None,
    "subtitles": False,
    "max_new_tokens": 128,
}
PIXELS = ("min_pixels", "max_pixels", "total_pixels")
# Settings that only name things: two runs that differ in nothing else are one.
LABELS = ("preset", "model", "dataset", "versions")


@dataclass(frozen=True, slots=True)
class Preset:
    """A published configuration, as far as it is published, and where each of its figures is from."""

    values: Mapping[str, Any]
    source: str


_QWEN2_VL = {
    "fps": 2.0,
    "max_frames": 768,
    "sampling": "uniform",
    "timestamps": False,
    "min_pixels": 128 * TOKEN,
    "max_pixels": 768 * TOKEN,
    "total_pixels": 24576 * TOKEN,
}
PRESETS = {
    "qwen2-vl-paper": Preset(
        {**_QWEN2_VL, "attention": "full"},
        "2 frames a second and at most 768: Qwen2-VL (arXiv 2409.12191), section 3. At most 24,576 visual tokens, 128 "
        "to 768 for two frames: qwen-vl-utils when the model came out; the paper gives no limit for this benchmark. "
        "Published for the 7B: 63.3, with subtitles 69.0.",
    ),
    "qwen2.5-vl-paper": Preset(
        {**_QWEN2_VL, "attention": "full"},
        "At most 768 frames and 24,576 visual tokens: Qwen2.5-VL (arXiv 2502.13923), section 3. 2 frames a second, and "
        "128 to 768 tokens for two frames: qwen-vl-utils. Published for the 7B: 65.1, with subtitles 71.6.",
    ),
    "rrattention-paper": Preset(
        {**_QWEN2_VL, "attention": "rr", "tau": 0.95, "rule": "paper"},
        "Blocks of 128, strides of 8, tau 0.95 for each row of blocks: RRAttention (arXiv 2602.05853). Frames as in "
        "qwen2-vl-paper. Published for Qwen2-VL-7B: 64.3 at 34.7 % sparsity, and 63.9 with full attention.",
    ),
}


def choices_of(preset: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """What is `given`, else what the preset says, else the default: a value for each of `DEFAULTS`.

    Raises `RRVideoError` if one of them needs what is not installed.
    """
    published = PRESETS[preset].values if preset else {}
    choices = {name: given.get(name, published.get(name, default)) for name, default in DEFAULTS.items()}
    if choices["reader"] == "decord" and find_spec("decord") is None:
        raise RRVideoError("decord is not installed", "pip install decord, or use --reader pyav")
    return choices


def config_of(choices: Mapping[str, Any]) -> RRConfig:
    """What RRAttention is to do by these choices."""
    return rr_config(choices["rule"], choices["tau"], choices["head_weights"])


def rule_of(config: RRConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """By which rule blocks are kept, as runs record it: all but tau, and for the weights of heads a digest of them.

    Where a prefill is sparse from so many tokens on as is measured to be best, the model's device says how many.
    """
    rule = {name: value for name, value in config.to_dict().items() if name != "tau"}
    rule["min_tokens"] = config.least_tokens(checkpoint.device)
    if weights := rule.get("head_weights"):
        rule["head_weights"] = sha256(json.dumps(weights).encode()).hexdigest()[:16]
    return rule


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """All that answers depend on. With full attention `tau` is None and `rrattention`, its other fields, are empty."""

    preset: str | None
    model: str
    checkpoint: str  # a digest
    dtype: str
    attention: str
    tau: float | None
    rrattention: Mapping[str, Any]
    fps: float
    max_frames: int
    sampling: str
    fit: bool
    reader: str
    timestamps: bool
    min_pixels: int
    max_pixels: int
    total_pixels: int
    subtitles: bool
    max_new_tokens: int
    dataset: str
    dataset_digest: str
    videos: int  # of the whole set
    questions: int
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        qa: VideoQA,
        choices: Mapping[str, Any],
        items: Sequence[VideoItem],
        *,
        model: str,
        dataset: str,
        preset: str | None = None,
    ) -> RunSettings:
        """Settle what `choices` (see `DEFAULTS`) leave to the checkpoint, for a set of which `items` are all.

        `model`, `dataset` and `preset` are what the user calls them. Raises `RRVideoError`
        if the limits of pixels contradict each other.
        """
        from rrattention.transformers import settings
        from rrvideo.store import checkpoint_digest

        checkpoint = qa.checkpoint
        pixels = {name: choices[name] for name in PIXELS if choices[name]}
        try:
            limits = replace(checkpoint.limits, **pixels)
        except ValueError as error:
            raise RRVideoError(f"pixel limits: {error}", "give --min-pixels and --max-pixels together") from error
        config, attention = settings(checkpoint.model)
        sparse = attention == "rr"
        timestamps = choices["timestamps"]
        plain = ("fps", "max_frames", "sampling", "fit", "reader", "subtitles", "max_new_tokens")
        return cls(
            preset=preset,
            model=model,
            checkpoint=checkpoint_digest(checkpoint.folder)[:16],
            dtype=str(checkpoint.dtype).removeprefix("torch."),
            attention=attention,
            tau=config.tau if sparse else None,
            rrattention=rule_of(config, checkpoint) if sparse else {},
            timestamps=not checkpoint.family.tells_time if timestamps is None else timestamps,
            min_pixels=limits.min_pixels,
            max_pixels=limits.max_pixels,
            total_pixels=limits.total_pixels,
            dataset=dataset,
            dataset_digest=digest(items),
            videos=len(items),
            questions=sum(len(item.rows) for item in items),
            versions=versions(),
            **{name: choices[name] for name in plain},
        )

    def limited(self, qa: VideoQA) -> VideoQA:
        """The same model, to which frames are of these sizes."""
        from rrvideo.pipeline import VideoQA

        pixels = {name: getattr(self, name) for name in PIXELS}
        return VideoQA(replace(qa.checkpoint, limits=replace(qa.checkpoint.limits, **pixels)))

    def watch_options(self) -> dict[str, Any]:
        """What `VideoQA.watch` takes of these."""
        return {name: getattr(self, name) for name in ("fps", "max_frames", "sampling", "fit", "reader", "timestamps")}

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON takes them."""
        return asdict(self)


def versions() -> dict[str, str]:
    """What ran: recorded with a run, but a run may go on with others."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    packages = {name: version(name) for name in ("rrvideo", "torch", "transformers")}
    return {**packages, "python": platform.python_version(), "machine": f"{platform.system()}, {device}"}
