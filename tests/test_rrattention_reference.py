"""The three stages of RRAttention against loops and brute force, in float64, and against dense attention."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from reference import SHAPE_IDS, SHAPES, SMALL, attend, attention_by_rows, estimate, make_qkv, select, starts
from torch._subclasses.fake_tensor import FakeTensorMode

from rrattention import BlockGrid, BlockSelection, RRConfig


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


@pytest.mark.parametrize("counted", ["all", "choice"])
@pytest.mark.parametrize("scope", ["row", "heads"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 2.0), (0.05, 0.1)])
def test_heads_leave_out_as_much_as_tau_says_by_their_weights(scope, counted, weights):
    config = RRConfig(16, 4, 0.6, scope=scope, counted=counted, dense_last_block=False, head_weights=[(9, 9), weights])
    q, k, _ = make_qkv(160, 160, heads=2, kv_heads=1, batch=1)
    scores = estimate(q, k, config=config)[0]
    kept = select(scores[None], 160, 160, config=config, layer=1).mask()[0]
    for m in range(10):
        mass = (scores[:, m] / scores[:, m].sum(-1, keepdim=True)).tolist()
        for heads in [[0], [1]] if scope == "row" else [[0, 1]]:
            optional = [(head, n) for head in heads for n in range(1, m)]
            forced = [(head, n) for head in heads for n in {0, m}]
            counts = optional + (forced if counted == "all" else [])
            allowed = 0.4 * sum(mass[head][n] for head, n in counts)
            lightest = sorted(optional, key=lambda block: weights[block[0]] * mass[block[0]][block[1]])
            left_out = 0.0
            for head, n in lightest:
                left_out += weights[head] * mass[head][n]
                assert kept[head, m, n] == (left_out > allowed * (1 + 1e-12))
            assert all(kept[head, m, n] for head, n in forced)


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


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("query_length", "key_length", "kv_start"), SHAPES, ids=SHAPE_IDS)
def test_the_totals_are_those_of_the_masks(query_length, key_length, kv_start, causal, sink):
    q = make_qkv(query_length, key_length)[0]
    config = RRConfig(16, 4, sink=sink)
    grid = BlockGrid.of(q, query_length, key_length, config, causal=causal, kv_start=starts(kv_start))
    visible, mandatory = grid.totals(3)
    assert (visible, mandatory) == (3 * grid.visible().sum(), 3 * grid.mandatory().sum())


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


@pytest.mark.parametrize("scope", ["row", "heads"])
def test_estimating_and_selecting_read_nothing_back_from_the_device(scope):
    config = RRConfig(16, 4, scope=scope, min_tokens=0)
    with FakeTensorMode():  # tensors without data: whoever asks for a value fails
        q, k = torch.empty(2, 6, 70, 8), torch.empty(2, 2, 90, 8)
        kv_start = torch.empty(2, dtype=torch.long)
        scores = estimate(q, k, config=config, kv_start=kv_start)
        stats = select(scores, 70, 90, config=config, kv_start=kv_start).stats()
        assert stats.density(mandatory=False).shape == ()


def test_stages_refuse_what_was_made_for_other_lengths():
    q, k, v = make_qkv(70, 70)
    scores = estimate(q, k, config=SMALL)
    with pytest.raises(ValueError, match=r"scores must have 6 x 6 blocks"):
        select(scores, 90, 90, config=SMALL)
    selection = select(scores, 70, 70, config=SMALL)
    with pytest.raises(ValueError, match=r"selection must be for .*60"):
        attend(q[:, :, :60], k, v, selection)


def test_an_unknown_way_to_skip_is_named():
    q, k, v = make_qkv(16, 16)
    selection = select(estimate(q, k, config=SMALL), 16, 16, config=SMALL)
    with pytest.raises(ValueError, match="skipped must be one of dropped, pooled, got 'kept'"):
        attend(q, k, v, selection, skipped="kept")
