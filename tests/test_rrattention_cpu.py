"""The CPU backend against the reference, stage by stage and together, and what it promises besides: linear memory."""

import ast
import inspect
import itertools
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rrattention import (
    BlockGrid,
    BlockSelection,
    RRConfig,
    attend,
    cpu,
    dense_attention,
    estimate,
    reference,
    rr_attention,
    select,
)


@dataclass(frozen=True)
class Case:
    query_length: int
    key_length: int
    kv_start: tuple[int, ...] | None = None
    heads: int = 8
    kv_heads: int = 2
    dim: int = 64
    block: int = 64
    stride: int = 8

    def __str__(self):
        start = "" if self.kv_start is None else f"-start{self.kv_start[0]},{self.kv_start[1]}"
        lengths = f"{self.query_length}of{self.key_length}{start}"
        return f"{lengths}-H{self.heads}-KV{self.kv_heads}-D{self.dim}-block{self.block}-stride{self.stride}"

    def config(self, **options):
        return RRConfig(self.block, self.stride, min_tokens=0, **({"tau": 0.8} | options))

    def qkv(self, dtype=torch.float32):
        """Queries that look for some of the keys, so that the mass is uneven."""
        generator = torch.Generator().manual_seed(self.query_length * 1000 + self.key_length + self.dim)
        batch = 1 if self.kv_start is None else len(self.kv_start)
        shapes = [(self.heads, self.query_length), (self.kv_heads, self.key_length), (self.kv_heads, self.key_length)]
        q, k, v = (torch.randn(batch, *shape, self.dim, generator=generator, dtype=torch.float64) for shape in shapes)
        trend = torch.randn(batch, self.kv_heads, -(-self.key_length // 50), self.dim, generator=generator).double()
        k = (k + 2 * trend.repeat_interleave(50, dim=2)[:, :, : self.key_length]) / 2
        return (2 * q).to(dtype), k.to(dtype), v.to(dtype)

    def grid(self, config, causal):
        starts = None if self.kv_start is None else torch.tensor(self.kv_start)
        like = torch.empty(1 if starts is None else len(starts), 0)
        return BlockGrid.of(like, self.query_length, self.key_length, config, causal=causal, kv_start=starts)


CASES = [
    Case(1, 1),
    Case(63, 63, dim=80, block=128),
    Case(129, 129, heads=7, kv_heads=1, stride=16),
    Case(512, 512, heads=4, kv_heads=4, dim=128, block=128),
    Case(1000, 1000, stride=4),
    Case(1000, 1000, heads=14, kv_heads=2, dim=80, block=128, stride=16),
    Case(1, 300),
    Case(300, 620, dim=128),  # 320 = 5 whole blocks before
    Case(301, 777, heads=7, kv_heads=1),  # 476 is no multiple of the stride
    Case(400, 400, (0, 131), heads=4, kv_heads=4, stride=4),
    Case(260, 500, (3, 400), block=128, stride=16),
    Case(40, 200, (0, 200)),  # the second is nothing but padding
    Case(40, 200, (200, 200)),
]
SMALL = Case(330, 330)

causal_or_not = pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
all_cases = pytest.mark.parametrize("case", CASES, ids=str)
both_scopes = pytest.mark.parametrize("scope", ["row", "heads"])
both_counts = pytest.mark.parametrize("counted", ["all", "choice"])


@pytest.fixture(params=["large-steps", "small-steps"])
def dtype_of_steps(request, monkeypatch):
    """Float32 in the usual steps, of which short inputs need only one, and float64 in the smallest possible."""
    if request.param == "large-steps":
        return torch.float32
    smallest_steps(monkeypatch)
    return torch.float64


def smallest_steps(monkeypatch):
    monkeypatch.setattr(cpu, "SCORES_PER_THREAD", 1)
    monkeypatch.setattr(cpu, "LISTS_PER_STEP", 1)
    monkeypatch.setattr(cpu, "KEYS_PER_STEP", 1)


@cache
def scores_of(case, causal):
    q, k, _ = case.qkv()
    return reference.estimate(q, k, case.grid(case.config(), causal), stride=case.stride, scale=case.dim**-0.5)


def close(actual, expected, dtype=torch.float32):
    rtol, atol = {torch.float64: (1e-10, 1e-12), torch.float32: (2e-5, 5e-6)}[dtype]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same_blocks(actual, expected):
    assert torch.equal(actual.counts, expected.counts)
    assert torch.equal(actual.mask(), expected.mask())
    listed = torch.arange(actual.indices.shape[-1]) < actual.counts[..., None]
    assert torch.equal(actual.indices[listed], expected.indices[listed])
    assert actual.indices.dtype == actual.counts.dtype == torch.int32


@all_cases
@causal_or_not
def test_scores_equal_the_reference(case, causal, dtype_of_steps):
    dtype = dtype_of_steps
    q, k, _ = case.qkv(dtype)
    grid = case.grid(case.config(), causal)
    options = {"stride": case.stride, "scale": case.dim**-0.5}
    expected = reference.estimate(q, k, grid, **options)
    close(cpu.estimate(q, k, grid, **options), expected, dtype)
    assert cpu.estimate(q, k, grid, **options).dtype == dtype


@all_cases
@causal_or_not
@both_scopes
@both_counts
@pytest.mark.parametrize("tau", [0.3, 0.9, 1.0])
def test_the_same_scores_select_the_same_blocks(case, causal, scope, counted, tau):
    scores = scores_of(case, causal)
    for sink, last in [(True, True), (False, False)]:
        config = case.config(tau=tau, scope=scope, counted=counted, sink=sink, dense_last_block=last)
        grid = case.grid(config, causal)
        same_blocks(cpu.select(scores, grid, config), reference.select(scores, grid, config))
        weights = torch.tensor([2.0, 0.5, 1.0, 0.25], dtype=scores.dtype).repeat(scores.shape[1])[: scores.shape[1]]
        same_blocks(cpu.select(scores, grid, config, weights), reference.select(scores, grid, config, weights))


@both_scopes
def test_of_equally_heavy_blocks_the_same_ones_are_kept(scope):
    config = SMALL.config(tau=0.5, scope=scope)
    grid = SMALL.grid(config, True)
    scores = torch.ones(1, 3, grid.query_blocks, grid.key_blocks).tril()
    same_blocks(cpu.select(scores, grid, config), reference.select(scores, grid, config))


@both_scopes
def test_tau_one_keeps_even_the_blocks_without_mass(scope):
    config = SMALL.config(tau=1.0, scope=scope)
    grid = SMALL.grid(config, True)
    scores = torch.zeros(1, 3, grid.query_blocks, grid.key_blocks)
    scores[..., 0] = 8.0
    same_blocks(cpu.select(scores, grid, config), reference.select(scores, grid, config))


@all_cases
@causal_or_not
def test_attending_to_any_blocks_equals_the_reference(case, causal, dtype_of_steps):
    dtype = dtype_of_steps
    q, k, v = case.qkv(dtype)
    grid = case.grid(case.config(), causal)
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(len(q), case.heads, grid.query_blocks, grid.key_blocks, generator=generator) < 0.5
    kept = (kept | grid.mandatory()[:, None]) & grid.visible()[:, None]
    kept[:, 0, -1] = False  # an empty list: zeros
    kept[:, 1] &= ~grid.mandatory()  # lists that end before the diagonal
    selection = BlockSelection.from_mask(kept, grid)
    unlisted = torch.arange(grid.key_blocks) >= selection.counts[..., None]
    selection.indices[unlisted] = -7  # these mean nothing
    out = cpu.attend(q, k, v, selection, scale=0.05)
    selection.indices[unlisted] = 0
    close(out, reference.attend(q, k, v, selection, scale=0.05), dtype)


@pytest.mark.parametrize(("scope", "skipped"), [("row", "dropped"), ("heads", "pooled")])
@all_cases
@causal_or_not
def test_the_stages_together_equal_the_reference(case, causal, scope, skipped):
    q, k, v = case.qkv()
    config = case.config(scope=scope, counted="all", skipped=skipped)
    options = {"config": config, "causal": causal, "return_stats": True}
    options["kv_start"] = None if case.kv_start is None else torch.tensor(case.kv_start)
    out, stats = rr_attention(q, k, v, backend="cpu", **options)
    expected, expected_stats = rr_attention(q, k, v, backend="reference", **options)
    close(out, expected)
    assert stats.kept == expected_stats.kept
    if case.query_length == 1000:
        assert stats.density() < 0.9, "nearly everything was kept: then this says little"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_near_to_float64_as_the_reference_is(dtype):
    q, k, v = SMALL.qkv(dtype)
    config = SMALL.config()
    grid = SMALL.grid(config, True)
    selection = reference.select(reference.estimate(q, k, grid, stride=8, scale=0.125), grid, config)
    same_blocks(cpu.select(cpu.estimate(q, k, grid, stride=8, scale=0.125), grid, config), selection)
    exact = reference.attend(q.double(), k.double(), v.double(), selection, scale=0.125)
    errors = [
        (backend.attend(q, k, v, selection, scale=0.125).double() - exact).abs().max() for backend in (cpu, reference)
    ]
    assert cpu.attend(q, k, v, selection, scale=0.125).dtype == dtype
    assert errors[0] <= errors[1] * 1.01


@pytest.mark.parametrize("case", [SMALL, Case(260, 500, (3, 400))], ids=str)
def test_tensors_laid_out_as_transformers_does_give_the_same_result(case):
    q, k, v = case.qkv()
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]  # [B, L, H, D] in memory
    assert not views[0].is_contiguous()
    options = {"config": case.config(), "kv_start": case.kv_start and torch.tensor(case.kv_start), "backend": "cpu"}
    assert torch.equal(rr_attention(*views, **options), rr_attention(q, k, v, **options))


@both_scopes
@pytest.mark.parametrize("borders", [(0, 256, 512, 1000), (0, 64, 960, 1000)], ids=str)
def test_chunked_prefill_equals_one_call(scope, borders):
    case = Case(1000, 1000)
    q, k, v = case.qkv()
    config = case.config(scope=scope)
    out, stats = rr_attention(q, k, v, config=config, backend="cpu", return_stats=True)
    kept = 0
    for start, stop in itertools.pairwise(borders):
        part = case.config(scope=scope).for_chunk(total_tokens=1000, last=stop == 1000, device=q.device)
        chunk = q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop]
        result, chunk_stats = rr_attention(*chunk, config=part, backend="cpu", return_stats=True)
        close(result, out[:, :, start:stop])
        kept += chunk_stats.kept
    assert kept == stats.kept


