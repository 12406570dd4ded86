"""The Triton kernel of select against the reference, with scores whose sums are exact, and against its definition."""

import pytest
import torch

from rrattention import BlockGrid, RRConfig, reference

pytest.importorskip("triton")
from rrattention.triton.select import select

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),  # 0 * infinity, which the interpreter tells of
]

# (Lq, Lk, kv_start of two sequences or None), for blocks of 16: whole, ragged, prefixed off the grid, padded, and a
# sequence that is nothing but padding.
SHAPES = [
    (96, 96, None),
    (1, 90, None),
    (30, 75, None),
    (70, 90, (0, 37)),
    (40, 75, (75, 50)),
]
FULL_SHAPES = [(30, 75, None), (40, 75, (75, 50))]
CASES = [(*shape, True) for shape in SHAPES] + [(*shape, False) for shape in FULL_SHAPES]
CASE_IDS = [f"Lq{lq}-Lk{lk}-start{start}-{'causal' if causal else 'full'}" for lq, lk, start, causal in CASES]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels run on the GPU here")
    return request.param


def make_grid(query_length, key_length, config, device, *, causal=True, kv_start=None, batch=1):
    like = torch.zeros(batch, 1, device=device)
    starts = None if kv_start is None else torch.tensor(kv_start, device=device)
    return BlockGrid.of(like, query_length, key_length, config, causal=causal, kv_start=starts)


def make_exact_scores(grid, heads, seed=0):
    """Small integers, many of them equal, whose rows sum to powers of two: no order of summing them rounds."""
    generator = torch.Generator().manual_seed(seed)
    shape = (grid.batch, heads, grid.query_blocks, grid.key_blocks)
    scores = torch.randint(0, 6, shape, generator=generator).float().to(grid.device) * grid.visible()[:, None]
    total = scores.sum(-1)
    scores[..., 0] += (2 ** total.clamp(min=1).log2().ceil() - total) * grid.visible()[:, None, :, 0]
    return scores


