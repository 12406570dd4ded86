"""The Triton kernels of pool and estimate against the reference in float64."""

from functools import cache
from importlib import import_module

import pytest
import torch

from rrattention import BlockGrid, RRConfig, reference

pytest.importorskip("triton")
from rrattention.triton.estimate import estimate
from rrattention.triton.launch import Launch
from rrattention.triton.pool import pool

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),  # log2 0, which the interpreter tells of
]

# (Lq, Lk, kv_start of two sequences or None), for blocks of 64: whole, ragged, single, prefixed on and off the grid,
# padded, both, and a sequence that is nothing but padding.
SHAPES = [
    (192, 192, None),
    (205, 205, None),
    (1, 1, None),
    (1, 200, None),
    (63, 129, None),
    (130, 258, None),
    (100, 237, None),
    (200, 200, (0, 77)),
    (140, 236, (20, 136)),
    (65, 65, (65, 0)),
]
FULL_SHAPES = [(205, 205, None), (100, 237, None), (140, 236, (20, 136)), (65, 65, (65, 0))]
CASES = [(*shape, True) for shape in SHAPES] + [(*shape, False) for shape in FULL_SHAPES]
CASE_IDS = [f"Lq{lq}-Lk{lk}-start{start}-{'causal' if causal else 'full'}" for lq, lk, start, causal in CASES]


@pytest.mark.parametrize("kernel", ["attend", "estimate", "means", "segments"])
def test_narrow_heads_fill_the_least_tile_that_can_be_multiplied(kernel):
    made = import_module(f"rrattention.triton.{kernel}").specialization(8, torch.float16, 128, 8, Launch(64, 64, 4, 2))
    assert made.constants["TILE_D"] == 16


def make_qk(query_length, key_length, target, *, heads=4, kv_heads=2, dim=64, kv_start=None):
    """Random tensors laid out as Hugging Face hands them over: [B, L, H, D] seen as [B, H, L, D]."""
    device, dtype = target
    generator = torch.Generator().manual_seed(query_length * 1000 + key_length + dim)
    shapes = (2, query_length, heads, dim), (2, key_length, kv_heads, dim)
    q, k = (torch.randn(shape, generator=generator).to(device, dtype).transpose(1, 2) for shape in shapes)
    for b, start in enumerate(kv_start or ()):
        k[b, :, :start] = torch.nan  # whatever lies in the padding
    return q * 2, k


def make_grid(q, k, *, block_size=64, stride=8, causal=True, kv_start=None):
    starts = None if kv_start is None else torch.tensor(kv_start, device=q.device)
    config = RRConfig(block_size=block_size, stride=stride)
    return BlockGrid.of(q, q.shape[2], k.shape[2], config, causal=causal, kv_start=starts)


@cache
def eager_error(device, dtype, dim):
    """How far scores are from float64 where mean keys and logits are rounded to `dtype`, as eager PyTorch would."""
    if dtype == torch.float32:  # in TF32 on a GPU, which cuts to the bits that float16 rounds to: twice the error
        return 1e-5 if device == "cpu" else 2 * eager_error(device, torch.float16, dim)
    q, k = make_qk(256, 256, (device, dtype), heads=1, kv_heads=1, dim=dim)
    grid = make_grid(q, k)
    samples, pooled = q[:, :, ::8], k.unflatten(2, (32, 8)).mean(dim=3)
    strides = torch.arange(32, device=device)
    logits = (samples @ pooled.mT * dim**-0.5).masked_fill(strides > strides[:, None], -torch.inf)
    scores = logits.softmax(-1).float().unflatten(3, (4, 8)).sum(4).unflatten(2, (4, 8)).sum(3)
    exact = reference.estimate(q.double(), k.double(), grid, stride=8, scale=dim**-0.5)
    return (scores - exact).abs().max().item()


def assert_scores_equal_the_reference(q, k, grid, *, stride=8):
    scale = q.shape[3] ** -0.5
    scores = estimate(q, k, grid, stride=stride, scale=scale)
    exact = reference.estimate(q.double(), k.double(), grid, stride=stride, scale=scale)
    assert scores.dtype == torch.float32
    tolerance = 2 * eager_error(q.device.type, q.dtype, q.shape[3])  # of one head: the worst of many is worse
    torch.testing.assert_close(scores.double(), exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("stride", "dim"), [(4, 64), (8, 80), (8, 128), (16, 256)])
@pytest.mark.parametrize(("length", "kv_start"), [(300, None), (1, None), (150, (7, 150))], ids=str)
def test_mean_keys_equal_those_of_a_loop_over_strides(length, kv_start, stride, dim, kernel_target):
    q, k = make_qk(1, length, kernel_target, dim=dim, kv_start=kv_start)
    pooled = pool(k, make_grid(q, k, stride=stride, kv_start=kv_start), stride=stride)
    assert pooled.shape == (2, 2, -(-length // stride), dim) and pooled.dtype == k.dtype
    expected = torch.zeros_like(pooled, dtype=torch.float64)
    for b, start in enumerate(kv_start or (0, 0)):
        for j, first in enumerate(range(start, length, stride)):
            expected[b, :, j] = k[b, :, first : first + stride].double().sum(1) / stride
    half_a_unit = torch.finfo(k.dtype).eps / 2 * 1.01
    torch.testing.assert_close(pooled.double(), expected, rtol=half_a_unit, atol=1e-6)


@pytest.mark.parametrize(("query_length", "key_length", "kv_start", "causal"), CASES, ids=CASE_IDS)
def test_scores_equal_the_reference(query_length, key_length, kv_start, causal, kernel_target):
    q, k = make_qk(query_length, key_length, kernel_target, kv_start=kv_start)
    k = k.nan_to_num(nan=100.0)  # the reference gathers before it masks
    assert_scores_equal_the_reference(q, k, make_grid(q, k, causal=causal, kv_start=kv_start))


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256], ids=lambda dim: f"D{dim}")
def test_scores_equal_the_reference_for_each_head_dim(dim, kernel_target):
    q, k = make_qk(100, 233, kernel_target, heads=3, kv_heads=1, dim=dim)
    assert_scores_equal_the_reference(q, k, make_grid(q, k))


