"""Loading checkpoints, and what the loaded model computes against the plain forward pass of transformers."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, MODEL_CLASSES, make_checkpoint, processed
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from rrattention import RRConfig
from rrattention.transformers import record
from rrvideo.errors import ModelError
from rrvideo.model import Checkpoint, load
from rrvideo.tokens import patchify
from rrvideo.vision import SEGMENT_ATTENTION

TURNS = ["What colour is the circle?"]
SECONDS_PER_STEP = 2.0
# Over two "devices", memory and disk, because there is only one that every machine has.
SPREAD = {
    "model.visual": "cpu",
    "model.language_model.embed_tokens": "cpu",
    "model.language_model.rotary_emb": "cpu",
    "model.language_model.norm": "cpu",
    "model.language_model.layers.0": "cpu",
    "model.language_model.layers.1": "disk",
    "model.language_model.layers.2": "cpu",
    "lm_head": "disk",
}
in_each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def loaded(folders) -> dict[str, Checkpoint]:
    return {family: load(folder, attention="full", device="cpu") for family, folder in folders.items()}


@pytest.fixture(scope="module")
def plain(folders):
    """The models as transformers alone loads and runs them."""
    return {family: MODEL_CLASSES[family].from_pretrained(folder) for family, folder in folders.items()}


@pytest.fixture
def folder(folders, tmp_path) -> Path:
    """A copy of a good checkpoint, to be damaged."""
    return shutil.copytree(folders["qwen2_vl"], tmp_path / "checkpoint")


def random_frames(checkpoint, shape):
    """Frames of a shape that is told in frames and in rows and columns of visual tokens."""
    count, rows, columns = shape
    sides = rows * checkpoint.spec.factor, columns * checkpoint.spec.factor
    return np.random.default_rng(0).integers(0, 256, (count, *sides, 3), dtype=np.uint8)


def frame_times(count):
    return [i * SECONDS_PER_STEP / 2 for i in range(count)]


def inputs_for(checkpoint, frames, timestamps=None):
    """The prefix, all token ids, their positions, and the patches."""
    prefix = checkpoint.prefix(frame_times(len(frames)), frames.shape[1:3], timestamps=timestamps)
    question = checkpoint.question(prefix, TURNS)
    positions = torch.cat([prefix.positions, prefix.next_positions(len(question))], dim=1)
    return prefix, torch.cat([prefix.input_ids, question]), positions[:, None], patchify(frames, checkpoint.spec)


def embeddings_of(checkpoint, prefix, ids, patches):
    visual = torch.cat([prefix.visual, torch.zeros(len(ids) - len(prefix), dtype=torch.bool)])
    return checkpoint.embed(ids, visual, checkpoint.encode(patches, prefix.grid_thw))[None]


def logits_of(checkpoint, frames):
    prefix, ids, positions, patches = inputs_for(checkpoint, frames)
    embeddings = embeddings_of(checkpoint, prefix, ids, patches)
    return checkpoint.forward(embeddings, positions.to(checkpoint.device), checkpoint.new_cache())


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize("shape", [(1, 2, 2), (6, 3, 5), (7, 4, 3)], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("timestamps", [False, True], ids=["no-times", "timestamps"])
@in_each_family
def test_logits_equal_those_of_the_plain_forward_pass(loaded, plain, family, timestamps, shape):
    checkpoint = loaded[family]
    prefix, ids, positions, patches = inputs_for(checkpoint, random_frames(checkpoint, shape), timestamps)

    logits = checkpoint.forward(
        embeddings_of(checkpoint, prefix, ids, patches), positions, checkpoint.new_cache(), last_only=False
    )

    # Where the video is one segment, transformers 5 misplaces the text after it (see test_tokens.py).
    own_positions = {"position_ids": positions} if len(prefix.grid_thw) == 1 else {}
    with torch.no_grad():
        expected = plain[family](
            input_ids=ids[None],
            pixel_values_videos=patches,
            video_grid_thw=prefix.grid_thw,
            mm_token_type_ids=2 * torch.cat([prefix.visual, torch.zeros(len(ids) - len(prefix))])[None].int(),
            **own_positions,
        ).logits
    assert (logits - expected).norm() <= 1e-4 * expected.norm()


@in_each_family
def test_logits_equal_those_of_the_processor_and_the_model_of_transformers(folders, loaded, plain, family):
    """The whole way, with nothing of ours on the other side but the times that Qwen2-VL and Qwen2.5-VL are told."""
    checkpoint = loaded[family]
    frames = random_frames(checkpoint, (6, 3, 5))
    inputs = processed(AutoProcessor.from_pretrained(folders[family]), frames, frame_times(6), TURNS[0])
    with torch.no_grad():
        expected = plain[family](**inputs).logits[:, -1:]

    prefix, ids, positions, patches = inputs_for(checkpoint, frames, timestamps=True)
    found = checkpoint.forward(embeddings_of(checkpoint, prefix, ids, patches), positions, None)

    assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_features_of_qwen3_carry_those_of_its_deepstack(loaded, plain):
    checkpoint = loaded["qwen3_vl"]
    prefix, ids, positions, patches = inputs_for(checkpoint, random_frames(checkpoint, (6, 3, 5)))
    features = checkpoint.encode(patches, prefix.grid_thw)
    with torch.no_grad():
        expected = plain["qwen3_vl"].model.visual(patches, grid_thw=prefix.grid_thw)
    columns = [expected.pooler_output, *expected.deepstack_features]

    assert features.shape == (3 * 15, checkpoint.feature_width) == (45, 3 * 64)
    assert (features - torch.cat(columns, dim=1)).norm() <= 1e-5 * features.norm()
    # Each level of them tells in the answer, and text is only as wide as its embedding.
    visual, asked = prefix.visual, ids[len(prefix) :]
    last = []
    for level in (None, 1, 2):
        cache, changed = checkpoint.new_cache(), features.clone()
        if level is not None:
            changed[:, 64 * level : 64 * (level + 1)] = 0
        seen = checkpoint.embed(prefix.input_ids, visual, changed)[None]
        checkpoint.forward(seen, positions[..., : len(prefix)], cache)
        text = checkpoint.embed(asked)[None]
        assert text.shape[-1] == 64
        last.append(checkpoint.forward(text, positions[..., len(prefix) :], cache))
    assert all((other - last[0]).norm() > 1e-2 * last[0].norm() for other in last[1:])


@in_each_family
def test_rrattention_is_on_unless_asked_otherwise_and_follows_its_config(folders, loaded, family):
    sparse = load(folders[family], device="cpu", config=RRConfig(block_size=16, stride=4, tau=0.3, min_tokens=0))
    frames = random_frames(sparse, (24, 3, 3))
    logits, densities = [], []
    for checkpoint in (sparse, loaded[family]):
        with record() as prefill:
            logits.append(logits_of(checkpoint, frames))
        densities.append(prefill.density())

    assert densities[0] < 0.9
    assert densities[1] == 1
    # The last query block sees all blocks, but what the first layer passed on to it has changed.
    assert (logits[0] - logits[1]).norm() > 1e-4 * logits[1].norm()


@in_each_family
def test_the_cache_goes_on_where_the_prefix_ended(loaded, family):
    checkpoint = loaded[family]
    prefix, ids, positions, patches = inputs_for(checkpoint, random_frames(checkpoint, (6, 2, 3)))
    embeddings = embeddings_of(checkpoint, prefix, ids, patches)
    at_once = checkpoint.forward(embeddings, positions, None)

    cache = checkpoint.new_cache()
    border = len(prefix)
    checkpoint.forward(embeddings[:, :border], positions[..., :border], cache)
    after = checkpoint.forward(embeddings[:, border:], positions[..., border:], cache)

    assert after.shape == at_once.shape == (1, 1, checkpoint.model.config.get_text_config().vocab_size)
    assert (after - at_once).norm() <= 1e-4 * at_once.norm()
    assert cache.get_seq_length() == len(ids)


@in_each_family
def test_answers_go_with_what_is_seen(loaded, family):
    frames = random_frames(loaded[family], (4, 2, 2))
    logits = [logits_of(loaded[family], video) for video in (frames, frames[::-1].copy())]

    assert (logits[0] - logits[1]).norm() > 1e-2 * logits[0].norm()


def test_families_that_do_not_tell_time_read_it_in_the_prompt(loaded):
    times = [0.0, 5.0, 10.0, 15.0]
    prefixes = {
        family: checkpoint.prefix(times, (checkpoint.spec.factor,) * 2) for family, checkpoint in loaded.items()
    }
    texts = {family: loaded[family].tokenizer.decode(prefix.input_ids) for family, prefix in prefixes.items()}

    assert "0:10<|vision_start|>" in texts["qwen2_vl"]
    assert "<12.5 seconds><|vision_start|>" in texts["qwen3_vl"]
    assert "user\n<|vision_start|>" in texts["qwen2_5_vl"]
    told = prefixes["qwen2_5_vl"]
    assert told.positions[0, told.visual].diff().tolist() == [20]  # 10 s at 2 tokens per second


@in_each_family
def test_a_loaded_vision_tower_runs_equal_segments_as_a_batch(loaded, family):
    assert loaded[family].model.model.visual.config._attn_implementation == SEGMENT_ATTENTION


def test_what_a_checkpoint_says_of_itself(folders, loaded):
    checkpoint = loaded["qwen2_vl"]

    assert checkpoint.folder == folders["qwen2_vl"]
    assert checkpoint.context_length == 4096
    assert checkpoint.stop_ids == {checkpoint.tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert (checkpoint.device.type, checkpoint.dtype) == ("cpu", torch.float32)
    assert checkpoint.spec.factor == checkpoint.limits.factor == 28
    assert checkpoint.feature_width == 64

    newest = loaded["qwen3_vl"]
    assert newest.stop_ids == {*newest.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])}
    assert newest.spec.factor == newest.limits.factor == 32


@pytest.mark.parametrize(
    ("own", "limits"),
    [
        ({"min_pixels": 3136, "max_pixels": 12845056}, (128 * 784, 768 * 784)),  # Qwen2-VL's own
        ({"size": {"shortest_edge": 3136, "longest_edge": 9408}}, (3136, 9408)),  # ours
        ({"size": {"shortest_edge": 3136, "longest_edge": 300 * 784}}, (128 * 784, 300 * 784)),
        ({"size": None}, (128 * 784, 768 * 784)),
    ],
    ids=["qwen2-vl", "tiny", "narrower", "none"],
)
def test_frames_keep_to_the_published_limits_within_those_of_the_checkpoint(folder, own, limits):
    (folder / "video_preprocessor_config.json").unlink()  # older checkpoints have one file for both
    edit_json(folder / "preprocessor_config.json", **{"size": None, **own})
    found = load(folder, attention="full", device="cpu").limits

    assert (found.min_pixels, found.max_pixels) == limits


def test_without_weights_a_checkpoint_still_says_all_of_itself(folder, loaded):
    (folder / "model.safetensors").unlink()
    outline, whole = load(folder, device="cpu", weights=False), loaded["qwen2_vl"]

    assert (outline.spec, outline.limits, outline.family) == (whole.spec, whole.limits, whole.family)
    assert (outline.dtype, outline.context_length, outline.feature_width) == (torch.float32, 4096, 64)
    prefixes = [checkpoint.prefix([0.0, 1.0, 2.0], (56, 84)) for checkpoint in (outline, whole)]
    assert torch.equal(prefixes[0].input_ids, prefixes[1].input_ids)
    shapes = [{name: weight.shape for name, weight in each.model.named_parameters()} for each in (outline, whole)]
    assert shapes[0] == shapes[1]
    assert all(weight.is_meta for weight in outline.model.parameters())
    assert load(folder, device="cpu", weights=False, dtype="bfloat16").dtype == torch.bfloat16


def test_the_newest_layout_keeps_the_video_processor_in_one_file_with_the_others(folder):
    video = json.loads((folder / "video_preprocessor_config.json").read_text())
    video["image_mean"] = [0.5, 0.5, 0.5]
    (folder / "processor_config.json").write_text(json.dumps({"video_processor": video}))

    assert load(folder, attention="full", device="cpu").spec.image_mean == (0.5, 0.5, 0.5)


def as_published_in_2024(folder):
    """A flat configuration, and the chat template beside the tokenizer."""
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    old_rope = {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    (folder / "config.json").write_text(json.dumps({**text, **config, **old_rope, "model_type": "qwen2_vl"}))
    template = folder / "chat_template.jinja"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text()}))
    template.unlink()


def with_the_names_of_the_modules(folder):
    """Tensors named as the model names them; published ones are named "model.layers..." and "visual..."."""
    modules = {"model.": "model.language_model.", "visual.": "model.visual.", "lm_head.": "lm_head."}
    weights = load_file(folder / "model.safetensors")
    renamed = {modules[key.split(".")[0] + "."] + key.split(".", 1)[1]: value for key, value in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("rewrite", [as_published_in_2024, with_the_names_of_the_modules])
def test_checkpoints_of_other_years_load_the_same(folder, loaded, rewrite):
    rewrite(folder)
    other, known = load(folder, attention="full", device="cpu"), loaded["qwen2_vl"]

    frames = random_frames(known, (4, 2, 2))
    assert torch.equal(inputs_for(other, frames)[1], inputs_for(known, frames)[1])
    assert torch.equal(logits_of(other, frames), logits_of(known, frames))


def test_a_checkpoint_without_an_output_layer_of_its_own_shares_the_embedding(folder):
    edit_json(folder / "config.json", tie_word_embeddings=True)  # as in Qwen2-VL-2B
    weights = load_file(folder / "model.safetensors")
    weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    model = load(folder, attention="full", device="cpu").model

    assert torch.equal(model.lm_head.weight, weights["model.embed_tokens.weight"])


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "auto"], ids=str)
def test_weights_are_loaded_in_the_type_asked_for(folders, loaded, dtype):
    checkpoint = load(folders["qwen3_vl"], attention="full", device="cpu", dtype=dtype)
    frames = random_frames(checkpoint, (2, 2, 2))
    logits = logits_of(checkpoint, frames)

    assert checkpoint.dtype == logits.dtype == {"bfloat16": torch.bfloat16, "auto": torch.float32}.get(dtype, dtype)
    expected = logits_of(loaded["qwen3_vl"], frames)
    assert (logits.float() - expected).norm() <= 0.1 * expected.norm()


def test_a_half_precision_checkpoint_is_float32_on_a_cpu_unless_asked_otherwise(tmp_path):
    folder = make_checkpoint(tmp_path, dtype=torch.bfloat16)

    assert load(folder, attention="full", device="cpu").dtype == torch.float32
    assert load(folder, attention="full", device="cpu", dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("device_map", ["auto", SPREAD], ids=["auto", "spread"])
def test_accelerate_spreads_the_model(folders, loaded, device_map):
    whole, checkpoint = loaded["qwen3_vl"], load(folders["qwen3_vl"], attention="full", device_map=device_map)
    frames = random_frames(whole, (4, 2, 2))

    expected, found = (logits_of(each, frames).cpu() for each in (whole, checkpoint))

    assert (found - expected).norm() <= 1e-4 * expected.norm()
    # A weight on disk has no device of its own until its layer runs.
    on_disk = {name for name, weight in checkpoint.model.named_parameters() if weight.device.type == "meta"}
    assert ("lm_head.weight" in on_disk) == (device_map is SPREAD)


def test_a_hub_id_is_found_in_the_local_cache(folders, tmp_path, monkeypatch):
    from huggingface_hub import constants

    repository = tmp_path / "models--somebody--Some-Model-2B"
    shutil.copytree(folders["qwen2_5_vl"], repository / "snapshots" / "abc123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    checkpoint = load("somebody/Some-Model-2B", attention="full", device="cpu")

    assert checkpoint.name == "somebody/Some-Model-2B"
    assert checkpoint.family.model_type == "qwen2_5_vl"
    with pytest.raises(ModelError, match=r"somebody/Other is no folder here.*HF_TOKEN"):
        load("somebody/Other")


@pytest.mark.parametrize("weights", [True, False])
def test_weights_are_fetched_only_where_they_are_wanted(folders, monkeypatch, weights):
    asked = []

    def download(name, *, allow_patterns):
        asked.append(allow_patterns)
        return folders["qwen2_vl"]

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    load("somebody/Some-Model", device="cpu", weights=weights)

    files = [path.name for path in folders["qwen2_vl"].iterdir()]
    fetched = {name for name in files if any(fnmatch(name, pattern) for pattern in asked[0])}
    assert {*files} - fetched == (set() if weights else {"model.safetensors"})
