"""The files around the weights of a Qwen2-VL style checkpoint: tokenizer, chat template and processor configuration.

`train.py` writes the embedded model with these functions, and the tests their small random checkpoints, so that what
the tests load has the layout of what users load.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CHAT_TEMPLATE", "SPECIAL_TOKENS", "make_tokenizer", "save_layout"]

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# ChatML with one placeholder per image or video. The system text is there when the conversation brings none.
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'video' -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif item['type'] == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- else -%}
{{- item['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}"""

# The mean and standard deviation per colour channel of CLIP's training images, as every Qwen2-VL processor uses them.
_IMAGE_MEAN = [0.48145466, 0.4578275, 0.40821073]
_IMAGE_STD = [0.26862954, 0.26130258, 0.27577711]


def make_tokenizer(corpus: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer of the Qwen2 kind on `corpus`.

    `vocab_size` counts the special tokens (the first ids, in the order of `SPECIAL_TOKENS`) and the 256 bytes, so that
    any text can be written; a small corpus may yield fewer. Raises `ValueError` if there is no room for those.
    """
    from transformers import Qwen2Tokenizer

    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest}, got {vocab_size}")
    untrained = Qwen2Tokenizer(chat_template=CHAT_TEMPLATE)
    untrained.add_special_tokens({"extra_special_tokens": list(SPECIAL_TOKENS)})
    tokenizer = untrained.train_new_from_iterator(corpus, vocab_size, show_progress=False)
    tokenizer.eos_token = "<|im_end|>"  # only now: the order of the ids is the order in which tokens were added
    return tokenizer


def save_layout(
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    min_pixels: int,
    max_pixels: int,
    processor_class: str = "Qwen2VLProcessor",
) -> None:
    """Write everything but `config.json` and the weights into `folder`.

    `min_pixels` and `max_pixels` bound one frame. Image and video processor share them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    common = {
        "processor_class": processor_class,
        "size": {"shortest_edge": min_pixels, "longest_edge": max_pixels},
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": _IMAGE_MEAN,
        "image_std": _IMAGE_STD,
        "resample": 3,
    }
    _write_json(folder / "preprocessor_config.json", {"image_processor_type": "Qwen2VLImageProcessor", **common})
    _write_json(folder / "video_preprocessor_config.json", {"video_processor_type": "Qwen2VLVideoProcessor", **common})


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
