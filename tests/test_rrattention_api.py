"""Whole calls of RRAttention: where they equal dense attention, alone, padded or in chunks, and what they refuse."""

import itertools
import math
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from reference import SHAPE_IDS, SHAPES, SMALL, attention_by_rows, estimate, make_qkv, rr_attention, select, starts

import rrattention
from rrattention import RRConfig, api, dense_attention
from rrattention.config import MIN_TOKENS


@pytest.mark.parametrize("length", [1, 63, 127, 128, 129, 1000], ids=lambda length: f"T{length}")
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)], ids=lambda heads: f"H{heads}")
def test_tau_one_equals_dense(length, heads, kv_heads):
    config = RRConfig(tau=1.0, min_tokens=0)
    q, k, v = make_qkv(length, length, heads=heads, kv_heads=kv_heads, dim=32, batch=1, dtype=torch.float32)
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    keys, values = (x.double().repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    logits = (q.double() @ keys.mT / math.sqrt(32)).masked_fill(~mask, -math.inf)
    out, stats = rr_attention(q, k, v, config=config, return_stats=True)
    torch.testing.assert_close(out.double(), logits.softmax(-1) @ values, rtol=1e-5, atol=2e-6)
    assert stats.density().item() == 1.0


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("query_length", "key_length", "kv_start"), SHAPES, ids=SHAPE_IDS)
def test_tau_one_equals_dense_with_a_prefix_and_padding(query_length, key_length, kv_start, causal):
    q, k, v = make_qkv(query_length, key_length)
    config = RRConfig(16, 4, tau=1.0, min_tokens=0)
    out = rr_attention(q, k, v, config=config, causal=causal, kv_start=starts(kv_start))
    expected = attention_by_rows(q, k, v, causal=causal, kv_start=kv_start)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scope", ["row", "heads"])
def test_a_small_tau_differs_from_dense_and_keeps_tau_of_the_estimated_mass(scope):
    config = RRConfig(tau=0.6, scope=scope, counted="all", min_tokens=0)
    q, k, v = make_qkv(1000, 1000, dim=32, dtype=torch.float32, batch=1)
    out, stats = rr_attention(q, k, v, config=config, return_stats=True)
    scores = estimate(q, k, config=config)
    kept = (scores * select(scores, 1000, 1000, config=config).mask()).sum(-1) / scores.sum(-1)
    assert ((kept if scope == "row" else kept.mean(1)) >= 0.6 - 1e-6).all()
    assert 0.2 < stats.density(mandatory=False) < stats.density() < 0.9
    assert (out - dense_attention(q, k, v, scale=32**-0.5)).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_near_to_float64_as_eager_attention_is(dtype):
    q, k, v = make_qkv(300, 300, heads=4, kv_heads=4, dim=32, batch=1, dtype=dtype, sharpness=1.0)
    mask = torch.ones(300, 300, dtype=torch.bool).tril()
    exact = (q.double() @ k.double().mT / math.sqrt(32)).masked_fill(~mask, -math.inf).softmax(-1) @ v.double()
    eager = ((q @ k.mT) / math.sqrt(32)).masked_fill(~mask, -math.inf).softmax(-1) @ v
    out = rr_attention(q, k, v, config=RRConfig(tau=1.0, min_tokens=0))
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() <= (eager.double() - exact).abs().max()


@pytest.mark.parametrize("scope", ["row", "heads"])
@pytest.mark.parametrize("prefix", [0, 32, 40], ids=lambda prefix: f"prefix{prefix}")
def test_a_padded_sequence_selects_and_returns_what_it_would_alone(scope, prefix):
    config = RRConfig(16, 4, tau=0.7, scope=scope, min_tokens=0)
    q, k, v = make_qkv(100, 100 + prefix, batch=4)
    kv_start = torch.tensor([0, 7, 48, 90])
    for b, start in enumerate(kv_start.tolist()):
        k[b, :, :start] = v[b, :, :start] = torch.nan  # whatever lies in the padding
    batched, stats = rr_attention(q, k, v, config=config, kv_start=kv_start, return_stats=True)
    selection = select(
        estimate(q, k, config=config, kv_start=kv_start), 100, 100 + prefix, config=config, kv_start=kv_start
    )
    kept = 0
    for b, start in enumerate(kv_start.tolist()):
        padding = max(start - prefix, 0)
        alone = q[b : b + 1, :, padding:], k[b : b + 1, :, start:], v[b : b + 1, :, start:]
        out, alone_stats = rr_attention(*alone, config=config, return_stats=True)
        torch.testing.assert_close(batched[b : b + 1, :, padding:], out, rtol=1e-9, atol=1e-12)
        assert (batched[b, :, :padding] == 0).all()
        lengths = alone[0].shape[2], alone[1].shape[2]
        single = select(estimate(*alone[:2], config=config), *lengths, config=config).mask()[0]
        assert torch.equal(selection.mask()[b, :, : single.shape[1], : single.shape[2]], single)
        kept += alone_stats.kept
    assert stats.kept == kept and stats.density() < 1


