"""Watching and answering, against the plain models of transformers."""

import copy
import json
import math
import shutil
import threading
import time
from dataclasses import replace
from threading import enumerate as threads

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, MODEL_CLASSES, processed
from transformers import AutoProcessor

from rrattention import RRConfig
from rrvideo import budget, engine
from rrvideo.errors import BudgetError, ModelError, VideoError
from rrvideo.model import load
from rrvideo.tokens import patchify
from rrvideo.video import Frame, FrameStream, read_frames

QUESTION = "What colour is the circle?"
OTHERS = ["How many scenes are there?", "Describe the video. " * 8]
SAMPLING = {"fps": 2.0, "max_frames": 768, "timestamps": True}
in_each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def loaded(folders):
    return {family: load(folder, attention="full", device="cpu") for family, folder in folders.items()}


@pytest.fixture(scope="module")
def watched(loaded, clip):
    return watch(loaded["qwen2_vl"], clip)


def watch(checkpoint, path, **changes):
    options = SAMPLING | changes
    stream = read_frames(budget.plan(checkpoint, path, **options))
    return engine.watch(checkpoint, stream, timestamps=options["timestamps"])


def answer(watched, *turns, tokens=12):
    return list(watched.generate(watched.checkpoint.question(watched.prefix, turns), max_new_tokens=tokens))


def keys_and_values(watched):
    return [tensor.clone() for layer in watched.cache.layers for tensor in (layer.keys, layer.values)]


@in_each_family
def test_answers_are_those_of_generate_in_transformers(folders, loaded, clip, family):
    checkpoint = loaded[family]
    found = answer(watch(checkpoint, clip), QUESTION)

    frames = list(read_frames(budget.plan(checkpoint, clip, **SAMPLING)))
    pixels, times = np.stack([frame.image for frame in frames]), [frame.time for frame in frames]
    inputs = processed(AutoProcessor.from_pretrained(folders[family]), pixels, times, QUESTION)
    expected = (
        MODEL_CLASSES[family]
        .from_pretrained(folders[family])
        .generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs.input_ids.shape[1] :]
    )

    assert len(frames) == 12
    assert len(set(found)) > 4  # not one word again and again
    assert found == [token for token in expected.tolist() if token not in checkpoint.stop_ids]


@in_each_family
def test_features_do_not_depend_on_how_the_prompt_parts_the_video(folders, loaded, family):
    checkpoint = loaded[family]
    height, width = 3 * checkpoint.spec.factor, 5 * checkpoint.spec.factor
    images = np.random.default_rng(0).integers(0, 256, (6, height, width, 3), dtype=np.uint8)
    found = engine._encode(checkpoint, [Frame(i, i / 2, image) for i, image in enumerate(images)])

    plain = MODEL_CLASSES[family].from_pretrained(folders[family])
    rows = torch.tensor([checkpoint.spec.grid(2, height, width)] * 3)
    with torch.no_grad():
        output = plain.model.visual(patchify(images, checkpoint.spec), grid_thw=rows)
    expected = torch.cat([output.pooler_output, *getattr(output, "deepstack_features", [])], dim=-1)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_an_answer_does_not_depend_on_what_was_asked_before(loaded, clip, watched):
    first = answer(watched, QUESTION)
    others = [answer(watched, other) for other in OTHERS]
    conversation = answer(watched, QUESTION, "It is red.", *OTHERS[:1])

    assert answer(watched, QUESTION) == first
    afresh = watch(loaded["qwen2_vl"], clip)
    assert answer(afresh, QUESTION, "It is red.", *OTHERS[:1]) == conversation
    assert [answer(afresh, other) for other in reversed(OTHERS)] == others[::-1]
    assert answer(afresh, QUESTION) == first
    assert first not in others


def test_the_cache_is_rolled_back_bit_by_bit(watched):
    before = keys_and_values(watched)
    answer(watched, QUESTION)

    assert all(torch.equal(old, new) for old, new in zip(before, keys_and_values(watched), strict=True))


def test_an_answer_that_is_abandoned_leaves_no_trace(watched):
    before, expected = keys_and_values(watched), answer(watched, QUESTION)
    abandoned = watched.generate(watched.checkpoint.question(watched.prefix, OTHERS[:1]), max_new_tokens=9)
    next(abandoned)
    abandoned.close()

    assert all(torch.equal(old, new) for old, new in zip(before, keys_and_values(watched), strict=True))
    assert answer(watched, QUESTION) == expected