def make_random_scores(grid, heads, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (grid.batch, heads, grid.query_blocks, grid.key_blocks)
    return (3 * torch.randn(shape, generator=generator)).exp().to(grid.device) * grid.visible()[:, None]


def assert_selections_are_equal(selection, expected):
    assert selection.indices.dtype == selection.counts.dtype == torch.int32
    assert torch.equal(selection.counts, expected.counts)
    for index in (expected.counts > 0).nonzero().tolist():
        count = expected.counts[tuple(index)]
        assert torch.equal(selection.indices[tuple(index)][:count], expected.indices[tuple(index)][:count])


@pytest.mark.parametrize("counted", ["all", "choice"])
@pytest.mark.parametrize("scope", ["row", "heads"])
@pytest.mark.parametrize(("query_length", "key_length", "kv_start", "causal"), CASES, ids=CASE_IDS)
def test_lists_equal_the_reference_for_every_shape(query_length, key_length, kv_start, causal, scope, counted, device):
    config = RRConfig(block_size=16, stride=4, tau=0.75, scope=scope, counted=counted)
    batch = len(kv_start or [0])
    grid = make_grid(query_length, key_length, config, device, causal=causal, kv_start=kv_start, batch=batch)
    scores = make_exact_scores(grid, heads=2)
    assert_selections_are_equal(select(scores, grid, config), reference.select(scores, grid, config))


# A dense last block and tau 1 end in the same: no mass is enough.
@pytest.mark.parametrize("counted", ["all", "choice"])
@pytest.mark.parametrize("scope", ["row", "heads"])
@pytest.mark.parametrize("sink", [True, False], ids=["sink", "nosink"])
@pytest.mark.parametrize(
    ("tau", "last"),
    [(0.25, False), (0.9375, False), (0.9375, True), (1.0, False)],
    ids=["tau0.25", "tau0.9375", "denselast", "tau1"],
)
def test_lists_equal_the_reference_for_every_rule(tau, last, sink, scope, counted, device):
    config = RRConfig(16, 4, tau=tau, scope=scope, counted=counted, sink=sink, dense_last_block=last)
    grid = make_grid(32, 160, config, device)
    scores = make_exact_scores(grid, heads=3)
    assert_selections_are_equal(select(scores, grid, config), reference.select(scores, grid, config))


@pytest.mark.parametrize("counted", ["all", "choice"])
@pytest.mark.parametrize("scope", ["row", "heads"])
@pytest.mark.parametrize("weights", [(1, 1, 1), (0.5, 2, 1), (0.125, 0.25, 0.0625)], ids=["same", "differ", "small"])
def test_lists_equal_the_reference_where_heads_weigh_differently(weights, scope, counted, device):
    config = RRConfig(16, 4, tau=0.75, scope=scope, counted=counted)
    grid = make_grid(32, 160, config, device)
    scores, weights = make_exact_scores(grid, heads=3), torch.tensor(weights, device=device)
    assert_selections_are_equal(select(scores, grid, config, weights), reference.select(scores, grid, config, weights))


@pytest.mark.parametrize(
    ("scope", "lists"),
    [("row", [[0, 1, 3], [0, 1, 3]]), ("heads", [[0, 1, 2, 3], [3]])],  # the query block's own is always there
    ids=["row", "heads"],
)
def test_of_equal_blocks_the_first_are_kept(scope, lists, device):
    config = RRConfig(16, 4, tau=0.625, scope=scope, counted="all", sink=False, dense_last_block=False)
    grid = make_grid(16, 64, config, device)
    scores = torch.ones(1, 2, 1, 4, device=device)
    selection = select(scores, grid, config)
    assert selection.counts.flatten().tolist() == [len(each) for each in lists]
    assert [selection.indices[0, h, 0, : len(each)].tolist() for h, each in enumerate(lists)] == lists
    assert_selections_are_equal(selection, reference.select(scores, grid, config))


@pytest.mark.parametrize("scope", ["row", "heads"])
@pytest.mark.parametrize("key_blocks", [1000, 2100])
def test_lists_longer_than_a_tile_equal_the_reference(key_blocks, scope, device):
    config = RRConfig(16, 4, tau=0.75, scope=scope, dense_last_block=False)
    grid = make_grid(16, 16 * key_blocks, config, device)
    scores = make_exact_scores(grid, heads=3)
    assert_selections_are_equal(select(scores, grid, config), reference.select(scores, grid, config))


@pytest.mark.parametrize("counted", ["all", "choice"])
@pytest.mark.parametrize("scope", ["row", "heads"])
@pytest.mark.parametrize("tau", [0.3, 0.95, 0.999])
def test_no_block_can_be_spared_and_tau_is_carried(tau, scope, counted, device):
    config = RRConfig(16, 4, tau=tau, scope=scope, counted=counted, dense_last_block=False)
    grid = make_grid(32, 480, config, device)
    scores = make_random_scores(grid, heads=3)
    kept = select(scores, grid, config).mask()
    share = scores.double() / scores.double().sum(-1, keepdim=True)
    if counted == "choice":
        share = share.where(~grid.mandatory()[:, None], 0)
    optional = kept & ~grid.mandatory()[:, None]
    dims = (3,) if scope == "row" else (1, 3)
    carried, needed = (share * kept).sum(dims), tau * share.sum(dims)
    assert (kept | ~grid.mandatory()[:, None]).all() and not (kept & ~grid.visible()[:, None]).any()
    assert (carried >= needed * (1 - 1e-6)).all()
    least = share.where(optional, torch.inf).amin(dims)
    assert (carried - least < needed * (1 + 1e-6)).all()
    left = share.where(~kept, 0).amax(dims)
    assert (left <= least).all(), "a block was left that is larger than one that was kept"


@pytest.mark.parametrize("scope", ["row", "heads"])
def test_a_row_without_mass_keeps_all_it_sees(scope, device):
    config = RRConfig(16, 4, tau=0.5, scope=scope, dense_last_block=False)
    grid = make_grid(48, 96, config, device)
    scores = make_exact_scores(grid, heads=3)
    scores[:, 1] = 0
    selection = select(scores, grid, config)
    assert selection.counts[0, 1].tolist() == [4, 5, 6] and (selection.counts[0, 0] < 5).all()
    assert_selections_are_equal(selection, reference.select(scores, grid, config))


@pytest.mark.parametrize("scope", ["row", "heads"])
def test_scores_of_all_sizes_are_told_apart(scope, device):
    config = RRConfig(16, 4, tau=0.5, scope=scope, counted="all", sink=False, dense_last_block=False)
    grid = make_grid(16, 160, config, device)
    scores = torch.zeros(1, 1, 1, 10, device=device)
    for exponent in (-126, -60, 0, 60, 120):
        scores[..., :9] = 2.0**exponent * (1 + torch.arange(9, device=device) * 2.0**-21)  # near each other, ascending
        selection = select(scores, grid, config)
        assert selection.indices.flatten()[: selection.counts.item()].tolist() == [4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("scope", ["row", "heads"])
def test_scores_that_are_no_numbers_end_in_lists_that_can_be_read(scope, device):
    config = RRConfig(16, 4, tau=0.9, scope=scope)
    grid = make_grid(48, 96, config, device)
    scores = torch.full((1, 3, 3, 6), torch.nan, device=device)
    selection = select(scores, grid, config)
    assert selection.counts.amin() >= 1 and (selection.counts <= grid.visible().sum(-1)[:, None]).all()
    listed = torch.arange(6, device=device) < selection.counts[..., None]
    assert ((selection.indices >= 0) & (selection.indices < 6))[listed].all()


def test_scores_of_another_type_are_named():
    config = RRConfig(16, 4)
    grid = make_grid(16, 16, config, "cpu")
    with pytest.raises(ValueError, match=r"scores must be float32 for Triton, got torch\.float64"):
        select(torch.ones(1, 1, 1, 1, dtype=torch.float64), grid, config)


@pytest.mark.gpu
@pytest.mark.parametrize("scope", ["row", "heads"])
def test_selecting_never_waits_for_the_device(scope):
    config = RRConfig(16, 4, tau=0.75, scope=scope)
    grid = make_grid(70, 90, config, "cuda", kv_start=(0, 37), batch=2)
    scores = make_exact_scores(grid, heads=3)
    select(scores, grid, config)  # compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        select(scores, grid, config)
    finally:
        torch.cuda.set_sync_debug_mode("default")
