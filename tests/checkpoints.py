"""Small random checkpoints of each family, in the files and folders of real ones."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from rrvideo.clock import format_time
from rrvideo.tiny.layout import make_tokenizer, save_layout

MODEL_CLASSES = {
    "qwen2_vl": transformers.Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": transformers.Qwen3VLForConditionalGeneration,
}
FAMILIES = list(MODEL_CLASSES)
PLACEHOLDER = "<|vision_start|><|video_pad|><|vision_end|>"

CORPUS = [
    "What colour is the circle? It is red. The blue star moves to the left in the second scene.",
    "How many scenes are there? There are three. Describe the video. The square comes after the triangle.",
]


def make_checkpoint(folder: Path, family: str = "qwen2_vl", *, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random model of one of the `FAMILIES`, with some 200,000 weights, into `folder`."""
    tokenizer = make_tokenizer(CORPUS * 10, 330)
    ids = {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    }
    text: dict[str, Any] = {
        "vocab_size": 336,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "qwen2_vl":
        vision: dict[str, Any] = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
        config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    elif family == "qwen2_5_vl":
        # Windows of 2 x 2 visual tokens in the first layer, and so of several lengths; the second layer sees all.
        vision = {
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 48,
            "num_heads": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        }
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    else:
        # Heads wider than their share of the hidden size, as in the 2B and the 4B; features of two of three
        # vision layers are added to the output of the first two language layers.
        text |= {"head_dim": 32, "num_hidden_layers": 3}
        text["rope_parameters"] |= {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
        vision = {
            "depth": 3,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 48,
            "num_heads": 2,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 1],
        }
        config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **ids)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODEL_CLASSES[family](config)
        for name, parameter in model.named_parameters():  # larger than before training, so that every part tells
            sharp = "q_norm" in name or "k_norm" in name  # else attention would see all tokens alike
            torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 3.0 if sharp else 1.0)
    if family == "qwen3_vl":  # published with two ends
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.to(dtype).save_pretrained(folder)
    processor_class = MODEL_CLASSES[family].__name__.replace("ForConditionalGeneration", "Processor")
    save_layout(folder, tokenizer, min_pixels=56 * 56, max_pixels=28 * 28 * 1280, processor_class=processor_class)
    if family == "qwen3_vl":
        change_processors(folder)
    return folder


def change_processors(folder: Path) -> None:
    """Make Qwen2-VL's processor configurations Qwen3-VL's."""
    for kind in ("preprocessor", "video_preprocessor"):
        path = folder / f"{kind}_config.json"
        config = json.loads(path.read_text())
        config |= {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        if kind == "video_preprocessor":
            # Of a whole video: 1280 visual tokens of two frames each. The published one has 12288.
            config |= {"size": {"shortest_edge": 4096, "longest_edge": 1280 * 2 * 32 * 32}}
            config |= {"video_processor_type": "Qwen3VLVideoProcessor"}
        path.write_text(json.dumps(config))


def processed(
    processor: Any, frames: np.ndarray, times: Sequence[float], question: str, *, timestamps: bool = True
) -> Any:
    """What the processor of transformers makes of a question about a video, with the times written between its steps.

    `frames` are uint8 `[frames, height, width, 3]` of the final size, and `times` say in seconds when they are shown.
    """
    content = [{"type": "video"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    videos, options = [frames], {}
    if type(processor).__name__ == "Qwen3VLProcessor":
        # It writes the times itself. What it puts for the pad token was made to replace the start and the end as well,
        # and did in transformers 4.57.
        text = text.replace(PLACEHOLDER, "<|video_pad|>")
        milliseconds = [round(time * 1000) for time in times]
        options["video_metadata"] = [{"total_num_frames": 10**9, "fps": 1000.0, "frames_indices": milliseconds}]
    elif timestamps:
        videos = [frames[i : i + 2] for i in range(0, len(frames), 2)]
        text = text.replace(PLACEHOLDER, "".join(format_time(time) + PLACEHOLDER for time in times[::2]))
    return processor(
        text=[text],
        videos=videos,
        do_resize=False,
        do_sample_frames=False,
        cap_pixels_per_frame=False,
        return_tensors="pt",
        **options,
    )
