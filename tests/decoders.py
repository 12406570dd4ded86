"""Small random decoders of Hugging Face, what to give them, and how to compare what they make of it."""

import copy

import torch
import transformers

from rrattention import RRConfig
from rrattention.transformers import enable

SPARSE = RRConfig(block_size=16, stride=4, tau=0.5, min_tokens=0)
EXACT = RRConfig(block_size=16, stride=4, tau=1.0, min_tokens=0)

TEXT = {
    "vocab_size": 120,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
VISION_START, VISION_END, VIDEO, IMAGE = 116, 117, 118, 119


def make_model(name="Llama", **settings):
    """Build a small random decoder whose attention is far from uniform."""
    config = getattr(transformers, f"{name}Config")(**TEXT | settings)
    return randomize(getattr(transformers, f"{name}ForCausalLM")(config))


def make_qwen2_vl():
    config = transformers.Qwen2VLConfig(
        text_config=TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        video_token_id=VIDEO,
        image_token_id=IMAGE,
    )
    return randomize(transformers.Qwen2VLForConditionalGeneration(config))


def randomize(model):
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.3, generator=generator)
    return model.eval().requires_grad_(False)


def make_ids(length, batch=1, seed=0):
    return torch.randint(1, 110, (batch, length), generator=torch.Generator().manual_seed(seed))


def video_inputs(question=20):
    """6 temporal steps of 8 x 8 patches: 96 visual tokens, between text."""
    generator = torch.Generator().manual_seed(0)
    ids = make_ids(10 + question)[0]
    visual = torch.tensor([VISION_START, *[VIDEO] * 96, VISION_END])
    ids = torch.cat([ids[:10], visual, ids[10:]])[None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == VIDEO).long() * 2,
        "pixel_values_videos": torch.randn(6 * 64, 3 * 2 * 14 * 14, generator=generator),
        "video_grid_thw": torch.tensor([[6, 8, 8]]),
    }


def logits_with(model, implementation, **inputs):
    """Logits of a copy of `model`, under "sdpa" or an RRConfig."""
    model = copy.deepcopy(model)
    if isinstance(implementation, RRConfig):
        enable(model, implementation)
    else:
        model.set_attn_implementation(implementation)
    return model(**inputs).logits


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def differ(one, other):
    return (one - other).abs().max() > 0.1