@pytest.mark.parametrize("length", [1, 63, 129, 1000], ids=lambda length: f"T{length}")
def test_tau_one_equals_dense(length):
    case = Case(length, length, block=128)
    q, k, v = case.qkv()
    out = rr_attention(q, k, v, config=case.config(tau=1.0), backend="cpu")
    close(out, dense_attention(q, k, v, scale=case.dim**-0.5))


@pytest.mark.parametrize("row", [0, 1, 2], ids=["far-below-zero", "far-above-zero", "one-far-above"])
def test_scores_of_any_size_give_what_the_reference_gives(row, dtype_of_steps):
    q, k, v = SMALL.qkv(torch.float64)
    k += 5
    q[:, :, row::3] += [-50, 50, 0][row]  # scores of -2000 or 2000
    k[:, :, 200] *= [1, 1, 300][row]  # in the middle of a list
    options = {"config": SMALL.config(tau=0.99)}
    out = rr_attention(q, k, v, backend="cpu", **options)
    close(out, rr_attention(q, k, v, backend="reference", **options), torch.float64)


def test_inputs_that_track_gradients_are_taken():
    q, k, v = (x.requires_grad_() for x in SMALL.qkv())
    out = rr_attention(q, k, v, config=SMALL.config(), backend="cpu")
    assert out.isfinite().all()