def test_a_pass_that_is_interrupted_between_two_layers_leaves_no_trace(watched, monkeypatch):
    before, expected = keys_and_values(watched), answer(watched, QUESTION)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(watched.checkpoint.model.model.language_model.layers[1], "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            answer(watched, QUESTION)

    assert all(torch.equal(old, new) for old, new in zip(before, keys_and_values(watched), strict=True))
    assert answer(watched, QUESTION) == expected


def test_two_answers_at_once_are_refused_and_do_no_harm(watched):
    expected = answer(watched, QUESTION)
    unfinished = watched.generate(watched.checkpoint.question(watched.prefix, [QUESTION]), max_new_tokens=12)
    begun = [next(unfinished)]

    with pytest.raises(RuntimeError, match="another answer about this video is unfinished"):
        answer(watched, OTHERS[0])
    assert begun + list(unfinished) == expected
    assert answer(watched, QUESTION) == expected


def test_an_answer_ends_where_the_model_ends_it_or_at_the_limit(watched, monkeypatch):
    whole = answer(watched, QUESTION, tokens=12)

    assert answer(watched, QUESTION, tokens=5) == whole[:5]
    monkeypatch.setattr(watched.checkpoint.model.generation_config, "eos_token_id", [whole[3], 1])
    assert answer(watched, QUESTION) == whole[: whole.index(whole[3])]


def test_frames_pass_a_few_at_a_time_in_whole_steps(loaded, clip, monkeypatch):
    checkpoint, sizes = loaded["qwen2_vl"], []
    encode = engine._encode
    monkeypatch.setattr(engine, "_encode", lambda model, frames: sizes.append(len(frames)) or encode(model, frames))
    expected = answer(watch(checkpoint, clip, fps=2.5), QUESTION)
    assert sizes == [14]

    plan = budget.plan(checkpoint, clip, **SAMPLING)
    for pixels, parts in ((5 * plan.height * plan.width, [4, 4, 4, 2]), (10, [2] * 7)):
        sizes.clear()
        monkeypatch.setattr(budget, "CHUNK_PIXELS", pixels)
        assert answer(watch(checkpoint, clip, fps=2.5), QUESTION) == expected
        assert sizes == parts


def test_the_prompt_tells_the_times_of_the_frames_that_really_came(loaded, clip, watched):
    checkpoint = loaded["qwen2_vl"]
    stream = read_frames(budget.plan(checkpoint, clip, **SAMPLING))
    frames = [frame for frame in stream if frame.time < 2 or frame.time > 5]
    lossy = FakeStream(stream.plan, frames)
    found = engine.watch(checkpoint, lossy, timestamps=True)

    assert found.frames == len(frames) < 12
    assert found.prefix.times == tuple(frame.time for frame in frames[::2])
    assert answer(found, QUESTION) != answer(watched, QUESTION)


class FakeStream:
    """Some frames of a plan, as a stream."""

    def __init__(self, plan, frames):
        self.plan = plan
        self.frames = frames

    def __iter__(self):
        return iter(self.frames)


def test_a_video_without_a_single_frame_is_an_error_and_not_an_answer(loaded, clip):
    stream = read_frames(budget.plan(loaded["qwen2_vl"], clip, **SAMPLING))
    stream.plan.index.stamps[:] = -1  # of packets that are nowhere to be found

    with pytest.raises(VideoError, match="none of 12 frames"):
        engine.watch(loaded["qwen2_vl"], stream)


def test_density_is_that_of_the_prefill(folders, clip, watched):
    config = RRConfig(block_size=16, stride=4, tau=0.3, min_tokens=0)
    sparse = watch(load(folders["qwen2_vl"], device="cpu", config=config), clip)

    assert watched.density == 1
    assert 0.1 < sparse.density < 0.95


def test_progress_counts_frames_and_tokens(folders, clip, monkeypatch):
    monkeypatch.setattr(budget, "CHUNK_FRAMES", 8)
    monkeypatch.setattr(engine, "chunk_tokens", lambda device: 320)
    config = RRConfig(block_size=64)
    checkpoint, calls = load(folders["qwen2_vl"], attention="full", device="cpu", config=config), []
    stream = read_frames(budget.plan(checkpoint, clip, **SAMPLING))
    found = engine.watch(checkpoint, stream, timestamps=True, progress=lambda *call: calls.append(call))
    tokens = len(found.prefix)

    assert [call[:3] for call in calls if call[0] == "decoded"] == [("decoded", done, 12) for done in range(1, 13)]
    assert [call[:3] for call in calls if call[0] == "frames"] == [("frames", 8, 12), ("frames", 12, 12)]
    counts = [call[1] for call in calls if call[0] == "tokens"]
    assert counts == [*range(320, tokens - 64, 320), tokens]
    assert all(call[2] == tokens for call in calls if call[0] == "tokens")
    assert {*found.seconds} == {"decode", "encode", "prefill"}
    for unit, stage in (("decoded", "decode"), ("frames", "encode"), ("tokens", "prefill")):
        seconds = [0.0, *(call[3] for call in calls if call[0] == unit), found.seconds[stage]]
        assert seconds == sorted(seconds)
        assert 0 < seconds[1] <= seconds[-1]


def test_progress_is_told_as_it_is_made_by_one_thread_at_a_time(loaded, clip, monkeypatch):
    monkeypatch.setattr(budget, "CHUNK_FRAMES", 2)
    monkeypatch.setattr(engine, "chunk_tokens", lambda device: 64)
    encoding, told, at_once, most = threading.Event(), [], [], []
    encode = engine._encode

    def progress(unit, *_):
        at_once.append(unit)
        most.append(len(at_once))
        time.sleep(0.005)
        told.append((unit, encoding.is_set()))
        at_once.remove(unit)

    def first_waits(*arguments):
        time.sleep(0.3 * (not encoding.is_set()))  # time for the reader to go ahead
        encoding.set()
        return encode(*arguments)

    monkeypatch.setattr(engine, "_encode", first_waits)
    engine.watch(loaded["qwen2_vl"], read_frames(budget.plan(loaded["qwen2_vl"], clip, **SAMPLING)), progress=progress)

    assert {*most} == {1}
    assert told.count(("decoded", False)) >= 3  # before anything is encoded


@pytest.mark.parametrize("act", ["generate", "score"])
def test_what_is_no_number_is_no_answer(loaded, clip, act):
    checkpoint = loaded["qwen2_vl"]
    broken = replace(checkpoint, model=copy.deepcopy(checkpoint.model))
    broken.model.lm_head.weight = torch.nn.Parameter(torch.full_like(checkpoint.model.lm_head.weight, math.nan))
    watched, ids = watch(broken, clip), torch.tensor([5, 6])
    with pytest.raises(ModelError, match=r"gives no numbers in float32 .load it with another dtype"):
        list(watched.generate(ids, max_new_tokens=3) if act == "generate" else watched.score(ids, [[7]]))


def test_a_reader_that_comes_back_after_the_watch_tells_nothing(loaded, clip, monkeypatch):
    monkeypatch.setattr(engine, "PATIENCE", 0.1)
    plan, gate, told, before = budget.plan(loaded["qwen2_vl"], clip, **SAMPLING), threading.Event(), [], [*threads()]

    class Hanging(FrameStream):
        def __iter__(self):
            for frame in super().__iter__():
                yield frame
                gate.wait(20)

    with pytest.raises(VideoError, match="has given no frame"):
        engine.watch(loaded["qwen2_vl"], Hanging(plan, "pyav"), progress=lambda *call: told.append(call))
    (reader,) = {*threads()} - {*before}
    gate.set()
    reader.join(20)
    assert not reader.is_alive()
    assert [call[:2] for call in told] == [("decoded", 1)]


@pytest.fixture(scope="module")
def narrow(folders, tmp_path_factory):
    """A model with a short context."""
    folder = shutil.copytree(folders["qwen2_vl"], tmp_path_factory.mktemp("narrow") / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = budget.ROOM + 120
    (folder / "config.json").write_text(json.dumps(config))
    return load(folder, attention="full", device="cpu")


def test_a_context_is_long_in_positions_and_not_in_tokens(narrow, clip):
    found = watch(narrow, clip, fps=24.0, timestamps=False)  # 72 steps in a row: 72 positions and the text's

    assert len(found.prefix) > narrow.context_length
    assert len(answer(found, QUESTION)) == 12


def test_a_question_too_long_for_what_is_left_is_refused(narrow, clip):
    found = watch(narrow, clip, max_frames=4)
    left = narrow.context_length - int(found.prefix.positions.max()) - 1
    asked = len(narrow.question(found.prefix, [QUESTION]))

    with pytest.raises(BudgetError, match=f"{left} are left"):
        answer(found, QUESTION, tokens=left - asked + 1)
    assert answer(found, QUESTION, tokens=left - asked)


def test_a_closed_video_answers_no_more(loaded, clip):
    found = watch(loaded["qwen2_vl"], clip, max_frames=4)
    found.close()

    with pytest.raises(RuntimeError, match="closed"):
        answer(found, QUESTION)
