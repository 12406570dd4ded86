"""What is wrong with a checkpoint is told in one line, and never answered over."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rrvideo.errors import ModelError
from rrvideo.model import load

VIDEO_PROCESSOR = "video_preprocessor_config.json"


@pytest.fixture
def folder(folders, tmp_path) -> Path:
    """A copy of a good checkpoint, to be damaged."""
    return shutil.copytree(folders["qwen2_vl"], tmp_path / "checkpoint")


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def truncate(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def change_weights(change):
    def damage(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


WIDE = {"visual.patch_embed.proj.weight": torch.zeros(8, 3, 2, 14, 14)}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("config.json"), "no config.json"),
        (truncate("config.json"), "config.json of .* is damaged"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json of .* does not hold a JSON object"),
        (lambda f: edit_json(f / "config.json", model_type="llama"), "of type llama.*qwen2_5_vl, qwen2_vl"),
        (
            lambda f: edit_json(f / "config.json", text_config={"hidden_size": "wide"}),
            "configuration of .*hidden_size",
        ),
        (remove("preprocessor_config.json", VIDEO_PROCESSOR), "lacks preprocessor_config.json"),
        (lambda f: edit_json(f / VIDEO_PROCESSOR, size={"longest_edge": 1}), "processor .* max_pixels must hold"),
        (remove("tokenizer.json"), "no tokenizer"),
        (truncate("tokenizer.json"), "tokenizer of .* cannot be loaded"),
        (remove("chat_template.jinja"), "no chat template"),
        (lambda f: edit_json(f / "config.json", video_token_id=5), "tokenizer of .* does not belong"),
        (remove("model.safetensors"), "weights of .* cannot be loaded"),
        (truncate("model.safetensors"), "weights of .* cannot be loaded"),
        (change_weights(lambda w: w.pop("lm_head.weight")), "lacks weights: lm_head.weight "),
        (change_weights(lambda w: [w.pop(k) for k in list(w) if "layers.1." in k]), "lacks weights: .* and 11 more"),
        (change_weights(lambda w: w.update(WIDE)), "another shape than its config says: model.visual.patch_embed"),
    ],
    ids=[
        "no-config",
        "broken-json",
        "no-json-object",
        "other-family",
        "senseless-config",
        "no-processor",
        "senseless-processor",
        "no-tokenizer",
        "broken-tokenizer",
        "no-template",
        "other-tokenizer",
        "no-weights",
        "truncated-weights",
        "missing-tensor",
        "missing-layer",
        "other-shape",
    ],
)
def test_a_checkpoint_that_is_not_whole_is_told_in_one_line(folder, damage, message, monkeypatch):
    damage(folder)
    reports = []
    reporter = logging.Handler()
    reporter.emit = reports.append
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [reporter])

    with pytest.raises(ModelError, match=message) as told:
        load(folder, device="cpu")
    assert "\n" not in str(told.value)
    assert not reports


@pytest.mark.parametrize(
    ("name", "message"),
    [("no/such/folder", "no model folder"), ("./here", "no model folder"), ("tinny", "no model folder tinny")],
)
def test_a_folder_that_is_not_there_is_told_without_asking_the_hub(name, message):
    with pytest.raises(ModelError, match=message):
        load(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:99"}, "device cuda:99 cannot be used"),
        ({"device": "toaster"}, "device toaster cannot be used"),
        ({"device": "cpu", "dtype": "float31"}, "float31 is no type for weights"),
        ({"device": "cpu", "dtype": "int8"}, "int8 is no type for weights"),
    ],
    ids=str,
)
def test_a_device_or_type_that_is_not_there_is_told_in_one_line(folders, options, message):
    with pytest.raises(ModelError, match=message) as told:
        load(folders["qwen2_vl"], **options)
    assert "\n" not in str(told.value)
