"""RRAttention inside Hugging Face decoders: sparse where it may be, exact everywhere else."""

import copy
import threading

import pytest
import torch
import transformers
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

from rrattention import RRConfig
from rrattention.dense import dense_attention
from rrattention.transformers import NAME, enable, observe, record, register

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


@pytest.fixture(scope="module")
def llama():
    return make_model()


@pytest.fixture(scope="module")
def qwen2_vl():
    return make_qwen2_vl()


def test_llama_generates_sparsely_and_with_tau_one_as_it_does_with_sdpa(llama):
    ids = make_ids(150, batch=2)
    expected = llama.generate(ids, max_new_tokens=8, do_sample=False)
    model = copy.deepcopy(llama)
    for config, same in [(EXACT, True), (SPARSE, False)]:
        enable(model, config)
        with record() as prefill:
            tokens = model.generate(ids, max_new_tokens=8, do_sample=False)
        assert tokens.shape == (2, 158)
        assert torch.equal(tokens, expected) == same
        assert (prefill.density() == 1.0) == same


def test_qwen2_vl_generates_sparsely_and_with_tau_one_as_it_does_with_sdpa(qwen2_vl):
    inputs = video_inputs()
    expected = qwen2_vl.generate(**inputs, max_new_tokens=6, do_sample=False)
    model = copy.deepcopy(qwen2_vl)
    enable(model, EXACT)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), expected)
    enable(model, SPARSE)
    with record() as prefill:
        assert model.generate(**inputs, max_new_tokens=6, do_sample=False).shape == expected.shape
    assert 0.2 < prefill.density() < 0.9
    assert differ(logits_with(qwen2_vl, SPARSE, **inputs), logits_with(qwen2_vl, "sdpa", **inputs))


def test_only_the_text_part_is_changed(qwen2_vl):
    model = copy.deepcopy(qwen2_vl)
    vision, top = model.config.vision_config._attn_implementation, model.config._attn_implementation
    enable(model, SPARSE)
    assert model.config.text_config._attn_implementation == NAME
    assert (model.config.vision_config._attn_implementation, model.config._attn_implementation) == (vision, top)


@pytest.mark.parametrize("make", [make_model, make_qwen2_vl])
@pytest.mark.parametrize("config", [SPARSE, EXACT], ids=["sparse", "tau1"])
def test_a_padded_batch_gives_what_each_sequence_gives_alone(make, config):
    model = make()
    enable(model, config)
    lengths, longest = [150, 101, 60], 150
    ids, mask = torch.zeros(3, longest, dtype=torch.long), torch.zeros(3, longest, dtype=torch.long)
    for b, length in enumerate(lengths):
        ids[b, longest - length :] = make_ids(length, seed=b)[0]
        mask[b, longest - length :] = 1
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with record() as together:
        batched = model.generate(ids, attention_mask=mask, **options)
    with record() as one_by_one:
        for b, length in enumerate(lengths):
            alone = model.generate(ids[b : b + 1, longest - length :], **options)
            assert torch.equal(batched.sequences[b, longest:], alone.sequences[0, length:])
            for step, expected in zip(batched.logits, alone.logits, strict=True):
                close(step[b], expected[0])
    assert together.density() == one_by_one.density()
    assert (together.density() < 1) == (config is SPARSE)


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


def test_decoding_is_exact_after_a_sparse_prefill(llama):
    model = copy.deepcopy(llama)
    enable(model, SPARSE)
    cache = DynamicCache(config=model.config)
    model(make_ids(150), past_key_values=cache)
    sdpa_cache = copy.deepcopy(cache)
    step = make_ids(1, seed=5)
    with record() as prefill:
        sparse = model(step, past_key_values=cache).logits
    close(sparse, llama(step, past_key_values=sdpa_cache).logits)
    assert prefill.layers == {}, "decoding was recorded as prefill"


def test_a_question_after_a_prefix_is_exact_and_a_long_text_after_it_is_sparse(llama):
    model = copy.deepcopy(llama)
    enable(model, SPARSE)
    cache = DynamicCache(config=model.config)
    model(make_ids(144), past_key_values=cache)
    for length, exact in [(15, True), (100, False)]:
        text = make_ids(length, seed=7)
        with record() as prefill:
            out = model(text, past_key_values=copy.deepcopy(cache)).logits
        # sdpa's own path needs its mask to be told of the prefix
        expected = llama(text, past_key_values=copy.deepcopy(cache)).logits
        assert torch.allclose(out, expected, rtol=1e-4, atol=1e-4) == exact
        assert (prefill.density() == 1.0) == exact


def test_prefill_in_chunks_with_a_cache_equals_one_pass(llama):
    ids = make_ids(150)
    model = copy.deepcopy(llama)
    for attention in ("rr", "full"):
        enable(model, SPARSE, attention)
        whole = model(ids).logits
        cache, chunks = DynamicCache(config=model.config), []
        for start, stop in [(0, 64), (64, 128), (128, 150)]:
            enable(model, SPARSE.for_chunk(total_tokens=150, last=stop == 150, device=ids.device), attention)
            chunks.append(model(ids[:, start:stop], past_key_values=cache).logits)
        close(torch.cat(chunks, dim=1), whole)


def custom_mask(length):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(1, 1, length, length, generator=generator) < 0.5
    return (mask | torch.eye(length, dtype=torch.bool)).tril()


def right_padding(length):
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, 90:] = 0
    return mask


