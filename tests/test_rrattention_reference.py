"""The three stages of RRAttention against loops and brute force, in float64, and against dense attention."""

import itertools
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import rrattention
from rrattention import BlockGrid, BlockSelection, RRConfig, dense_attention
from rrattention.config import MIN_TOKENS

# By itself a CPU takes its fast backend; what is held here is the specification.
attend, estimate, rr_attention, select = (
    partial(stage, backend="reference")
    for stage in (rrattention.attend, rrattention.estimate, rrattention.rr_attention, rrattention.select)
)

SMALL = RRConfig(block_size=16, stride=4, tau=0.8, min_tokens=0)

# (Lq, Lk, kv_start of two sequences or None): whole, ragged, single, prefixed on and off the grid, padded, both.
SHAPES = [
    (64, 64, None),
    (61, 61, None),
    (1, 1, None),
    (1, 50, None),
    (33, 81, None),
    (30, 75, None),
    (70, 70, (0, 23)),
    (40, 75, (5, 50)),
    (3, 40, (0, 38)),
]
SHAPE_IDS = [f"Lq{lq}-Lk{lk}-start{start}" for lq, lk, start in SHAPES]


def make_qkv(query_length, key_length, *, heads=6, kv_heads=2, dim=8, batch=2, dtype=torch.float64, sharpness=2.0):
    generator = torch.Generator().manual_seed(query_length * 1000 + key_length)
    q = torch.randn(batch, heads, query_length, dim, generator=generator, dtype=torch.float64) * sharpness
    k = torch.randn(batch, kv_heads, key_length, dim, generator=generator, dtype=torch.float64)
    v = torch.randn(batch, kv_heads, key_length, dim, generator=generator, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def starts(kv_start):
    return None if kv_start is None else torch.tensor(kv_start)


def attention_by_rows(q, k, v, *, causal=True, kv_start=None, allowed=None):
    """Dense attention in float64, one query at a time; `allowed(b, h, query position, key position)` narrows it."""
    out = torch.zeros_like(q, dtype=torch.float64)
    shift = k.shape[2] - q.shape[2]
    for b, h, r in itertools.product(*map(range, q.shape[:3])):
        start = int(kv_start[b]) if kv_start is not None else 0
        position = r + shift - start
        if position < 0:
            continue
        g = h // (q.shape[1] // k.shape[1])
        last = position + 1 if causal else k.shape[2] - start
        seen = [p for p in range(last) if allowed is None or allowed(b, h, position, p)]
        keys, values = k[b, g, start:].double()[seen], v[b, g, start:].double()[seen]
        out[b, h, r] = torch.softmax(keys @ q[b, h, r].double() / math.sqrt(q.shape[3]), dim=0) @ values
    return out


def scores_by_loops(q, k, config, *, causal=True, kv_start=None):
    """Stages 1 to 3 of the definition, word for word, for sequences that lost their padding."""
    B, S = config.block_size, config.stride
    scores = {}
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        start = int(kv_start[b]) if kv_start is not None else 0
        keys = k[b, h // (q.shape[1] // k.shape[1]), start:].double()
        pooled = [keys[j : j + S].sum(0) / S for j in range(0, len(keys), S)]
        shift = len(keys) - q.shape[2]
        for position in range(max(shift, 0), len(keys)):
            row = scores.setdefault((b, h, position // B), torch.zeros(-(-len(keys) // B), dtype=torch.float64))
            if position % S != h % S:
                continue
            logits = torch.tensor(
                [
                    float(q[b, h, position - shift].double() @ pooled[j]) / math.sqrt(q.shape[3])
                    for j in range(len(pooled))
                    if not causal or j * S <= position
                ],
                dtype=torch.float64,
            )
            for j, mass in enumerate(torch.softmax(logits, dim=0)):
                row[j * S // B] += mass
    return scores


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("query_length", "key_length", "kv_start"), SHAPES, ids=SHAPE_IDS)
def test_scores_equal_those_of_a_loop_over_sampled_queries(query_length, key_length, kv_start, causal):
    q, k, _ = make_qkv(query_length, key_length)
    scores = estimate(q, k, config=SMALL, causal=causal, kv_start=starts(kv_start))
    expected = torch.zeros_like(scores)
    for (b, h, block), row in scores_by_loops(q, k, SMALL, causal=causal, kv_start=kv_start).items():
        start = kv_start[b] if kv_start else 0
        first = max(key_length - query_length - start, 0) // SMALL.block_size
        expected[b, h, block - first, : len(row)] = row
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-12)


def test_every_position_of_a_stride_is_seen_by_some_head():
    q, k, _ = make_qkv(32, 32, heads=8, kv_heads=8, batch=1)
    full = estimate(q, k, config=SMALL)
    for position in range(4):
        changed = q.clone()
        changed[:, :, position::4] += 1.0
        moved = (estimate(changed, k, config=SMALL) != full).flatten(2).any(-1)[0]
        assert moved.tolist() == [h % 4 == position for h in range(8)]


@pytest.mark.parametrize("counted", ["all", "choice"])
@pytest.mark.parametrize("scope", ["row", "heads"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("tau", [0.3, 0.8, 0.95])
def test_no_smaller_set_with_the_mandatory_blocks_carries_tau(scope, counted, causal, tau):
    config = RRConfig(block_size=16, stride=4, tau=tau, scope=scope, counted=counted, dense_last_block=False)
    q, k, _ = make_qkv(80, 80, heads=2, kv_heads=1, batch=1)
    scores = estimate(q, k, config=config, causal=causal)[0]
    kept = select(scores[None], 80, 80, config=config, causal=causal).mask()[0]
    for m in range(5):
        mass = scores[:, m] / scores[:, m].sum(-1, keepdim=True)
        must = torch.zeros(2, 5, dtype=torch.bool)
        must[:, [0, m]] = True
        for heads in [[0], [1]] if scope == "row" else [[0, 1]]:
            options, forced = mass[heads].flatten(), must[heads].flatten()
            if counted == "choice":
                options = options.where(~forced, 0)
            visible = torch.full((len(heads), 5), True)
            if causal:
                visible[:, m + 1 :] = False
            free = (visible.flatten() & ~forced).nonzero().flatten().tolist()
            chosen = kept[heads, m].flatten()
            enough = tau * options.sum()
            assert chosen[forced].all() and not chosen[~visible.flatten()].any()
            assert options[chosen].sum() >= enough
            fewer = int(chosen.sum() - forced.sum()) - 1
            base = options[forced].sum()
            sums = [base + options[list(more)].sum() for more in itertools.combinations(free, max(fewer, 0))]
            assert fewer < 0 or max(sums) < enough


@pytest.mark.parametrize("tau", [0.5, 0.9])
def test_sharing_tau_over_heads_keeps_its_mass_with_no_more_blocks_than_a_tau_for_each_row(tau):
    q, k, _ = make_qkv(160, 160)
    rows = RRConfig(16, 4, tau=tau, scope="row", counted="all", dense_last_block=False)
    heads = replace(rows, scope="heads")
    scores = estimate(q, k, config=rows)
    by_row = select(scores, 160, 160, config=rows)
    by_heads = select(scores, 160, 160, config=heads)
    share = scores / scores.sum(-1, keepdim=True)
    assert ((share * by_heads.mask()).sum(dim=(1, 3)) >= tau * 6 - 1e-12).all()
    assert (by_heads.counts.sum(1) <= by_row.counts.sum(1)).all()
    assert by_heads.counts.sum() < by_row.counts.sum()
    assert ((share * by_heads.mask()).sum(-1) < tau).any(), "no head fell below tau: then nothing was shared"


@pytest.mark.parametrize("scope", ["row", "heads"])
def test_tau_one_keeps_every_visible_block_even_those_without_mass(scope):
    config = RRConfig(16, 4, tau=1.0, scope=scope)
    grid = BlockGrid.of(torch.empty(1, 2), 96, 96, config)
    scores = torch.zeros(1, 2, 6, 6)
    scores[..., 0] = 4.0
    selection = select(scores, 96, 96, config=config)
    assert torch.equal(selection.mask(), grid.visible()[:, None].expand(1, 2, 6, 6))
    assert selection.density().item() == 1.0


def test_sink_diagonal_and_last_block_are_kept_as_the_config_says():
    scores = torch.zeros(1, 1, 6, 6)
    scores[:, :, torch.arange(6), torch.arange(6).sub(1).clamp(min=0)] = 1.0  # all mass on the block before
    kept = {}
    for sink, last in itertools.product([True, False], repeat=2):
        config = RRConfig(16, 4, tau=0.9, sink=sink, dense_last_block=last)
        kept[sink, last] = select(scores, 96, 96, config=config).mask()[0, 0]
    assert kept[True, False][4].tolist() == [True, False, False, True, True, False]
    assert kept[False, False][4].tolist() == [False, False, False, True, True, False]
    assert kept[True, False][5].tolist() == [True, False, False, False, True, True]
    assert kept[True, True][5].all() and torch.equal(kept[True, True][:5], kept[True, False][:5])


def test_a_query_block_that_no_query_was_sampled_from_keeps_all_it_sees():
    config = RRConfig(16, 4, tau=0.1, dense_last_block=False)
    q, k, _ = make_qkv(50, 50, heads=4, kv_heads=4, batch=1)  # the last block has rows 48 and 49: heads 2, 3 see none
    counts = select(estimate(q, k, config=config), 50, 50, config=config).counts[0, :, -1]
    assert counts[2:].tolist() == [4, 4] and (counts[:2] < 4).all()


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("query_length", "key_length", "kv_start"), SHAPES, ids=SHAPE_IDS)
def test_attending_to_any_blocks_equals_dense_attention_under_their_mask(query_length, key_length, kv_start, causal):
    q, k, v = make_qkv(query_length, key_length)
    grid = BlockGrid.of(q, query_length, key_length, SMALL, causal=causal, kv_start=starts(kv_start))
    drawn = torch.rand(2, 6, grid.query_blocks, grid.key_blocks, generator=torch.Generator().manual_seed(0)) < 0.4
    kept = (drawn | grid.mandatory()[:, None]) & grid.visible()[:, None]
    selection = BlockSelection.from_mask(kept, grid)
    unlisted = torch.arange(grid.key_blocks) >= selection.counts[..., None]
    selection.indices[unlisted] = 0  # these mean nothing

    def allowed(b, h, query, key):
        first = max(key_length - query_length - (kv_start[b] if kv_start else 0), 0) // 16
        return kept[b, h, query // 16 - first, key // 16]

    expected = attention_by_rows(q, k, v, causal=causal, kv_start=kv_start, allowed=allowed)
    torch.testing.assert_close(attend(q, k, v, selection), expected, rtol=1e-9, atol=1e-12)


def with_means(k, kept, *, causal, kv_start, block_size):
    """Of each query block's keys or values: those of blocks that are left out replaced by their block's mean.

    `kept` [B, H, query_blocks, key_blocks]; returns [B, H, query_blocks, Lk, D]. As many keys as a block has, all
    equal to the mean, are what a mean with the weight of a block says.
    """
    _, heads, rows, _ = kept.shape
    group, replaced = heads // k.shape[1], k.repeat_interleave(heads // k.shape[1], dim=1)
    replaced = replaced[:, :, None].repeat(1, 1, rows, 1, 1)
    for b, h, row, block in (~kept).nonzero().tolist():
        first = (kv_start[b] if kv_start else 0) + block * block_size
        replaced[b, h, row, first : first + block_size] = k[b, h // group, first : first + block_size].mean(dim=0)
    return replaced


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("query_length", "key_length", "kv_start"), SHAPES, ids=SHAPE_IDS)
def test_pooling_what_is_left_out_equals_attention_to_as_many_mean_keys(query_length, key_length, kv_start, causal):
    q, k, v = make_qkv(query_length, key_length)
    grid = BlockGrid.of(q, query_length, key_length, SMALL, causal=causal, kv_start=starts(kv_start))
    drawn = torch.rand(2, 6, grid.query_blocks, grid.key_blocks, generator=torch.Generator().manual_seed(0)) < 0.4
    kept = (drawn | grid.mandatory()[:, None]) & grid.visible()[:, None]
    if not causal:  # the block that a sequence ends in may be ragged, and then nothing stands for it
        kept |= grid.visible()[:, None] & (
            torch.arange(grid.key_blocks) == (grid.length[:, None, None, None] - 1) // 16
        )
    options = {"causal": causal, "kv_start": kv_start, "block_size": 16}
    keys, values = with_means(k, kept, **options), with_means(v, kept, **options)
    expected = torch.zeros_like(q)
    for b, h, row in itertools.product(range(2), range(6), range(query_length)):
        start = kv_start[b] if kv_start else 0
        position, first = row + key_length - query_length, max(key_length - query_length - start, 0) // 16
        if position >= start:
            block = (position - start) // 16 - first
            seen = slice(start, position + 1 if causal else key_length)
            weights = (keys[b, h, block, seen] @ q[b, h, row] / math.sqrt(8)).softmax(0)
            expected[b, h, row] = weights @ values[b, h, block, seen]
    selection = BlockSelection.from_mask(kept, grid)
    out = attend(q, k, v, selection, skipped="pooled")
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(out, attend(q, k, v, selection)) != selection.left_out().any()


def test_nothing_of_a_blocks_future_stands_for_it():
    q, k, v = make_qkv(64, 64, batch=1)
    grid = BlockGrid.of(q, 64, 64, SMALL)
    kept = grid.mandatory()[:, None].repeat(1, 6, 1, 1)
    kept[:, :, 2, 2] = False  # its own: a caller's odd selection
    selection = BlockSelection.from_mask(kept, grid)
    out = attend(q, k, v, selection, skipped="pooled")
    k[:, :, 47], v[:, :, 47] = 9.0, 9.0
    assert torch.equal(attend(q, k, v, selection, skipped="pooled")[:, :, :47], out[:, :, :47])


def test_a_query_block_with_an_empty_list_returns_zeros():
    q, k, v = make_qkv(48, 48)
    grid = BlockGrid.of(q, 48, 48, SMALL)
    kept = grid.mandatory()[:, None].repeat(1, 6, 1, 1)
    kept[0, 3, 1] = False
    out = attend(q, k, v, BlockSelection.from_mask(kept, grid))
    assert (out[0, 3, 16:32] == 0).all() and (out != 0).sum() == out.numel() - 16 * 8


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


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("query_length", "key_length", "kv_start"), SHAPES, ids=SHAPE_IDS)
def test_the_totals_are_those_of_the_masks(query_length, key_length, kv_start, causal, sink):
    q = make_qkv(query_length, key_length)[0]
    config = RRConfig(16, 4, sink=sink)
    grid = BlockGrid.of(q, query_length, key_length, config, causal=causal, kv_start=starts(kv_start))
    visible, mandatory = grid.totals(3)
    assert (visible, mandatory) == (3 * grid.visible().sum(), 3 * grid.mandatory().sum())


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


def test_density_counts_kept_over_visible_blocks_with_and_without_the_mandatory():
    grid = BlockGrid.of(torch.empty(1, 1), 48, 80, SMALL)  # query blocks 2, 3, 4 over key blocks 0 to 4
    kept = torch.zeros(1, 1, 3, 5, dtype=torch.bool)
    kept[0, 0, 0, [0, 2]] = kept[0, 0, 1, [0, 1, 3]] = kept[0, 0, 2, [0, 1, 2, 3, 4]] = True
    selection = BlockSelection.from_mask(kept, grid)
    assert selection.indices.dtype == selection.counts.dtype == torch.int32
    assert selection.counts[0, 0].tolist() == [2, 3, 5]
    assert selection.indices[0, 0, 1, :3].tolist() == [0, 1, 3]
    assert torch.equal(selection.mask(), kept)
    assert selection.density().item() == pytest.approx(10 / 12)
    assert selection.density(mandatory=False).item() == pytest.approx(4 / 6)


def test_density_is_one_where_there_is_nothing_to_choose():
    q, k, v = make_qkv(30, 30)  # two blocks: the sink and the diagonal
    _, stats = rr_attention(q, k, v, config=SMALL, return_stats=True)
    assert stats.density().item() == stats.density(mandatory=False).item() == 1.0


def test_views_with_any_strides_give_the_same_result():
    q, k, v = make_qkv(70, 70)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert not strided[0].is_contiguous()
    assert torch.equal(rr_attention(*strided, config=SMALL), rr_attention(q, k, v, config=SMALL))


def test_scale_acts_on_the_scores_and_on_the_output():
    q, k, v = make_qkv(70, 70)
    scaled = rr_attention(q, k, v, config=SMALL, scale=0.1)
    torch.testing.assert_close(scaled, rr_attention(q * 0.1 * 8**0.5, k, v, config=SMALL), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scope", ["row", "heads"])
def test_estimating_and_selecting_read_nothing_back_from_the_device(scope):
    config = RRConfig(16, 4, scope=scope, min_tokens=0)
    with FakeTensorMode():  # tensors without data: whoever asks for a value fails
        q, k = torch.empty(2, 6, 70, 8), torch.empty(2, 2, 90, 8)
        kv_start = torch.empty(2, dtype=torch.long)
        scores = estimate(q, k, config=config, kv_start=kv_start)
        stats = select(scores, 70, 90, config=config, kv_start=kv_start).stats()
        assert stats.density(mandatory=False).shape == ()


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


def test_stages_refuse_what_was_made_for_other_lengths():
    q, k, v = make_qkv(70, 70)
    scores = estimate(q, k, config=SMALL)
    with pytest.raises(ValueError, match=r"scores must have 6 x 6 blocks"):
        select(scores, 90, 90, config=SMALL)
    selection = select(scores, 70, 70, config=SMALL)
    with pytest.raises(ValueError, match=r"selection must be for .*60"):
        attend(q[:, :, :60], k, v, selection)


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


def test_the_papers_rule_is_per_row_of_all_mass_and_drops_the_rest():
    assert RRConfig.paper() == RRConfig(scope="row", counted="all", skipped="dropped")
    assert RRConfig.paper(0.9).tau == 0.9


def test_an_unknown_way_to_skip_is_named():
    q, k, v = make_qkv(16, 16)
    selection = select(estimate(q, k, config=SMALL), 16, 16, config=SMALL)
    with pytest.raises(ValueError, match="skipped must be one of dropped, pooled, got 'kept'"):
        attend(q, k, v, selection, skipped="kept")


def test_importing_rrattention_imports_neither_transformers_nor_triton():
    code = "import sys, torch; had = set(sys.modules); import rrattention; print(*(set(sys.modules) - had))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = {name.partition(".")[0] for name in run.stdout.split()}
    assert "rrattention" in imported
    assert not imported & {"transformers", "triton"}


def test_public_names_are_sorted_and_exist():
    assert rrattention.__all__ == sorted(rrattention.__all__)
    assert all(hasattr(rrattention, name) for name in rrattention.__all__)
