"""The Gluon kernel for Hopper GPUs: what the compiler makes of it, which calls reach it, and what it computes."""

import importlib
from importlib.metadata import version

import pytest
import torch
from compiling import compiled as compile_once
from test_triton_attend import assert_as_exact_as_eager, draw_selection, make_qkv, token_mask  # skips without Triton

from rrattention import attend
from rrattention.triton import launch

pytestmark = pytest.mark.usefixtures("poisoned_memory")
dispatch = importlib.import_module("rrattention.triton.attend")  # the name is the function's in the package
needs_gluon = pytest.mark.skipif(
    not version("triton").startswith(launch.GLUON_VERSIONS),
    reason="needs the Gluon of Triton 3.6 to 3.9",
)


@pytest.fixture
def hopper(monkeypatch):
    """The kernel's module, as if this were a GPU that it is for."""
    module = importlib.import_module("rrattention.triton.hopper")
    monkeypatch.setattr(dispatch, "takes_gluon", lambda like: True)
    return module


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype).removeprefix("torch."))
def on_hopper(request, monkeypatch):
    """A device and a dtype that the kernel is for; at least one call has to reach it."""
    if not launch.takes_gluon(torch.empty(0, device="cuda")):
        pytest.skip("needs a Hopper GPU")
    module, calls = importlib.import_module("rrattention.triton.hopper"), []
    kernel = module.attend
    monkeypatch.setattr(module, "attend", lambda *args, **kwargs: calls.append(kernel(*args, **kwargs)))
    yield "cuda", request.param
    assert calls


@needs_gluon
def test_the_compiler_gives_it_matrix_instructions_and_spills_nothing():
    compiled = [case for case in compile_once() if case["kernel"] == "hopper"]
    expected = {("fp16", 64), ("fp16", 128), ("bf16", 64), ("bf16", 128)}
    assert {(case["dtype"], case["head_dim"]) for case in compiled} == expected
    assert {case["arch"] for case in compiled} == {90}
    assert {case["mma"] for case in compiled} == {"HGMMA"}
    assert {case["spills"] for case in compiled} == {0}
    assert all(case["shared"] <= case["shared_limit"] for case in compiled)


def changed(**changes):
    """The arguments of a call that the kernel covers, with some of them changed."""
    options = {"dtype": torch.float16, "dim": 64, "block_size": 128, "causal": True, "kv_start": None} | changes
    q, k, v = make_qkv(200, 200, ("cpu", options["dtype"]), dim=options["dim"], batch=1)
    selection = draw_selection(q, k, options["block_size"], causal=options["causal"], kv_start=options["kv_start"])
    return q, k, v, selection


def gapped(x):
    """The same values in rows that do not begin at multiples of 16 bytes."""
    return torch.cat([x, x[..., :1]], dim=3)[..., :-1]


@needs_gluon
@pytest.mark.parametrize("dim", [40, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_calls_that_it_is_for(dtype, dim, hopper):
    q, k, v, selection = changed(dtype=dtype, dim=dim)
    assert hopper.covers(q, k, v, selection.grid)
    cache = k.new_empty(1, k.shape[1], 500, dim)[:, :, :200]
    assert hopper.covers(q, cache.copy_(k), v, selection.grid)


@needs_gluon
@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": torch.float32},
        {"dim": 32},
        {"dim": 68},
        {"dim": 256},
        {"block_size": 64},
        {"causal": False},
        {"kv_start": (3,)},
    ],
    ids=str,
)
def test_other_calls_go_to_the_triton_kernel(changes, hopper, monkeypatch):
    monkeypatch.setattr(hopper, "attend", None)
    q, k, v, selection = changed(**changes)
    out = attend(q, k, v, selection, backend="triton")
    assert_as_exact_as_eager(out, q, k, v, token_mask(selection))


@needs_gluon
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("view", [gapped, lambda x: x[:, :, :1].expand_as(x)], ids=["gapped", "expanded"])
def test_tensors_that_the_copy_engine_does_not_take_go_to_the_triton_kernel(view, which, hopper):
    *tensors, selection = changed()
    tensors[which] = view(tensors[which])
    assert not hopper.covers(*tensors, selection.grid)