@pytest.mark.parametrize("stride", [4, 8, 16], ids=lambda stride: f"S{stride}")
@pytest.mark.parametrize("block_size", [64, 128], ids=lambda block_size: f"B{block_size}")
def test_scores_equal_the_reference_for_each_block_size_and_stride(block_size, stride, kernel_target):
    q, k = make_qk(140, 557, kernel_target, heads=3, kv_heads=1)
    assert_scores_equal_the_reference(q, k, make_grid(q, k, block_size=block_size, stride=stride), stride=stride)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (7, 1), (14, 2), (40, 1)], ids=str)
def test_scores_equal_the_reference_for_any_number_of_heads_to_a_key_head(heads, kv_heads, kernel_target):
    q, k = make_qk(100, 100, kernel_target, heads=heads, kv_heads=kv_heads)
    assert_scores_equal_the_reference(q, k, make_grid(q, k))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_scores_equal_the_reference_over_many_tiles_of_keys(causal, kernel_target):
    q, k = make_qk(129, 1000, kernel_target, heads=2, kv_heads=1)
    assert_scores_equal_the_reference(q, k, make_grid(q, k, stride=4, causal=causal), stride=4)


def test_every_sampled_query_gives_a_mass_of_one(kernel_target):
    q, k = make_qk(256, 256, kernel_target)
    scores = estimate(q * 20, k, make_grid(q, k), stride=8, scale=0.125)  # so sharp that other sums would overflow
    torch.testing.assert_close(scores.sum(-1), torch.full_like(scores[..., 0], 8.0), rtol=1e-4, atol=0)


def test_nothing_in_the_padding_reaches_the_scores(kernel_target):
    q, k = make_qk(200, 260, kernel_target, kv_start=(100, 7))
    grid = make_grid(q, k, kv_start=(100, 7))
    scores = estimate(q, k, grid, stride=8, scale=0.125)
    assert torch.equal(scores, estimate(q, k.nan_to_num(nan=3.0), grid, stride=8, scale=0.125))
    assert scores.isfinite().all()


def test_views_with_any_strides_give_the_same_scores(kernel_target):
    q, k = make_qk(130, 130, kernel_target)
    grid = make_grid(q, k)
    expected = estimate(q.contiguous(), k.contiguous(), grid, stride=8, scale=0.125)
    assert torch.equal(estimate(q, k, grid, stride=8, scale=0.125), expected)
    columns_first = [x.mT.contiguous().mT for x in (q, k)]
    assert columns_first[0].stride(3) != 1
    assert torch.equal(estimate(*columns_first, grid, stride=8, scale=0.125), expected)
    starts = torch.zeros(1, dtype=torch.int32, device=q.device).expand(2)
    shared = BlockGrid.of(q, 130, 130, RRConfig(64), kv_start=starts)
    assert shared.query_blocks == grid.query_blocks
    assert torch.equal(estimate(q, k, shared, stride=8, scale=0.125), expected)


def test_a_negative_scale_turns_the_queries_round(kernel_target):
    q, k = make_qk(130, 130, kernel_target)
    grid = make_grid(q, k)
    assert torch.equal(estimate(q, k, grid, stride=8, scale=-0.125), estimate(-q, k, grid, stride=8, scale=0.125))


@pytest.mark.parametrize(
    ("dtype", "block_size", "stride", "words"),
    [
        (torch.float64, 64, 8, "float16, bfloat16 or float32, got torch.float64"),
        (torch.float32, 48, 16, "block_size / stride must be a power of two for Triton, got 48 / 16"),
    ],
    ids=["float64", "block48"],
)
def test_what_the_kernels_cannot_take_is_named(dtype, block_size, stride, words):
    q, k = make_qk(64, 64, ("cpu", dtype))
    with pytest.raises(ValueError, match=words):
        estimate(q, k, make_grid(q, k, block_size=block_size, stride=stride), stride=stride, scale=0.125)


def test_a_head_dim_past_the_largest_is_named():
    q, k = make_qk(64, 64, ("cpu", torch.float16), dim=320)
    with pytest.raises(ValueError, match="head dim 320"):
        estimate(q, k, make_grid(q, k), stride=8, scale=0.125)


@pytest.mark.gpu
def test_offsets_past_two_to_the_31_are_found():
    far = torch.zeros(2**31 + 300 * 64, dtype=torch.float16, device="cuda")
    spread = [far.as_strided((1, 2, 300, 64), (0, 2**31, 64, 1)), far.as_strided((1, 2, 300, 64), (0, 2**31, 64, 1))]
    near, _ = make_qk(300, 300, ("cuda", torch.float16), heads=2)
    spread[0].copy_(near[:1])
    scores = estimate(*spread, make_grid(*spread), stride=8, scale=0.125)
    near = near[:1].contiguous()
    assert torch.equal(scores, estimate(near, near, make_grid(near, near), stride=8, scale=0.125))


@pytest.mark.gpu
def test_estimating_never_waits_for_the_device():
    q, k = make_qk(300, 300, ("cuda", torch.float16))
    grid = make_grid(q, k, kv_start=(0, 70))
    estimate(q, k, grid, stride=8, scale=0.125)  # compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        estimate(q, k, grid, stride=8, scale=0.125)
    finally:
        torch.cuda.set_sync_debug_mode("default")
