"""The families of models that are supported, and all that differs between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rrvideo.tokens import Label, PatchSpec, clock_label, seconds_label
from rrvideo.video import PixelLimits

__all__ = ["FAMILIES", "Family"]

# How frames are cut where a checkpoint's processor does not say it.
_QWEN2_PATCHES = PatchSpec()
_QWEN3_PATCHES = PatchSpec(patch_size=16, image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5))


@dataclass(frozen=True, slots=True)
class Family:
    """What differs between families: the transformers class, how frames are cut, and how the model learns the time."""

    model_type: str
    class_name: str
    tells_time: bool = False  # its temporal positions are seconds: other families read the time in the prompt
    label: Label = clock_label  # how the prompt tells the time of a temporal step
    parts_steps: bool = False  # each temporal step is a segment of its own, also where no time is written
    spec: PatchSpec = _QWEN2_PATCHES
    limits_videos: bool = False  # the processor's `size` bounds the pixels of a whole video, not of one frame

    def pixel_limits(self, processor: Mapping[str, Any], spec: PatchSpec) -> PixelLimits:
        """The published limits of qwen-vl-utils, within a processor configuration's own where both can be met.

        Raises `ValueError` if the configuration's make no sense.
        """
        token = spec.factor**2  # pixels
        usual = PixelLimits(128 * token, 768 * token, int(0.9 * 128000 * token), spec.factor, spec.temporal_patch_size)
        size = processor.get("size") or {}
        least = processor.get("min_pixels") or size.get("shortest_edge")
        most = processor.get("max_pixels") or size.get("longest_edge")
        if self.limits_videos:
            # `least` is as good as always met: as published, it is less than one frame has here.
            total = min(usual.total_pixels, most // spec.temporal_patch_size) if most else usual.total_pixels
            return replace(usual, total_pixels=total)
        least, most = least or usual.min_pixels, most or usual.max_pixels
        low, high = max(usual.min_pixels, least), min(usual.max_pixels, most)
        if low > high:
            low, high = least, most
        return replace(usual, min_pixels=low, max_pixels=high)


FAMILIES = {
    family.model_type: family
    for family in (
        Family("qwen2_vl", "Qwen2VLForConditionalGeneration"),
        Family("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", tells_time=True),
        Family(
            "qwen3_vl",
            "Qwen3VLForConditionalGeneration",
            label=seconds_label,
            parts_steps=True,
            spec=_QWEN3_PATCHES,
            limits_videos=True,
        ),
    )
}