def test_keys_that_outweigh_those_before_them_by_far_are_as_exact_as_others():
    q, k, v = SMALL.qkv()
    q[..., 0] = 10
    k[..., 0] = 0
    k[:, :, ::64, 0] = -800  # of each block the first key, which the others are compared with
    grid = SMALL.grid(SMALL.config(), True)
    everything = BlockSelection.from_mask(grid.visible()[:, None].expand(-1, 8, -1, -1), grid)
    exact = reference.attend(q.double(), k.double(), v.double(), everything, scale=0.125)
    for backend in (cpu, reference):
        assert (backend.attend(q, k, v, everything, scale=0.125) - exact).norm() <= 2e-6 * exact.norm()


def test_what_no_list_holds_reaches_nobody():
    q, k, v = SMALL.qkv()
    grid = SMALL.grid(SMALL.config(), True)
    kept = torch.eye(grid.query_blocks, dtype=torch.bool).expand(1, 8, -1, -1).clone()
    kept[:, :, 4, 1:4] = True  # beside it, shorter lists are filled up
    selection = BlockSelection.from_mask(kept, grid)
    expected = cpu.attend(q, k, v, selection, scale=0.125)[:, :, 64:]
    v[:, :, :64] = torch.inf
    assert torch.equal(cpu.attend(q, k, v, selection, scale=0.125)[:, :, 64:], expected)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(
    "mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["inference", "autocast"]
)
def test_modes_change_nothing(mode, number):
    q, k, v = SMALL.qkv()
    config = SMALL.config()

    def call(backend):
        q1, k1, v1 = (x.clone() for x in (q, k, v))
        scores = estimate(q1, k1, config=config, backend=backend)
        kept = select(scores, q.shape[2], k.shape[2], config=config, backend=backend)
        out = attend(q1, k1, v1, kept, backend=backend)
        dense = rr_attention(q1, k1, v1, config=replace(config, min_tokens=sys.maxsize), backend=backend)
        return scores, out, rr_attention(q1, k1, v1, config=config, backend=backend), dense

    with threads(number):
        for backend in ("cpu", "reference"):
            expected = call(backend)
            with mode():
                found = call(backend)
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_its_threads_start_no_others_and_leave_the_rest_of_the_program_its_own():
    def number():
        with ThreadPoolExecutor(1) as fresh:
            return torch.get_num_threads(), fresh.submit(torch.get_num_threads).result()

    before, inside = number(), set()
    cpu._in_threads(lambda: inside.add(torch.get_num_threads()), 3)
    assert inside == {1}
    assert number() == before


