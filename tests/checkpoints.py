"""Small random checkpoints of each family, in the files and folders of real ones."""

from pathlib import Path
from typing import Any

import torch
import transformers

from rrvideo.tiny.layout import make_tokenizer, save_layout

MODEL_CLASSES = {
    "qwen2_vl": transformers.Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
}
FAMILIES = list(MODEL_CLASSES)

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
    else:
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
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODEL_CLASSES[family](config)
        for parameter in model.parameters():  # larger than at the start of training, so that every part tells
            torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 1.0)
    model.to(dtype).save_pretrained(folder)
    processor_class = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}[family]
    save_layout(folder, tokenizer, min_pixels=56 * 56, max_pixels=28 * 28 * 1280, processor_class=processor_class)
    return folder