@needs_gluon
def test_a_call_that_it_is_for_reaches_it_with_a_scale_that_is_not_negative(hopper, monkeypatch):
    reached = []
    monkeypatch.setattr(hopper, "attend", lambda *args, scale: reached.append((*args, scale)))
    q, k, v, selection = changed()
    out = attend(q, k, v, selection, scale=-2.0, backend="triton")
    [(query, key, value, target, log_sums, listed, scale)] = reached
    assert torch.equal(query, -q) and key is k and value is v and listed is selection
    assert target is out and log_sums is None and scale == 2.0


def test_other_devices_take_the_triton_kernel():
    assert not launch.takes_gluon(torch.empty(1))


SHAPES = [(256, 256), (1, 1), (1, 300), (1000, 1000), (130, 322), (500, 1290), (128, 1000)]


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [40, 64, 96, 128], ids=lambda dim: f"D{dim}")
@pytest.mark.parametrize(("query_length", "key_length"), SHAPES, ids=str)
def test_attending_equals_attention_under_the_mask_of_the_blocks(query_length, key_length, dim, on_hopper):
    q, k, v = make_qkv(query_length, key_length, on_hopper, heads=6, kv_heads=2, dim=dim, batch=2)
    selection = draw_selection(q, k, 128)
    out = attend(q, k, v, selection, backend="triton")
    assert out.stride() == q.stride()
    assert_as_exact_as_eager(out, q, k, v, token_mask(selection))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 80], ids=lambda dim: f"D{dim}")
@pytest.mark.parametrize(("query_length", "key_length"), [(333, 333), (333, 700)], ids=str)
def test_what_lies_around_the_tensors_is_neither_read_nor_written(
    query_length, key_length, dim, on_hopper, monkeypatch
):
    def surrounded(x):
        batch, heads, length, dim = x.shape
        buffer = x.new_full((batch + 2, length + 300, heads + 2, dim + 64), torch.nan)
        return buffer[1:-1, 150:-150, 1:-1, 32:-32].transpose(1, 2).copy_(x)

    q, k, v = (surrounded(x) for x in make_qkv(query_length, key_length, on_hopper, dim=dim))
    selection = draw_selection(q, k, 128)
    expected = attend(q, k, v, selection, backend="triton")
    assert_as_exact_as_eager(expected, q, k, v, token_mask(selection))
    out = surrounded(torch.zeros_like(q))
    monkeypatch.setattr(torch, "empty_like", lambda like: out)
    assert torch.equal(attend(q, k, v, selection, backend="triton"), expected)
    around = out._base if out._base is not None else out
    assert around.isfinite().sum() == out.numel()


@pytest.mark.gpu
def test_empty_lists_and_lists_that_end_before_the_diagonal(on_hopper):
    q, k, v = make_qkv(1000, 1000, on_hopper)
    selection = draw_selection(q, k, 128)
    selection.counts[:, 0, 1] = 0
    selection.counts[:, :, 4:] -= 1
    out = attend(q, k, v, selection, backend="triton")
    assert (out[0, 0, 128:256] == 0).all()
    assert_as_exact_as_eager(out, q, k, v, token_mask(selection))


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [0.3, 0.0, -5.0])
def test_scale_acts_on_the_scores(scale, on_hopper):
    q, k, v = make_qkv(400, 400, on_hopper)
    selection = draw_selection(q, k, 128)
    out = attend(q, k, v, selection, scale=scale, backend="triton")
    assert_as_exact_as_eager(out, q, k, v, token_mask(selection), scale)


@pytest.mark.gpu
def test_lists_longer_than_the_ring_and_more_programs_than_processors_give_the_same_every_time(on_hopper):
    q, k, v = make_qkv(8192, 8192, on_hopper, heads=28, kv_heads=4, dim=128)
    selection = draw_selection(q, k, 128, share=0.3)
    out = attend(q, k, v, selection, backend="triton")
    assert all(torch.equal(attend(q, k, v, selection, backend="triton"), out) for _ in range(10))
    exact = attend(q.float(), k.float(), v.float(), selection, backend="triton")  # the Triton kernel's
    assert (out - exact).norm() / exact.norm() < 4 * torch.finfo(q.dtype).eps
