"""One set of weights under several settings of attention, and what an answer says of the model's attention."""

from dataclasses import asdict
from itertools import chain

import pytest

from rrattention.transformers import settings
from rrvideo import RRConfig, VideoQA
from rrvideo.evidence import intervals

QUESTION = "What colour is the circle?"
SPARSE = RRConfig(block_size=16, stride=4, tau=0.3, min_tokens=0)


@pytest.fixture(scope="module")
def clip(eight_seconds):
    return eight_seconds


def seen(qa, clip):
    """What tells one kind of attention from another."""
    with qa.watch(clip) as video:
        return video.density, video.score(QUESTION, ["red", "It is blue."])


def test_each_kind_of_attention_over_the_same_weights_sees_what_a_model_loaded_with_it_sees(folder, clip):
    qa = VideoQA.load(folder, device="cpu", config=SPARSE)
    full, denser = qa.attending("full"), qa.attending("rr", RRConfig(**{**asdict(SPARSE), "tau": 0.9}))
    tensors = [[*chain(each.checkpoint.model.parameters(), each.checkpoint.model.buffers())] for each in (qa, full)]

    assert all(one is other for one, other in zip(*tensors, strict=True))
    assert seen(full, clip) == seen(VideoQA.load(folder, device="cpu", attention="full"), clip)
    assert seen(qa, clip) == seen(VideoQA.load(folder, device="cpu", config=SPARSE), clip)
    assert seen(qa, clip)[0] < seen(denser, clip)[0] < seen(full, clip)[0] == 1
    assert settings(qa.checkpoint.model) == (SPARSE, "rr")  # as it was


def test_an_answer_says_how_much_attention_each_step_got(folder, clip):
    with VideoQA.load(folder, device="cpu").watch(clip) as video:
        answer = video.ask(QUESTION, max_new_tokens=7)
        assert (video.density, video.seconds) == (answer.density, {**video.seconds})
        assert video.seconds == {name: answer.timings.to_dict()[name] for name in ("decode", "encode", "prefill")}
    times, weights = zip(*answer.attention, strict=True)

    assert times == video.plan.times[::2]
    assert sum(weights) == pytest.approx(1)
    assert intervals(weights, times, video.plan.end) == answer.evidence
    assert "attention" not in answer.to_dict()
