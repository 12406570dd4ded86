"""Weights of heads: what they are measured as, against models in which one head at a time is made sparse."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from decoders import SPARSE, make_ids, make_model

from rrattention import RRConfig, attend, dense_attention, estimate, select
from rrattention.calibration import calibrate
from rrattention.transformers import attending_fully, enable, observe, record, settings

CONFIG = replace(SPARSE, tau=0.9)
WINDOW = {"use_sliding_window": True, "sliding_window": 40}
IDS = [make_ids(200, seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def llama():
    return make_model()


def reads(model):
    return [partial(logits, model, ids) for ids in IDS]


def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def sparse_head(layer, head, left_out):
    """An observer that attends sparsely in this head alone, and adds what mass that leaves out."""

    def attending(index, q, k, v, scale):
        out = dense_attention(q, k, v, scale=scale)
        if index == layer:
            scores = estimate(q, k, config=CONFIG, scale=scale)
            selection = select(scores, q.shape[2], k.shape[2], config=CONFIG)
            share = scores / scores.sum(-1, keepdim=True)
            left_out.append(float((share * ~selection.mask())[:, head].sum(-1).mean()))
            out[:, head] = attend(q, k, v, selection, scale=scale, skipped=CONFIG.skipped)[:, head]
        return out

    return attending


@torch.no_grad()
def test_a_heads_weight_is_the_fourth_root_of_what_it_moves_the_predictions_over_the_squared_mass_left_out(llama):
    llama = copy.deepcopy(llama)
    for layer in llama.model.layers:
        layer.self_attn.o_proj.weight *= torch.tensor([0.2, 0.5, 1.0, 1.5]).repeat_interleave(16)
    weights = calibrate(llama, reads(llama), CONFIG, draws=400)
    for layer, row in enumerate(weights):
        found = []
        for head in range(len(row)):
            left_out, moved = [], 0.0
            with attending_fully(llama, CONFIG):
                for read in reads(llama):
                    dense = read()[0].log_softmax(-1)
                    with observe(sparse_head(layer, head, left_out)):
                        sparse = read()[0].log_softmax(-1)
                    moved += float((dense.exp() * (dense - sparse)).sum())
            found.append((moved / sum(left_out) ** 2) ** 0.25)
        mean = sum(found) / len(found)
        ours = [weight * len(row) / sum(row) for weight in row]
        assert ours == pytest.approx([each / mean for each in found], rel=0.1)
        assert max(ours) > 2 * min(ours), "else all of them might be one"


def test_a_head_and_a_layer_that_nothing_depends_on_weigh_least(llama):
    model = copy.deepcopy(llama)
    size = model.config.hidden_size // 4
    model.model.layers[0].self_attn.o_proj.weight.data[:, 2 * size : 3 * size] = 0
    model.model.layers[1].self_attn.o_proj.weight.data *= 0
    first, second = RRConfig(head_weights=calibrate(model, reads(model), CONFIG)).head_weights
    assert first[2] < 0.5 * min(first[:2] + first[3:])
    assert sum(second) < 0.5 * sum(first)
    assert sum(first + second) / 8 == pytest.approx(1, rel=0.01)


def test_the_model_is_left_as_it_was_and_the_same_is_found_again(llama):
    model = copy.deepcopy(llama)
    enable(model, SPARSE)
    model.requires_grad_(True)
    before = settings(model)
    weights = calibrate(model, reads(model), CONFIG)
    assert settings(model) == before
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert weights == calibrate(llama, reads(llama), CONFIG) != calibrate(llama, reads(llama)[:1], CONFIG)
    assert llama.config._attn_implementation == "sdpa" and not hasattr(llama.config, "rrattention")


def test_each_layer_keeps_blocks_by_its_own_row_of_weights(llama):
    model = copy.deepcopy(llama)
    enable(model, replace(SPARSE, head_weights=[[0.01] * 4, [50] * 4]))
    with record() as prefill:
        logits(model, IDS[0])
    least = replace(SPARSE, tau=1e-6)
    enable(model, least)
    with record() as nothing:
        logits(model, IDS[0])
    assert prefill.layers[0] < nothing.layers[0] < 0.6  # not even the one block that carries so little
    assert prefill.layers[1] > 0.95


def test_layers_with_a_window_weigh_nothing_of_their_own_and_say_nothing_of_the_others(llama):
    windowed = make_model(
        "Qwen2", num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, **WINDOW
    )
    first, second, third, fourth = calibrate(windowed, reads(windowed), CONFIG)
    assert first == third == (1.0,) * 4
    assert len({*second, *fourth}) > 4 and 0.1 < min(second + fourth) < max(second + fourth) < 5
    assert sum(second + fourth) == pytest.approx(8, rel=1e-2)
    enable(windowed, replace(CONFIG, head_weights=(first, second, third, fourth)))


def test_weights_are_saved_with_the_model(llama, tmp_path):
    model = copy.deepcopy(llama)
    config = replace(SPARSE, head_weights=((1.0, 0.5, 2.0, 1.0), (0.25, 1.0, 1.0, 1.0)))
    enable(model, config)
    model.save_pretrained(tmp_path)
    found = type(model).from_pretrained(tmp_path)
    assert settings(found) == (config, "rr")
    assert found.config.rrattention == model.config.rrattention, "or a prefix that was saved with it is refused"


@pytest.mark.parametrize("shape", [(3, 4), (2, 8)])
def test_weights_of_another_model_are_refused(llama, shape):
    config = replace(SPARSE, head_weights=[[1.0] * shape[1]] * shape[0])
    with pytest.raises(ValueError, match=f"2 layers of 4 heads, got {shape[0]} layers of {shape[1]}"):
        enable(copy.deepcopy(llama), config)


def test_too_little_to_read_is_told(llama):
    with pytest.raises(ValueError, match="and none was"):
        calibrate(llama, [])
    with pytest.raises(ValueError, match="long enough to leave out blocks of 16"):
        calibrate(llama, [partial(logits, llama, IDS[0][:, :16])], CONFIG)
    with pytest.raises(ValueError, match="that gradients flow through"):
        calibrate(llama, [torch.no_grad()(reads(llama)[0])])
    with pytest.raises(ValueError, match="long enough to leave out blocks of 16"):
        calibrate(llama, [partial(logits, llama, IDS[0][:, :32])], replace(CONFIG, tau=1.0))
