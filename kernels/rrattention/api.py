"""The public calls: validate, choose a backend, chain estimate, select and attend."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, get_args

import torch
from torch import Tensor

from rrattention.blocks import BlockGrid, BlockSelection, BlockStats
from rrattention.config import RRConfig, Skipped
from rrattention.dense import dense_attention

BACKENDS = ("auto", "triton", "cpu", "reference")

_DEFAULT = RRConfig()


def rr_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: RRConfig = _DEFAULT,
    scale: float | None = None,
    causal: bool = True,
    kv_start: Tensor | None = None,
    layer: int = 0,
    backend: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, BlockStats]:
    """Attend to the key blocks that carry `config.tau` of the estimated attention mass, and to means of the others.

    q: [batch, heads, Lq, D], floating point. The last query is the last key's own: Lq < Lk means a cached prefix.
    k, v: [batch, kv_heads, Lk, D]; consecutive query heads share a key head, so kv_heads divides heads.
    scale: factor on the scores, 1 / sqrt(D) by default.
    kv_start: [batch] integers in [0, Lk], the first valid key of each sequence (left padding). A sequence is cut into
        blocks from there, so it selects what it would alone; rows before it come out as zeros.
    layer: whose row of `config.head_weights` is meant, where there are some.
    backend: one of `BACKENDS`; "auto" takes Triton on a CUDA GPU, "cpu" on a CPU, and the reference elsewhere.

    Returns [batch, heads, Lq, D], and with `return_stats` also the `BlockStats` of the call. With fewer than
    `config.min_tokens` keys the call is dense. Autocast changes no type in it. A sparse call has no gradients but by
    the reference: backward raises RuntimeError. ValueError names the argument that is wrong.
    """
    _check_query_key(q, k)
    _check_value(k, v)
    stages, scale = _stages(backend, q), _scale(q, scale)
    grid = BlockGrid.of(q, q.shape[2], k.shape[2], config, causal=causal, kv_start=kv_start)

    with _own_types(q):
        if not config.sparse(grid.key_length, q.device):
            out = dense_attention(q, k, v, scale=scale, causal=causal, kv_start=kv_start)
            stats = grid.dense_stats(q.shape[1])
        else:
            scores = stages.estimate(q, k, grid, stride=config.stride, scale=scale)
            selection = stages.select(scores, grid, config, _head_weights(config, layer, scores))
            out = stages.attend(q, k, v, selection, scale=scale, skipped=config.skipped)
            out, stats = _without_gradients(out, q, k, v), selection.stats()
    return (out, stats) if return_stats else out


def estimate(
    q: Tensor,
    k: Tensor,
    *,
    config: RRConfig = _DEFAULT,
    scale: float | None = None,
    causal: bool = True,
    kv_start: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return block scores, [batch, heads, query_blocks, key_blocks], for arguments as in `rr_attention`."""
    _check_query_key(q, k)
    grid = BlockGrid.of(q, q.shape[2], k.shape[2], config, causal=causal, kv_start=kv_start)
    with _own_types(q):
        return _stages(backend, q).estimate(q, k, grid, stride=config.stride, scale=_scale(q, scale))


