"""Where the model looked, against the attention that transformers itself reports."""

import json
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, MODEL_CLASSES, make_checkpoint
from clips import numbered_frames, write_video
from conftest import HAS_GPU

from rrattention import transformers
from rrattention.transformers import observe
from rrvideo import budget, engine, evidence
from rrvideo.evidence import Evidence, Gaze, intervals
from rrvideo.model import load
from rrvideo.tokens import Prefix, patchify
from rrvideo.video import read_frames

QUESTION = ["What colour is the circle?"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", numbered_frames(120, width=84, height=56))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def looking_device(request, monkeypatch):
    """Where the kernel looks: it is interpreted, or runs on a GPU."""
    pytest.importorskip("triton")
    if request.param == "cpu" and HAS_GPU:
        pytest.skip("kernels run on the GPU here")
    monkeypatch.setattr(evidence, "_has_kernel", lambda *_: True)
    return request.param


@pytest.mark.parametrize("timestamps", [False, True], ids=["one-segment", "timestamps"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_follow_the_attention_that_transformers_reports(tmp_path, clip, family, timestamps):
    assert_as_transformers_reports(tmp_path, clip, family, "cpu", timestamps=timestamps)


@pytest.mark.parametrize("family", FAMILIES)
def test_so_do_the_weights_of_a_gaze_that_only_looks(tmp_path, clip, family, looking_device, monkeypatch):
    monkeypatch.setattr(evidence, "TOGETHER", 4)
    assert_as_transformers_reports(tmp_path, clip, family, looking_device, timestamps=True)


def assert_as_transformers_reports(tmp_path, clip, family, device, *, timestamps):
    folder = make_checkpoint(tmp_path, family)
    checkpoint = load(folder, attention="full", device=device, dtype="float32")
    stream = read_frames(budget.plan(checkpoint, clip, fps=2.0, max_frames=768, timestamps=timestamps))
    watched = engine.watch(checkpoint, stream, timestamps=timestamps)
    prefix, asked = watched.prefix, checkpoint.question(watched.prefix, QUESTION)
    gaze = Gaze(prefix, asked=len(asked), layers=watched.layers)
    answer = list(watched.generate(asked, max_new_tokens=6, observer=gaze))
    list(watched.generate(checkpoint.question(prefix, ["And then?"]), max_new_tokens=6))  # overwrites the keys

    # The whole conversation at once, in the plainest attention that transformers has.
    plain = MODEL_CLASSES[family].from_pretrained(folder, attn_implementation="eager")
    ids = torch.cat([prefix.input_ids, asked, torch.tensor(answer)])
    pixels = np.stack([frame.image for frame in stream])
    with torch.no_grad():
        attentions = plain(
            input_ids=ids[None],
            position_ids=torch.cat([prefix.positions, prefix.next_positions(len(ids) - len(prefix))], dim=1)[:, None],
            pixel_values_videos=patchify(pixels, checkpoint.spec),
            video_grid_thw=prefix.grid_thw,
            mm_token_type_ids=2 * torch.cat([prefix.visual, torch.zeros(len(ids) - len(prefix))])[None].int(),
            output_attentions=True,
        ).attentions
    expected = np.zeros(len(prefix.times))
    asked_rows = range(len(prefix), len(prefix) + len(asked))
    answer_rows = range(asked_rows.stop, len(ids) - 1)  # nothing is read after the last token
    for layer in attentions[: (len(attentions) + 1) // 2]:
        for head in layer[0].double().numpy():
            mass = np.array(
                [
                    [head[row, : len(prefix)][prefix.step == step].sum() for step in range(len(prefix.times))]
                    for row in (*asked_rows, *answer_rows)
                ]
            )
            expected += np.maximum(mass.max(axis=0) - mass[: len(asked)].mean(axis=0), 0)
    expected = np.maximum(expected - sorted(expected)[(len(expected) - 1) // 2], 0)

    assert len(answer) == 6
    assert len(prefix.times) == 5
    atol = 1e-4 if device == "cpu" else 2e-2  # GPUs multiply in TF32
    np.testing.assert_allclose(gaze.weights(), expected / expected.sum(), atol=atol)


def prefix_of(steps, tokens_each):
    """As much of a prefix as a gaze wants to know, with a word of text before, between and after the steps."""
    step = torch.tensor([-1] + [at for index in range(steps) for at in [index] * tokens_each + [-1]])
    unused = torch.zeros(0)
    return Prefix("", torch.zeros(len(step)), step, unused, unused, tuple(float(index) for index in range(steps)))


def look(prefix, *, towards, strength, queries=2):
    """Keys of which those of step `towards` are like the last query, as after a prefill and `queries` tokens."""
    key = torch.zeros(1, 2, len(prefix.step) + queries, 8)
    key[:, :, : len(prefix.step)][:, :, prefix.step == towards] = strength
    query = torch.zeros(1, 4, queries, 8)
    query[:, :, -1] = 1
    return query, key, key


def gaze_at(prefix, *, asked=2, layers=1):
    return Gaze(prefix, asked=asked, layers=layers)


def test_the_step_that_one_word_looks_at_gets_the_weight():
    prefix = prefix_of(steps=7, tokens_each=3)
    gaze = gaze_at(prefix)
    gaze(0, *look(prefix, towards=4, strength=1.0), 1.0)

    *_, fourth, fifth, sixth, _ = gaze.weights()
    assert fifth > 5 * fourth and fifth > 5 * sixth


def test_what_every_word_looks_at_does_not_stand_out():
    prefix = prefix_of(steps=5, tokens_each=3)
    gaze = gaze_at(prefix, layers=3)
    query, key, value = look(prefix, towards=2, strength=4.0)
    gaze(0, torch.ones_like(query), key, value, 1.0)
    gaze(1, *look(prefix, towards=0, strength=1.0), 1.0)

    first, _, third, *_ = gaze.weights()
    assert first > 5 * third


def test_the_words_of_the_answer_count():
    prefix = prefix_of(steps=4, tokens_each=2)
    query, key, value = look(prefix, towards=3, strength=1.0)
    gaze = gaze_at(prefix)
    gaze(0, torch.zeros_like(query), key, value, 1.0)
    gaze(0, query[:, :, -1:], key, value, 1.0)

    assert gaze.weights() == pytest.approx([0, 0, 0, 1], abs=0.02)


def test_what_was_said_before_the_question_does_not_count():
    prefix = prefix_of(steps=4, tokens_each=2)
    query, key, value = look(prefix, towards=1, strength=1.0, queries=6)
    gaze = gaze_at(prefix, asked=3)
    gaze(0, query.flip(2), key, value, 1.0)  # the first of six tokens looks there

    assert gaze.weights() == [0.25] * 4


def steps_at(*starts, tokens_each, length):
    """A prefix whose steps begin at these tokens."""
    step = torch.full((length,), -1)
    for number, start in enumerate(starts):
        step[start : start + tokens_each] = number
    unused = torch.zeros(0)
    return Prefix("", torch.zeros(length), step, unused, unused, tuple(map(float, range(len(starts)))))


def attention(query, key, value, scaling):
    """What each query gives to each key, `[H, Lq, Lk]`, and what comes of it, `[1, H, Lq, D]`; in float64."""
    group = query.shape[1] // key.shape[1]
    hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device)
    keys, values = (each[0].double().repeat_interleave(group, dim=0) for each in (key, value))
    scores = scaling * query[0].double() @ keys.mT
    shares = scores.masked_fill(hidden.triu(key.shape[2] - query.shape[2] + 1), -torch.inf).softmax(-1)
    return shares, (shares @ values)[None]


LAYOUTS = {
    "no-text-between": steps_at(3, 5, 7, 9, tokens_each=2, length=12),
    "equal-distances": steps_at(1, 6, 11, 16, tokens_each=3, length=20),
    "longer-times-later": steps_at(1, 6, 11, 17, 23, 30, tokens_each=3, length=34),
    "one-step": steps_at(2, tokens_each=4, length=6),
}


def assert_equals_float64(prefix, device, *, looks, room=64):
    """A gaze weighs as sums over attention do; unless it only looks, it attends like that attention, too."""
    torch.manual_seed(0)
    seen, steps, layers = len(prefix.step), len(prefix.times), 2
    cache = [[torch.randn(1, 2, seen + room, 8, device=device) for _ in "kv"] for _ in range(layers)]
    gaze, masses = gaze_at(prefix, asked=37, layers=2 * layers), [[] for _ in range(layers)]
    passes = ((40, seen + 40), (1, seen + 41), (1, seen + 42), (1, seen + 43))  # 3 words were before
    with gaze:
        for rows, length in passes:
            for layer in range(layers):
                query = 2 * torch.randn(1, 4, rows, 8, device=device)
                call = (query, *(each[:, :, :length] for each in cache[layer]), 0.5)
                shares, expected = (each.cpu() for each in attention(*call))
                attended = gaze(layer, *call)
                if looks:
                    assert attended is None
                else:
                    torch.testing.assert_close(attended, expected.float(), atol=2e-6, rtol=1e-5)
                shares = shares[:, 3 if rows > 1 else 0 :, :seen]
                sums = [shares[..., prefix.step == step].sum(-1) for step in range(steps)]
                masses[layer].append(torch.stack(sums, dim=-1))

    expected = sum((torch.cat(mass, dim=1).amax(1) - mass[0].mean(1)).sum(0) for mass in masses)
    expected = (expected - expected.median()).clamp(min=0)
    expected = expected / expected.sum() if steps > 1 else torch.ones(1)
    assert gaze.weights() == pytest.approx(expected.tolist(), abs=1e-5 if device == "cpu" else 1e-2)


@pytest.mark.parametrize("at_once", [2**24, 400, 1], ids=["at-once", "in-parts", "row-by-row"])
@pytest.mark.parametrize("prefix", LAYOUTS.values(), ids=LAYOUTS)
def test_a_gaze_equals_sums_over_attention_in_float64_and_attends_like_it(prefix, at_once, monkeypatch):
    monkeypatch.setattr(evidence, "SCORES", at_once)
    assert_equals_float64(prefix, "cpu", looks=False)


@pytest.mark.parametrize("together", [16, 3, 1], ids=["all-later", "three-later", "one-by-one"])
@pytest.mark.parametrize("prefix", LAYOUTS.values(), ids=LAYOUTS)
def test_a_gaze_that_only_looks_equals_sums_over_attention_in_float64(prefix, together, looking_device, monkeypatch):
    monkeypatch.setattr(evidence, "TOGETHER", together)
    assert_equals_float64(prefix, looking_device, looks=True)


def test_a_long_question_is_looked_at_some_words_at_a_time(looking_device, monkeypatch):
    monkeypatch.setattr(evidence, "SCORES", 600)
    assert_equals_float64(LAYOUTS["longer-times-later"], looking_device, looks=True)


def test_a_cache_may_be_just_full_at_the_last_word(looking_device):
    assert_equals_float64(LAYOUTS["equal-distances"], looking_device, looks=True, room=43)


def test_a_cpu_needs_no_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "rrattention.triton.segments", None)  # importing it is an error
    assert_equals_float64(LAYOUTS["one-step"], "cpu", looks=False)


def test_keys_that_were_brought_over_for_one_pass_are_not_held_after_it(looking_device):
    prefix = prefix_of(steps=4, tokens_each=2)
    query, key, value = (each.to(looking_device) for each in look(prefix, towards=3, strength=1.0))
    with gaze_at(prefix) as gaze:
        gaze(0, torch.zeros_like(query), key, value, 1.0)
        gaze(0, query[:, :, -1:], key, value, 1.0)
        key.zero_()

    assert gaze.weights() == pytest.approx([0, 0, 0, 1], abs=0.02)


def test_the_model_attends_by_the_gaze_where_it_looks_and_writes_the_same(tmp_path, clip, monkeypatch):
    checkpoint = load(make_checkpoint(tmp_path), attention="rr", device="cpu")
    stream = read_frames(budget.plan(checkpoint, clip, fps=1.0, max_frames=8, timestamps=True))
    watched = engine.watch(checkpoint, stream, timestamps=True)
    ids, dense, by_itself = checkpoint.question(watched.prefix, QUESTION), transformers.dense_attention, []
    monkeypatch.setattr(
        transformers, "dense_attention", lambda *call, **kwargs: by_itself.append(call) or dense(*call, **kwargs)
    )
    unseen = list(watched.generate(ids, max_new_tokens=5))
    assert len(by_itself) == 2 * 5  # layers and passes
    gaze = Gaze(watched.prefix, asked=len(ids), layers=watched.layers)
    seen = list(watched.generate(ids, max_new_tokens=5, observer=gaze))

    assert seen == unseen
    assert len(by_itself) == 2 * 5 + 5


def test_the_later_half_of_the_layers_does_not_count():
    prefix = prefix_of(steps=4, tokens_each=2)
    gaze = gaze_at(prefix, layers=3)
    for layer, towards in ((1, 0), (2, 3)):
        gaze(layer, *look(prefix, towards=towards, strength=1.0), 1.0)

    first, *_, last = gaze.weights()
    assert first > 5 * last


def test_what_gets_no_more_than_the_rest_shows_nothing():
    prefix = prefix_of(steps=4, tokens_each=2)
    gaze = gaze_at(prefix)
    assert gaze.weights() == [0.25] * 4

    gaze(0, *look(prefix, towards=0, strength=0.0), 1.0)
    assert gaze.weights() == [0.25] * 4


def test_nobody_else_is_observed_between_two_tokens(tmp_path, clip):
    checkpoint = load(make_checkpoint(tmp_path), attention="full", device="cpu")
    stream = read_frames(budget.plan(checkpoint, clip, fps=1.0, max_frames=8, timestamps=True))
    one, other = engine.watch(checkpoint, stream, timestamps=True), engine.watch(checkpoint, stream, timestamps=True)
    calls, foreign = [], []
    first = one.generate(
        checkpoint.question(one.prefix, QUESTION), max_new_tokens=4, observer=nullcontext(lambda *c: calls.append(c))
    )
    next(first)
    seen = len(calls)
    with observe(lambda *call: foreign.append(call)):
        next(other.generate(checkpoint.question(other.prefix, QUESTION), max_new_tokens=4))

    assert seen == len(foreign) == 2  # layers
    assert len(calls) == seen


def seconds(evidence):
    return [(moment.start, moment.end) for moment in evidence]


def test_an_interval_runs_from_its_first_step_to_the_begin_of_the_next():
    found = intervals([0.1, 0.3, 0.4, 0.1, 0.1], [0.0, 2.0, 4.5, 6.0, 8.0], 10.0)

    assert found == [Evidence(2.0, 6.0, pytest.approx(0.7))]


def test_intervals_come_by_weight_and_no_more_than_three():
    weights = [0.1, 0.0, 0.14, 0.14, 0.0, 0.2, 0.0, 0.24, 0.0, 0.12, 0.06]
    found = intervals(weights, [2.0 * step for step in range(11)], 22.0)

    assert seconds(found) == [(4.0, 8.0), (14.0, 16.0), (10.0, 12.0)]
    assert [moment.weight for moment in found] == pytest.approx([0.28, 0.24, 0.2])


def test_the_last_interval_ends_with_the_clip():
    assert seconds(intervals([0.1, 0.1, 0.8], [10.0, 12.0, 14.0], 15.5)) == [(14.0, 15.5)]
    assert seconds(intervals([1.0], [3.0], 7.0)) == [(3.0, 7.0)]


def test_nothing_is_claimed_of_the_lost_end_of_a_file():
    assert seconds(intervals([0.1, 0.1, 0.8], [0.0, 2.0, 4.0], 60.0)) == [(4.0, 6.0)]


def test_a_gaze_that_rests_nowhere_means_the_whole_clip():
    assert intervals([0.25] * 4, [0.0, 1.0, 2.0, 3.0], 4.0) == [Evidence(0.0, 4.0, 1.0)]


def test_evidence_goes_into_json():
    assert json.loads(json.dumps(Evidence(1.5, 3.0, 0.5).to_dict())) == {"start": 1.5, "end": 3.0, "weight": 0.5}