def test_a_sequence_of_nothing_but_padding_is_zeros():
    q, k, v = make_qkv(40, 40)
    kv_start = torch.tensor([40, 0])
    out, stats = rr_attention(q, k, v, config=SMALL, kv_start=kv_start, return_stats=True)
    assert (out[0] == 0).all() and out[1].isfinite().all()
    assert stats.visible == 6 * 6


@pytest.mark.parametrize("scope", ["row", "heads"])
@pytest.mark.parametrize("borders", [(0, 64, 128, 200), (0, 16, 176, 192, 200)], ids=str)
def test_chunked_prefill_selects_exactly_what_one_call_selects(scope, borders):
    config = RRConfig(16, 4, tau=0.7, scope=scope, min_tokens=150)
    q, k, v = make_qkv(200, 200, dtype=torch.float32)
    whole = select(estimate(q, k, config=config), 200, 200, config=config).mask()
    out = rr_attention(q, k, v, config=config)
    for start, stop in itertools.pairwise(borders):
        chunk = config.for_chunk(total_tokens=200, last=stop == 200, device=q.device)
        args = q[:, :, start:stop], k[:, :, :stop]
        selection = select(estimate(*args, config=chunk), stop - start, stop, config=chunk).mask()
        assert torch.equal(selection, whole[:, :, start // 16 : -(-stop // 16), : selection.shape[3]])
        torch.testing.assert_close(
            rr_attention(*args, v[:, :, :stop], config=chunk), out[:, :, start:stop], rtol=1e-5, atol=1e-6
        )


def test_a_chunk_is_dense_when_the_whole_prefill_is_too_short():
    config = RRConfig(16, 4, tau=0.3, min_tokens=150)
    q, k, v = make_qkv(64, 160)
    for total, dense in [(140, True), (150, False)]:
        _, stats = rr_attention(
            q, k, v, config=config.for_chunk(total_tokens=total, last=False, device=q.device), return_stats=True
        )
        assert (stats.density().item() == 1.0) == dense


def test_fewer_keys_than_min_tokens_is_dense():
    q, k, v = make_qkv(90, 99)
    out, stats = rr_attention(q, k, v, config=RRConfig(16, 4, tau=0.1, min_tokens=100), return_stats=True)
    torch.testing.assert_close(out, attention_by_rows(q, k, v), rtol=1e-9, atol=1e-12)
    assert stats.density().item() == stats.density(mandatory=False).item() == 1.0
    assert stats.kept == 2 * 6 * sum(range(1, 8))
    q, k, v = make_qkv(91, 100)
    assert rr_attention(q, k, v, config=RRConfig(16, 4, tau=0.1, min_tokens=100), return_stats=True)[1].density() < 1


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_without_min_tokens_the_device_says_from_where_on_a_call_is_sparse(device):
    least = MIN_TOKENS.get(device, MIN_TOKENS["cpu"])
    for total in (least - 1, least):
        for config in (RRConfig(), RRConfig().for_chunk(total_tokens=total, last=True, device=torch.device(device))):
            assert config.sparse(total, torch.device(device)) == (total == least)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(
    ("query_length", "key_length", "kv_start"), [*SHAPES, (600, 610, None)], ids=[*SHAPE_IDS, "Lq600-Lk610"]
)
def test_the_dense_path_puts_the_last_query_at_the_last_key(query_length, key_length, kv_start, causal):
    heads = 1 if query_length == 600 else 6
    q, k, v = make_qkv(query_length, key_length, heads=heads, kv_heads=min(heads, 2), batch=2 if heads == 6 else 1)
    out = dense_attention(q, k, v, scale=8**-0.5, causal=causal, kv_start=starts(kv_start))
    expected = attention_by_rows(q, k, v, causal=causal, kv_start=kv_start)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-12)


def test_density_is_one_where_there_is_nothing_to_choose():
    q, k, v = make_qkv(30, 30)  # two blocks: the sink and the diagonal
    _, stats = rr_attention(q, k, v, config=SMALL, return_stats=True)
    assert stats.density().item() == stats.density(mandatory=False).item() == 1.0


def test_views_with_any_strides_give_the_same_result():
    q, k, v = make_qkv(70, 70)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert not strided[0].is_contiguous()
    assert torch.equal(rr_attention(*strided, config=SMALL), rr_attention(q, k, v, config=SMALL))


def test_a_sparse_call_says_that_it_has_no_gradients_and_the_reference_and_dense_calls_have_them():
    q, k, v = make_qkv(70, 70)
    expected = rr_attention(q, k, v, config=SMALL)
    q.requires_grad_()
    selection = rrattention.select(rrattention.estimate(q, k, config=SMALL), 70, 70, config=SMALL)
    for call in (
        lambda: rrattention.rr_attention(q, k, v, config=SMALL),
        lambda: rrattention.attend(q, k, v, selection, skipped=SMALL.skipped),
    ):
        torch.testing.assert_close(out := call(), expected)
        with pytest.raises(RuntimeError, match="block-sparse attention has no gradients: train with dense attention"):
            out.sum().backward()
        with torch.no_grad():
            assert not call().requires_grad
    for options in ({"config": SMALL, "backend": "reference"}, {"config": replace(SMALL, min_tokens=71)}):
        q.grad = None
        rrattention.rr_attention(q, k, v, **options).square().sum().backward()
        assert q.grad.abs().sum() > 0


def test_scale_acts_on_the_scores_and_on_the_output():
    q, k, v = make_qkv(70, 70)
    scaled = rr_attention(q, k, v, config=SMALL, scale=0.1)
    torch.testing.assert_close(scaled, rr_attention(q * 0.1 * 8**0.5, k, v, config=SMALL), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(2, 70, 8)}, r"q must be floating point .* \[2, 70, 8\]"),
        ({"q": torch.zeros(2, 6, 70, 8, dtype=torch.int32)}, r"q must be floating point .*int32"),
        ({"q": torch.zeros(2, 6, 99, 8)}, r"query length .* 70, got 99"),
        ({"q": torch.zeros(2, 6, 0, 8)}, r"query length .* 70, got 0"),
        ({"k": torch.zeros(2, 4, 70, 8)}, r"k must .* divides the 6 heads of q, got 4"),
        ({"k": torch.zeros(1, 2, 70, 8)}, r"k must have the batch.*\[1, 2, 70, 8\]"),
        ({"k": torch.zeros(2, 2, 70, 8, dtype=torch.float16)}, r"k must have .*float16"),
        ({"v": torch.zeros(2, 2, 71, 8)}, r"v must have the shape.*71"),
        ({"kv_start": torch.zeros(3, dtype=torch.long)}, r"kv_start must be \[2\] .* \[3\]"),
        ({"kv_start": torch.zeros(2)}, r"kv_start must be .*float32"),
        ({"backend": "cuda"}, r"backend must be one of auto, triton, cpu, reference, got 'cuda'"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named_with_their_value(change, words):
    arguments = {"q": torch.zeros(2, 6, 70, 8), "k": torch.zeros(2, 2, 70, 8), "v": torch.zeros(2, 2, 70, 8)} | change
    with pytest.raises(ValueError, match=words):
        rr_attention(**arguments)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_size", 0),
        ("block_size", 100),
        ("block_size", 128.0),
        ("stride", 0),
        ("tau", 0.0),
        ("tau", 1.5),
        ("tau", float("nan")),
        ("scope", "layer"),
        ("counted", "some"),
        ("skipped", "kept"),
        ("min_tokens", -1),
    ],
)
def test_a_wrong_config_names_the_field_and_the_value(field, value):
    with pytest.raises(ValueError, match=rf"^{field} must .*got .*{value}"):
        RRConfig(**{field: value})