def select(
    scores: Tensor,
    query_length: int,
    key_length: int,
    *,
    config: RRConfig = _DEFAULT,
    causal: bool = True,
    kv_start: Tensor | None = None,
    layer: int = 0,
    backend: str = "auto",
) -> BlockSelection:
    """Return the blocks to keep, given the `scores` that `estimate` made with the same lengths and options.

    `layer` is as in `rr_attention`.
    """
    if scores.dim() != 4:
        raise ValueError(f"scores must be [batch, heads, query_blocks, key_blocks], got {tuple(scores.shape)}")
    grid = BlockGrid.of(scores, query_length, key_length, config, causal=causal, kv_start=kv_start)
    if scores.shape[2:] != (grid.query_blocks, grid.key_blocks):
        raise ValueError(
            f"scores must have {grid.query_blocks} x {grid.key_blocks} blocks for lengths {query_length} and "
            f"{key_length}, got {tuple(scores.shape)}"
        )
    return _stages(backend, scores).select(scores, grid, config, _head_weights(config, layer, scores))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    *,
    scale: float | None = None,
    skipped: Skipped = "dropped",
    backend: str = "auto",
) -> Tensor:
    """Return exact attention over the blocks of `selection`, [batch, heads, Lq, D]; tensors as in `rr_attention`.

    With `skipped="pooled"` the mean key and value of each block that is visible and not kept take part, too: of each
    whole one, which in causal attention is every one.
    """
    _check_query_key(q, k)
    _check_value(k, v)
    needed = (*q.shape[:3], k.shape[2])
    made_for = (*selection.indices.shape[:2], selection.grid.query_length, selection.grid.key_length)
    if made_for != needed:
        raise ValueError(f"selection must be for batch, heads and lengths {needed}, got one for {made_for}")
    if skipped not in get_args(Skipped):
        raise ValueError(f"skipped must be one of {', '.join(get_args(Skipped))}, got {skipped!r}")
    with _own_types(q):
        out = _stages(backend, q).attend(q, k, v, selection, scale=_scale(q, scale), skipped=skipped)
    return _without_gradients(out, q, k, v)


def _stages(backend: str, like: Tensor) -> ModuleType:
    """Return the module that holds estimate, select and attend for `backend`; "auto" is the best for `like`."""
    if backend == "auto":
        backend = {"cuda": "triton", "cpu": "cpu"}.get(like.device.type, "reference")
        # torch calls AMD's GPUs "cuda", too: the launch table does not know them.
        if backend == "triton" and (like.dtype == torch.float64 or torch.version.hip or find_spec("triton") is None):
            backend = "reference"
    match backend:
        case "triton":
            from rrattention import triton

            return triton
        case "cpu":
            from rrattention import cpu

            return cpu
        case "reference":
            from rrattention import reference

            return reference
        case _:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def _own_types(like: Tensor) -> AbstractContextManager[Any]:
    """Keep autocast, which would lower what is float32 on purpose, out of the `with`."""
    kind = like.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def _without_gradients(out: Tensor, *inputs: Tensor) -> Tensor:
    """Let backward say that there is no way back from `out`, where it would else leave gradients out in silence."""
    if torch.is_grad_enabled() and not out.requires_grad and any(each.requires_grad for each in inputs):
        out = _NoGradients.apply(out, *inputs)
    return out


class _NoGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, *inputs: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError("block-sparse attention has no gradients: train with dense attention")


def _head_weights(config: RRConfig, layer: int, scores: Tensor) -> Tensor | None:
    """The weights of the heads in `layer`, [heads] in the dtype of `scores`, or None where all are alike."""
    if config.head_weights is None:
        return None
    heads = scores.shape[1]
    if not 0 <= layer < len(config.head_weights) or len(config.head_weights[layer]) != heads:
        has = f"{len(config.head_weights)} layers of {len(config.head_weights[0])} heads"
        raise ValueError(
            f"head_weights must be those of this model: they have {has}, and this is layer {layer}, {heads} heads"
        )
    return _on_device(config.head_weights[layer], scores.dtype, scores.device)


@lru_cache(maxsize=1024)
def _on_device(row: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copied once: a copy in each call would make a GPU wait for it."""
    return torch.tensor(row, dtype=dtype, device=device)


def _scale(q: Tensor, scale: float | None) -> float:
    return float(q.shape[-1] ** -0.5) if scale is None else scale


def _check_query_key(q: Tensor, k: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k)):
        if tensor.dim() != 4 or not torch.is_floating_point(tensor):
            raise ValueError(
                f"{name} must be floating point [batch, heads, length, head_dim], "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
    if (k.shape[0], k.shape[3], k.dtype, k.device) != (q.shape[0], q.shape[3], q.dtype, q.device):
        raise ValueError(f"k must have the batch, head_dim, dtype and device of q, {_kind(q)}, got {_kind(k)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k must have a number of heads that divides the {q.shape[1]} heads of q, got {k.shape[1]}")


def _check_value(k: Tensor, v: Tensor) -> None:
    if (v.shape, v.dtype, v.device) != (k.shape, k.dtype, k.device):
        raise ValueError(f"v must have the shape, dtype and device of k, {_kind(k)}, got {_kind(v)}")


def _kind(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
