"""What is told of RRAttention inside Hugging Face decoders: densities to who records, calls to observers."""

import copy
import threading

import pytest
import torch
from decoders import EXACT, SPARSE, close, make_ids, make_model

from rrattention.dense import dense_attention
from rrattention.transformers import enable, observe, record


@pytest.fixture(scope="module")
def llama():
    return make_model()


def test_record_counts_prefill_by_layer(llama):
    model, ids = copy.deepcopy(llama), make_ids(150)
    enable(model, SPARSE)
    with record() as outer:
        with record() as first:
            model.generate(ids, max_new_tokens=4, do_sample=False)
        with record() as second:
            model(make_ids(120, seed=3))
    model(ids)  # outside: nobody listens
    assert list(first.layers) == [0, 1]
    assert all(0.2 < density < 0.9 for density in first.layers.values())
    assert first.density() == pytest.approx(sum(first.layers.values()) / 2)
    assert first.density(mandatory=False) < first.density()
    visible = sum(range(1, 11)), sum(range(1, 9))  # blocks of 150 and 120 tokens
    share = (first.density() * visible[0] + second.density() * visible[1]) / sum(visible)
    assert outer.density() == pytest.approx(share)


def test_full_attention_is_recorded_with_density_one(llama):
    model = copy.deepcopy(llama)
    enable(model, SPARSE, "full")
    with record() as prefill:
        close(model(make_ids(150)).logits, llama(make_ids(150)).logits)
    assert prefill.layers == {0: 1.0, 1: 1.0}


def test_padding_weighs_nothing_in_the_density(llama):
    model, ids = copy.deepcopy(llama), make_ids(150, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :100] = 0
    densities = []
    for dense_calls in [[(ids, mask)], [(ids[:1], None), (ids[1:, 100:], None)]]:
        with record() as prefill:
            enable(model, SPARSE, "full")
            for tokens, padding in dense_calls:
                model(tokens, attention_mask=padding)
            enable(model, SPARSE)
            model(ids[:1])
        densities.append(prefill.density())
    assert densities[0] == densities[1] < 1


def test_nothing_recorded_is_not_a_number():
    with record() as prefill:
        pass
    assert prefill.density() != prefill.density() and prefill.layers == {}


def test_threads_record_their_own_prefills(llama):
    models = [copy.deepcopy(llama) for _ in range(2)]
    for model, config in zip(models, (SPARSE, EXACT), strict=True):
        enable(model, config)
    densities, barrier = {}, threading.Barrier(2)

    def prefill(index):
        with record() as mine:
            barrier.wait(timeout=20)
            models[index](make_ids(150))
            barrier.wait(timeout=20)
        densities[index] = mine.density()

    with record() as outside:
        threads = [threading.Thread(target=prefill, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert densities[0] < 0.9 and densities[1] == 1.0
    assert outside.layers == {}


@pytest.mark.parametrize("attention", ["rr", "full"])
def test_observers_see_each_call_with_what_attention_is_computed_from(llama, attention):
    model = make_model(num_hidden_layers=1)
    enable(model, EXACT, attention)
    calls = []
    with observe(lambda *call: calls.append(call)):
        model.generate(make_ids(50), max_new_tokens=3, do_sample=False)
    model(make_ids(50))
    assert [layer for layer, *_ in calls] == [0, 0, 0]
    assert [(tuple(query.shape), tuple(key.shape)) for _, query, key, *_ in calls] == [
        ((1, 4, 50, 16), (1, 2, 50, 16)),
        ((1, 4, 1, 16), (1, 2, 51, 16)),
        ((1, 4, 1, 16), (1, 2, 52, 16)),
    ]
    _, query, key, value, scaling = calls[0]
    assert value.shape == key.shape
    model.set_attn_implementation("eager")
    expected = model(make_ids(50), output_attentions=True).attentions[0][0, :, -1]
    weights = (query[0, :, -1:] @ key[0].repeat_interleave(2, 0).mT * scaling).softmax(-1)[:, 0]
    close(weights, expected)


def test_what_an_observer_has_computed_is_taken_where_attention_is_plain_and_dense(monkeypatch):
    model, ids = make_model(num_hidden_layers=1), make_ids(50)
    enable(model, EXACT, "full")
    expected = model(ids).logits

    def attend(_, query, key, value, scale):
        return dense_attention(query, key, value, scale=scale)

    def attend_wrongly(_, query, *rest):
        return torch.zeros_like(query)

    padded = torch.ones(1, 50, dtype=torch.long)
    padded[:, :7] = 0
    hidden = model(ids, attention_mask=padded).logits
    with observe(attend_wrongly):
        assert not torch.allclose(model(ids).logits, expected, atol=1e-3)
        close(model(ids, attention_mask=padded).logits[:, 7:], hidden[:, 7:])
        enable(model, EXACT, "rr")
        close(model(ids).logits, expected)
    enable(model, EXACT, "full")
    with observe(attend):
        close(model(ids).logits, expected)