def test_any_number_of_threads_gives_the_same():
    case = Case(1000, 1000)
    q, k, v = case.qkv()
    outs = []
    for number in (1, 2, 3):
        with threads(number):
            outs.append(rr_attention(q, k, v, config=case.config(), backend="cpu"))
    close(outs[1], outs[0])
    close(outs[2], outs[0])


@pytest.mark.parametrize("number", [1, 3])
def test_what_goes_wrong_in_a_thread_reaches_the_caller_and_ends_the_others(number, monkeypatch):
    case = Case(1000, 1000)
    q, k, v = case.qkv()
    steps, failing = itertools.count(1), 3

    def add(self, *rest, **more):
        if (step := next(steps)) == failing:
            raise MemoryError("the third step's")
        if step > failing:
            time.sleep(0.01)
        real(self, *rest, **more)

    real = cpu._Softmax.add
    monkeypatch.setattr(cpu._Softmax, "add", add)
    with threads(number), pytest.raises(MemoryError, match="the third step's"):
        rr_attention(q, k, v, config=case.config(), backend="cpu")
    time.sleep(0.5)  # were there more to do, the other threads would have done it by now
    assert next(steps) <= failing + 4 * number  # groups that were begun: at most four steps each


def test_threads_that_cannot_be_started_leave_none_waiting(monkeypatch):
    before, started, start = torch.get_num_threads(), [], threading.Thread.start

    def stubborn(thread):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", stubborn)
        with pytest.raises(RuntimeError, match="can't start"):
            cpu._in_threads(lambda: None, 5)
    for thread in started:
        thread.join(10)
        assert not thread.is_alive()
    assert torch.get_num_threads() == before
    with ThreadPoolExecutor(1) as fresh:
        assert fresh.submit(torch.get_num_threads).result() == before


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_memory_grows_linearly_with_the_length(monkeypatch):
    smallest_steps(monkeypatch)
    largest = []
    for length in (1024, 2048, 4096):
        q, k, v = Case(length, length, heads=2, kv_heads=1, dim=16).qkv()
        with threads(1), LargestTensor() as mode:  # which sees what its own thread does
            rr_attention(q, k, v, config=RRConfig(64, 8, min_tokens=0), backend="cpu")
        largest.append(mode.elements)
    assert largest[1] <= 2 * largest[0] and largest[2] <= 2 * largest[1]


def test_the_backend_does_not_import_the_reference():
    tree = ast.parse(inspect.getsource(cpu))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules and "rrattention.reference" not in modules