@pytest.mark.parametrize("kind", ["bool", "float", "right-padding", "hole", "packed"])
def test_masks_that_it_cannot_honour_go_to_exact_attention(llama, kind):
    ids = make_ids(120, batch=2)
    keep = torch.ones(2, 120, dtype=torch.bool)
    match kind:
        case "bool":
            inputs = {"attention_mask": custom_mask(120)}
        case "float":
            inputs = {"attention_mask": torch.zeros(1, 1, 120, 120).masked_fill(~custom_mask(120), -1e9)}
        case "right-padding":
            inputs = {"attention_mask": right_padding(120)}
            keep = inputs["attention_mask"].bool()
        case "hole":
            mask = torch.ones(2, 120, dtype=torch.long)
            mask[0, 30:50] = 0
            inputs = {"attention_mask": mask}
            keep = mask.bool()
        case "packed":
            inputs = {"position_ids": torch.cat([torch.arange(70), torch.arange(50)])[None].expand(2, -1)}
    with record() as prefill:
        out = logits_with(llama, SPARSE, input_ids=ids, use_cache=False, **inputs)
    close(out[keep], logits_with(llama, "sdpa", input_ids=ids, use_cache=False, **inputs)[keep])
    assert prefill.density() == 1.0
    plain = logits_with(llama, "sdpa", input_ids=ids, use_cache=False)
    assert differ(out[keep], plain[keep]) or kind == "right-padding", "the mask made no difference"


def test_layers_with_a_sliding_window_are_exact_and_the_others_sparse():
    model = make_model("Qwen2", use_sliding_window=True, sliding_window=40, max_window_layers=1)
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    ids = make_ids(150)
    close(logits_with(model, EXACT, input_ids=ids), logits_with(model, "sdpa", input_ids=ids))
    with record() as prefill:
        logits_with(model, SPARSE, input_ids=ids)
    assert prefill.layers[0] < 0.9 and prefill.layers[1] == 1.0


def test_who_asks_for_a_whole_mask_gets_one(llama):
    model = copy.deepcopy(llama)
    enable(model, SPARSE)
    arguments = {"config": model.config, "inputs_embeds": torch.zeros(1, 5, 64), "attention_mask": None}
    assert create_causal_mask(**arguments, past_key_values=None) is None
    mask = create_causal_mask(**arguments, past_key_values=None, allow_is_causal_skip=False)
    assert torch.equal(mask, torch.ones(1, 1, 5, 5, dtype=torch.bool).tril())


def test_a_static_cache_is_exact(llama):
    ids = make_ids(120)
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    expected = llama.generate(ids, **options)
    model = copy.deepcopy(llama)
    enable(model, SPARSE)
    with record() as prefill:
        assert torch.equal(model.generate(ids, **options), expected)
    assert prefill.density() == 1.0


def test_bidirectional_decoders_are_exact():
    model = make_model(is_causal=False)
    ids = make_ids(100)
    out = logits_with(model, SPARSE, input_ids=ids, use_cache=False)
    close(out, logits_with(model, "eager", input_ids=ids, use_cache=False))
    assert differ(out, logits_with(make_model(), "eager", input_ids=ids, use_cache=False))


def test_values_of_another_width_than_the_keys_are_attended_to_exactly():
    widths = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12}
    model = make_model("DeepseekV3", **widths, num_key_value_heads=4, first_k_dense_replace=2)
    ids, mask = make_ids(100, batch=2), torch.ones(2, 100, dtype=torch.long)
    mask[1, :30] = 0
    out = logits_with(model, SPARSE, input_ids=ids, attention_mask=mask)
    close(out[mask.bool()], logits_with(model, "sdpa", input_ids=ids, attention_mask=mask)[mask.bool()])


def test_what_no_path_can_honour_is_an_error_and_never_a_wrong_answer(llama):
    capped = make_model("Gemma2", head_dim=16, attn_logit_softcapping=20.0)
    with pytest.raises(ValueError, match="softcap"):
        logits_with(capped, SPARSE, input_ids=make_ids(40))
    model = copy.deepcopy(llama)
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    enable(model, SPARSE)
    with pytest.raises(ValueError, match=r"dropout must be 0 .*0\.1"):
        model.train()(make_ids(40))


def test_a_bare_attn_implementation_uses_the_defaults(llama):
    register()
    model = copy.deepcopy(llama)
    model.set_attn_implementation(NAME)
    ids = make_ids(100)
    with record() as prefill:  # shorter than the default min_tokens
        close(model(ids).logits, llama(ids).logits)
    assert prefill.density() == 1.0


def test_settings_belong_to_one_model_and_travel_with_it(llama, tmp_path):
    sparse, exact = copy.deepcopy(llama), copy.deepcopy(llama)
    enable(sparse, SPARSE)
    enable(exact, EXACT)
    sparse.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME).eval()
    ids = make_ids(150)
    expected = sparse(ids).logits
    close(loaded(ids).logits, expected)
    close(copy.deepcopy(sparse)(ids).logits, expected)
    close(exact(ids).logits, llama(ids).logits)
    assert differ(expected, exact(ids).logits)
    assert differ(llama(ids).logits, expected) and llama.config._attn_implementation == "sdpa"


def test_enable_says_what_is_wrong(llama):
    with pytest.raises(ValueError, match="attention must be one of rr, full, got 'flash'"):
        enable(copy.deepcopy(llama), SPARSE, "flash")
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    bart = transformers.BartForConditionalGeneration(
        transformers.BartConfig(vocab_size=50, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, **layers)
    )
    with pytest.raises(ValueError, match="text decoder"):
        enable(bart, SPARSE)


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
