"""The KV cache that is laid out once, against the one of transformers."""

import pytest
import torch
from checkpoints import MODEL_CLASSES, make_checkpoint
from transformers import DynamicCache

from rrvideo.cache import ALIGNMENT, PrefixCache

HEADS, DIM = 2, 16
OTHER_DEVICES = pytest.param("cuda", marks=pytest.mark.gpu)


def states(tokens, seed, *, device="cpu", batch=1):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, HEADS, tokens, DIM, generator=generator).to(device) for _ in range(2))


@pytest.mark.parametrize("capacity", [1, 100, 1000])
def test_it_holds_what_the_cache_of_transformers_holds(capacity):
    ours, theirs = PrefixCache(2, capacity=capacity), DynamicCache()
    for step, tokens in enumerate((90, 70, 1, 1, -20, 33, 0, -5, 1, 200)):
        for layer in range(2):
            if tokens > 0:
                added = states(tokens, 10 * step + layer, batch=2)
                for found, expected in zip(ours.update(*added, layer), theirs.update(*added, layer), strict=True):
                    assert torch.equal(found, expected)
            else:
                ours.layers[layer].crop(tokens)
                theirs.layers[layer].crop(tokens)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(7, 0) == theirs.get_mask_sizes(7, 0)
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(ours.layers, theirs.layers, strict=True))


def test_a_model_of_transformers_writes_the_same_with_it(tmp_path):
    plain = MODEL_CLASSES["qwen2_vl"].from_pretrained(make_checkpoint(tmp_path), attn_implementation="sdpa")
    ids = torch.randint(20, 300, (1, 40), generator=torch.Generator().manual_seed(0))
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    expected = plain.generate(ids, **options)
    cache = PrefixCache(plain.config.get_text_config().num_hidden_layers, capacity=45)

    assert torch.equal(plain.generate(ids, past_key_values=cache, **options), expected)
    assert len(expected.unique()) > 20


def test_what_is_there_stays_where_it_is():
    cache = PrefixCache(1, capacity=300)
    keys, _ = cache.update(*states(200, 0), 0)
    longer, _ = cache.update(*states(100, 1), 0)

    assert longer.data_ptr() == keys.data_ptr()
    assert torch.equal(longer[:, :, :200], keys)


def test_growing_seldom_copies_and_takes_little_more_than_needed():
    cache, places = PrefixCache(1, capacity=1000), set()
    for step in range(2000):
        keys, _ = cache.update(*states(1, step), 0)
        places.add(keys.stride(1))

    assert len(places) < 10
    assert max(places) <= (2000 * 9 / 8 + ALIGNMENT) * DIM


@pytest.mark.parametrize("capacity", [1, 65, 1000])
def test_every_head_begins_at_a_multiple_of_64_bytes(capacity):
    cache = PrefixCache(1, capacity=capacity)
    for step, tokens in enumerate((3, 61, 500, 777)):
        keys, values = cache.update(*(x.half() for x in states(tokens, step)), 0)
        for tensor in (keys, values):
            assert {tensor[:, head].data_ptr() % 64 for head in range(HEADS)} == {0}


def test_a_pass_that_lengthened_only_some_layers_is_rolled_back():
    cache = PrefixCache(3, capacity=10)
    prefix = [states(5, layer) for layer in range(3)]
    for layer in range(3):
        cache.update(*prefix[layer], layer)
    cache.update(*states(4, 9), 0)
    cache.roll_back(5)

    for layer, (keys, values) in zip(cache.layers, prefix, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
    PrefixCache(3, capacity=10).roll_back(0)  # nothing there, nothing to do


def test_rolling_back_is_told_in_negative_numbers_as_in_transformers():
    cache = PrefixCache(1, capacity=10)
    cache.update(*states(5, 0), 0)
    with pytest.raises(ValueError, match="must be negative or zero, got 3"):
        cache.crop(3)
    cache.crop(-9)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("device", ["cpu", OTHER_DEVICES])
def test_offloaded_keys_stay_in_the_cpu_s_memory_and_attention_gets_the_same(device):
    here, away = PrefixCache(1, capacity=8), PrefixCache(1, capacity=8, offload=True)
    for step, tokens in enumerate((6, 2, 30, 1)):
        added = states(tokens, step, device=device)
        for found, expected in zip(away.update(*added, 0), here.update(*added, 0), strict=True):
            assert torch.equal(found, expected)
            assert found.device == added[0].device
    assert away.layers[0].keys.device.type == "cpu"
    assert here.layers[0].keys.device.type == device
    assert away.layers[0].keys.is_pinned() == (device == "cuda")


@pytest.mark.parametrize("device", ["cpu", OTHER_DEVICES])
@pytest.mark.parametrize("offload", [False, True])
def test_what_comes_from_a_file_moves_to_the_device_of_the_first_pass(device, offload):
    cache, stored, added = PrefixCache(1, capacity=40, offload=offload), states(30, 0), states(3, 1, device=device)
    cache.update(*stored, 0)
    found = cache.update(*added, 0)

    for tensor, old, new in zip(found, stored, added, strict=True):
        assert torch.equal(tensor.cpu(), torch.cat([old, new.cpu()], dim=2))
        assert tensor.device.type == device