@pytest.mark.parametrize("weights", [3, [1, 2], [], [[1], [1, 2]], [[1, 0]], [[1, float("nan")]], [[1, -2]]])
def test_weights_of_heads_must_be_positive_numbers_for_each_layer(weights):
    with pytest.raises(ValueError, match=r"^head_weights must be .*got "):
        RRConfig(head_weights=weights)


@pytest.mark.parametrize(("layer", "heads"), [(2, 6), (-1, 6), (0, 3)])
def test_weights_of_another_model_are_told(layer, heads):
    q, k, v = make_qkv(70, 70)
    config = replace(SMALL, head_weights=[[1.0] * heads] * 2)
    with pytest.raises(
        ValueError, match=rf"^head_weights must be .*2 layers of {heads} heads, .*layer {layer}, 6 heads"
    ):
        rr_attention(q, k, v, config=config, layer=layer)


def test_the_papers_rule_is_per_row_of_all_mass_and_drops_the_rest():
    assert RRConfig.paper() == RRConfig(scope="row", counted="all", skipped="dropped")
    assert RRConfig.paper(0.9).tau == 0.9


def test_the_fine_rule_scores_smaller_blocks_more_closely_by_all_mass():
    assert RRConfig.fine() == RRConfig(block_size=64, stride=4, counted="all")
    assert RRConfig.fine(0.9).tau == 0.9


@pytest.mark.parametrize(
    ("device", "dtype", "hip", "found"),
    [
        ("cuda", torch.float16, None, "triton"),
        ("cuda", torch.float16, "6.4", "reference"),  # as torch calls the GPUs of AMD
        ("cuda", torch.float64, None, "reference"),
        ("cpu", torch.float16, None, "cpu"),
        ("mps", torch.float16, None, "reference"),
    ],
)
def test_the_backend_is_the_best_for_the_device(monkeypatch, device, dtype, hip, found):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.version, "hip", hip)
    like = SimpleNamespace(device=torch.device(device), dtype=dtype)
    assert api._stages("auto", like).__name__ == f"rrattention.{found}"


def test_importing_rrattention_imports_neither_transformers_nor_triton():
    code = "import sys, torch; had = set(sys.modules); import rrattention; print(*(set(sys.modules) - had))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = {name.partition(".")[0] for name in run.stdout.split()}
    assert "rrattention" in imported
    assert not imported & {"transformers", "triton"}


def test_public_names_are_sorted_and_exist():
    assert rrattention.__all__ == sorted(rrattention.__all__)
    assert all(hasattr(rrattention, name) for name in rrattention.__all__)
