"""Qwen3-VL from the file of a video to the answer, against transformers alone; and what is said of every family."""

import json
import shutil
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from checkpoints import FAMILIES, MODEL_CLASSES, make_checkpoint, processed
from clips import numbered_frames, write_video
from transformers import AutoProcessor

from rrattention import RRConfig
from rrvideo import VideoQA, families
from rrvideo.model import load
from rrvideo.video import _frame_size, read_frames

QUESTION = "What colour is the circle?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("qwen3_vl"), "qwen3_vl")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Five seconds whose second half has few frames, each another: no one frame rate tells their times."""
    pts = [*range(0, 2500, 40), *range(2500, 5000, 310)]
    frames = numbered_frames(len(pts), width=96, height=64)
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mkv", frames, pts=pts, time_base=Fraction(1, 1000))


def test_qwen3_answers_about_a_video_as_transformers_does(folder, clip):
    video = VideoQA.load(folder, attention="full", device="cpu").watch(clip, fps=2.4)
    answer = video.ask(QUESTION, max_new_tokens=12)

    frames = list(read_frames(video.plan))
    times = [frame.time for frame in frames]
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processed(processor, np.stack([frame.image for frame in frames]), times, QUESTION)
    model = MODEL_CLASSES["qwen3_vl"].from_pretrained(folder)
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs.input_ids.shape[1] :]

    assert len(frames) >= 8
    assert max(np.diff(times)) > 2 * min(np.diff(times))
    assert len({*expected.tolist()}) > 4  # not one word again and again
    assert answer.text == processor.tokenizer.decode(expected, skip_special_tokens=True).strip()


def test_qwen3_prefills_with_rrattention(folder, clip):
    config = RRConfig(block_size=16, stride=4, tau=0.3, min_tokens=0)
    answers = [VideoQA.load(folder, device="cpu", config=each).watch(clip).ask(QUESTION) for each in (config, None)]

    assert 0.1 < answers[0].density < 0.95
    assert answers[1].density == 1  # too short a video to be worth it
    assert answers[0].text != answers[1].text


@pytest.mark.parametrize("published", [True, False], ids=["published", "short"])
def test_frames_of_qwen3_are_as_large_as_its_processor_makes_them(folder, tmp_path, published):
    if published:
        folder = shutil.copytree(folder, tmp_path / "checkpoint")
        path = folder / "video_preprocessor_config.json"
        size = {"shortest_edge": 4096, "longest_edge": 25165824}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"size": size}))
    limits = load(folder, weights=False).limits
    processor = AutoProcessor.from_pretrained(folder).video_processor

    found, expected = [], []
    for count in (2, 4, 16, 64, 254):
        for height, width in ((720, 1280), (1920, 1080), (480, 640), (2160, 3840), (400, 3000)):
            rows, columns = _frame_size(SimpleNamespace(height=height, width=width), count, limits)
            found.append(count // 2 * rows // 16 * columns // 16)
            expected.append(processor.get_num_of_video_patches(count, height, width, {"cap_pixels_per_frame": True}))
    assert found == expected
    assert len(set(found)) > 10


def test_every_family_is_tested_under_its_own_name():
    assert [*families.FAMILIES] == FAMILIES
    for model_type, family in families.FAMILIES.items():
        assert MODEL_CLASSES[model_type].__name__ == family.class_name
        assert MODEL_CLASSES[model_type].config_class.model_type == model_type
