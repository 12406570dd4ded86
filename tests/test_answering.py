"""Answers about what was watched, to the last bit: whatever was asked before, and where attention was sparse."""

import pytest
import torch

from rrattention import RRConfig
from rrattention.transformers import exact
from rrvideo import budget, engine
from rrvideo.errors import Cancelled
from rrvideo.model import Checkpoint, load
from rrvideo.video import read_frames

QUESTION = "What colour is the circle?"
LONG = "Describe the video. " * 40
SPARSE = RRConfig(block_size=16, stride=4, tau=0.5, min_tokens=200)


@pytest.fixture(scope="module")
def sparse(folders):
    return load(folders["qwen2_vl"], device="cpu", config=SPARSE)


def watch(checkpoint, clip, **options):
    plan = budget.plan(checkpoint, clip, fps=2.0, max_frames=768, timestamps=True)
    return engine.watch(checkpoint, read_frames(plan), **options)


def test_an_answer_is_cancelled_within_a_token_and_the_video_answers_on(sparse, clip):
    watched, cancel = watch(sparse, clip), engine.Cancel()
    ids = sparse.question(watched.prefix, [QUESTION])
    expected = list(watched.generate(ids, max_new_tokens=8))
    tokens = []
    with pytest.raises(Cancelled):
        for token in watched.generate(ids, max_new_tokens=8, cancel=cancel):
            tokens.append(token)
            if len(tokens) == 3:
                cancel.cancel()

    assert tokens == expected[:3]
    assert list(watched.generate(ids, max_new_tokens=8, cancel=engine.Cancel())) == expected
    with pytest.raises(Cancelled):
        watched.score(ids, [[5]], cancel=cancel)


def test_logits_are_bitwise_the_same_in_any_order_also_when_the_cache_has_grown(sparse, clip, monkeypatch):
    rows, forward = [], Checkpoint.forward

    def remember(*arguments, **options):
        rows.append(forward(*arguments, **options))
        return rows[-1]

    monkeypatch.setattr(engine, "ROOM", 0)
    monkeypatch.setattr(Checkpoint, "forward", remember)
    watched = [watch(sparse, clip, cache=kind) for kind in ("device", "offload")]

    def logits(watched, text):
        rows.clear()
        ids = sparse.question(watched.prefix, [text])
        list(watched.generate(ids, max_new_tokens=4))
        watched.score(ids, [[7, 8, 9]])
        return torch.cat([row[0] for row in rows])

    capacity = watched[0].cache.layers[0].keys.stride(1)
    first = [logits(watched[0], text) for text in (QUESTION, "When?", LONG, QUESTION)]
    assert watched[0].cache.layers[0].keys.stride(1) > capacity
    second = [logits(watched[1], text) for text in (LONG, QUESTION, "When?", QUESTION)]
    assert torch.equal(first[0], first[3])
    assert not torch.equal(first[0], first[1])
    for one, other in ((0, 1), (0, 3), (1, 2), (2, 0)):
        assert torch.equal(first[one], second[other])


def test_a_long_question_attends_to_the_whole_video(folders, sparse, clip):
    full = load(folders["qwen2_vl"], device="cpu", attention="full", config=SPARSE)
    watched = watch(full, clip)
    ids = full.question(watched.prefix, [LONG])
    borrowed = engine.Watched(sparse, watched.prefix, 12, 1.0, {}, watched.cache)

    assert len(ids) > 4 * SPARSE.block_size
    assert borrowed.score(ids, [[5]]) == watched.score(ids, [[5]])


def test_scores_are_the_log_probabilities_of_what_comes_next(sparse, clip):
    watched = watch(sparse, clip)
    ids = sparse.question(watched.prefix, [QUESTION])
    replies = [[5], [9, 30, 12], [9], [7, 7]]
    before = [layer.keys.clone() for layer in watched.cache.layers]
    found = watched.score(ids, replies)

    for reply, score in zip(replies, found, strict=True):
        tokens = torch.cat([ids, torch.tensor(reply)])
        positions = watched.prefix.next_positions(len(tokens))[:, None]
        with exact():
            logits = sparse.forward(sparse.embed(tokens)[None], positions, watched.cache, last_only=False)
        watched.cache.roll_back(len(watched.prefix))
        expected = logits[0, len(ids) - 1 : -1].log_softmax(-1)[range(len(reply)), reply].sum()
        assert score == pytest.approx(float(expected), rel=1e-4)
    assert found[1] < found[2] < 0
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(watched.cache.layers, before, strict=True))
    assert watched.score(ids, []) == []
    with pytest.raises(ValueError, match="must not be empty"):
        watched.score(ids, [[1], []])


@pytest.mark.gpu
def test_a_video_whose_cache_is_offloaded_answers_as_any_other(folders, clip):
    checkpoint = load(folders["qwen2_vl"], device="cuda", attention="full")
    answers = []
    for kind, device in (("device", "cuda"), ("offload", "cpu")):
        watched = watch(checkpoint, clip, cache=kind)
        assert {layer.keys.device.type for layer in watched.cache.layers} == {device}
        answers.append([*watched.generate(checkpoint.question(watched.prefix, [QUESTION]), max_new_tokens=8)])
    assert answers[0] == answers[1]
