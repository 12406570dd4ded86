"""RRAttention inside Hugging Face decoders: sparse where it may be, exact everywhere else."""

import copy

import pytest
import torch
import transformers
from decoders import (
    EXACT,
    SPARSE,
    close,
    differ,
    logits_with,
    make_ids,
    make_model,
    make_qwen2_vl,
    randomize,
    video_inputs,
)
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

from rrattention.transformers import NAME, enable, record, register


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


@pytest.mark.parametrize("use_cache", [False, True])  # which makes values as wide as keys
def test_autocast_is_as_near_to_float32_as_it_is_with_sdpa(llama, use_cache):
    inputs = {"input_ids": make_ids(150), "use_cache": use_cache}
    exact = {config: logits_with(llama, config, **inputs) for config in ("sdpa", SPARSE)}
    with torch.autocast("cpu", torch.bfloat16):
        near = {config: logits_with(llama, config, **inputs) for config in ("sdpa", EXACT, SPARSE)}
    error = (near["sdpa"] - exact["sdpa"]).abs().mean()
    assert 0 < (near[EXACT] - exact["sdpa"]).abs().mean() < 1.5 * error
    assert 0 < (near[SPARSE] - exact[SPARSE]).abs().mean() < 3 * error, "blocks may change, too"


def test_training_says_that_it_must_be_dense(llama):
    ids, weight = make_ids(150), "model.layers.0.self_attn.q_proj.weight"
    gradients = []
    for implementation in ("full", "sdpa"):
        model = copy.deepcopy(llama).requires_grad_(True).train()
        enable(model, SPARSE, "full") if implementation == "full" else model.set_attn_implementation("sdpa")
        model(ids, labels=ids).loss.backward()
        gradients.append(model.get_parameter(weight).grad)
    close(*gradients)
    enable(model, SPARSE)
    with pytest.raises(RuntimeError, match="no gradients: train with dense attention"):
        model(ids, labels=ids).loss.backward()


def test_a_vision_encoder_that_is_given_the_name_attends_as_ever():
    register()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = randomize(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=4)))
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = model(pixels).last_hidden_state
    model.set_attn_implementation(NAME)
    close(model(pixels).last_hidden_state, expected)


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
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1))
    for other in (bart, mamba):
        with pytest.raises(ValueError, match="text decoder"):
            enable(other, SPARSE)
