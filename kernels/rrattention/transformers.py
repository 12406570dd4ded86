"""RRAttention as `attn_implementation="rrattention"` for Hugging Face decoders.

    enable(model, RRConfig(tau=0.95))
    with record() as prefill:
        model.generate(**inputs)
    prefill.density()

Prefill goes sparse: causal, with or without padding on the left. Everything else is exact: decoding and other calls
with less than a block of queries, and every mask that is more than that (sliding windows, packed sequences, padding on
the right, static caches, masks of your own). What no exact path honours either (soft-capped scores, sinks) raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from rrattention.api import rr_attention
from rrattention.blocks import BlockGrid, BlockStats
from rrattention.config import RRConfig
from rrattention.dense import dense_attention

__all__ = [
    "NAME",
    "Attention",
    "PrefillRecord",
    "attending_fully",
    "chunk",
    "enable",
    "exact",
    "observe",
    "record",
    "register",
    "settings",
]

NAME = "rrattention"

Attention = Literal["rr", "full"]
Observer = Callable[[int, Tensor, Tensor, Tensor, float], Tensor | None]
T = TypeVar("T")

# What some models hand to their attention and softmax attention over blocks does not compute.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache")


def register() -> None:
    """Make the name known to transformers, together with its masks: a name without those would lose the padding."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def enable(model: PreTrainedModel, config: RRConfig | None = None, attention: Attention = "rr") -> None:
    """Let the text part of `model` attend with RRAttention under `config`; other parts, such as vision, stay as is.

    `attention="full"` runs the same code with dense attention, so that `record` and `observe` work in both modes. The
    settings are kept in the text part's config: they are saved and copied with it, and shared by models that share it.
    Call it again to change them, or in a model that was saved and loaded, to which transformers gives an implementation
    of its own; and `model.set_attn_implementation` to leave. ValueError: `attention` is neither, `model` has no text
    decoder that takes an attention implementation, or the weights of heads are another model's.
    """
    if attention not in get_args(Attention):
        raise ValueError(f"attention must be one of {', '.join(get_args(Attention))}, got {attention!r}")
    config = config or RRConfig()
    text_config = model.config.get_text_config(decoder=True)
    if not hasattr(text_config, "num_attention_heads"):
        raise ValueError(f"model must have a text decoder with attention heads, got {type(model)}")
    if weights := config.head_weights:
        size = text_config.num_hidden_layers, text_config.num_attention_heads
        if (len(weights), len(weights[0])) != size:
            raise ValueError(
                f"head_weights must be those of this model, {size[0]} layers of {size[1]} heads, "
                f"got {len(weights)} layers of {len(weights[0])}"
            )
    register()
    _set_implementation(model, NAME)
    if text_config._attn_implementation != NAME:
        raise ValueError(f"model must have a text decoder that takes an attention implementation, got {type(model)}")
    text_config.rrattention = {"attention": attention, "config": config.to_dict()}


@contextmanager
def attending_fully(model: PreTrainedModel, config: RRConfig) -> Iterator[None]:
    """Let `model` attend as `enable` with "full" has it inside the `with`, and as before after it."""
    text_config = model.config.get_text_config(decoder=True)
    before = text_config._attn_implementation, getattr(text_config, NAME, None)
    enable(model, config, attention="full")
    try:
        yield
    finally:
        _set_implementation(model, before[0])
        if before[1] is None:
            del text_config.rrattention
        else:
            text_config.rrattention = before[1]


def _set_implementation(model: PreTrainedModel, name: str) -> None:
    """Set that of the text part alone."""
    text_config = model.config.get_text_config(decoder=True)
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part.config is text_config:
            part.set_attn_implementation(name)
            break


def settings(model: PreTrainedModel) -> tuple[RRConfig, Attention]:
    """Return what `enable` set for `model`, or the defaults."""
    return _stored(model.config.get_text_config(decoder=True))


class PrefillRecord:
    """Blocks kept and visible in each layer, over all prefill calls made inside `record()`.

    A call with more than one query is prefill. Dense calls count with every visible block kept. Reading synchronises
    the device once; recording never does.
    """

    def __init__(self) -> None:
        self._stats: dict[int, BlockStats] = {}

    def add(self, layer: int, stats: BlockStats) -> None:
        self._stats[layer] = self._stats[layer] + stats if layer in self._stats else stats

    def density(self, *, mandatory: bool = True) -> float:
        """Kept over visible blocks, over layers and heads; NaN if nothing ran. See `BlockStats.density`."""
        counts = self._counts().sum(dim=0)
        return BlockStats(*counts).density(mandatory=mandatory).item() if self._stats else float("nan")

    @property
    def layers(self) -> dict[int, float]:
        """Density of each layer, by layer index."""
        densities = BlockStats(*self._counts().unbind(dim=1)).density()
        return dict(zip(sorted(self._stats), densities.tolist(), strict=True))

    def _counts(self) -> Tensor:
        """Kept, visible and mandatory blocks, [layers, 3] on the CPU; layers may live on several devices."""
        rows = [torch.stack([s.kept, s.visible, s.mandatory]) for _, s in sorted(self._stats.items())]
        return torch.stack([row.to(rows[0].device) for row in rows]).cpu() if rows else torch.zeros(0, 3)


_RECORDS: ContextVar[tuple[PrefillRecord, ...]] = ContextVar("rrattention_records", default=())
_OBSERVERS: ContextVar[tuple[Observer, ...]] = ContextVar("rrattention_observers", default=())
_CHUNK: ContextVar[dict[str, Any] | None] = ContextVar("rrattention_chunk", default=None)
_EXACT: ContextVar[bool] = ContextVar("rrattention_exact", default=False)


def record() -> AbstractContextManager[PrefillRecord]:
    """Record the densities of the prefills that this thread runs inside the `with`."""
    return _listening(_RECORDS, PrefillRecord())


def observe(callback: Observer) -> AbstractContextManager[Observer]:
    """Call `callback(layer_idx, query, key, value, scaling)` on each attention call of this thread inside the `with`.

    query [B, H, Lq, D], key and value [B, K, Lk, D], the cache included, are those of the call, after rotary embedding.
    A callback that attends exactly, and causally, may return what comes of it, [B, H, Lq, D]: where that is what the
    call would compute, it is not computed again.
    """
    return _listening(_OBSERVERS, callback)


def chunk(*, total_tokens: int, last: bool) -> AbstractContextManager[None]:
    """Let what this thread runs inside the `with` select what a prefill of `total_tokens` in one call would.

    For a chunk over a cache: see `RRConfig.for_chunk`. It must hold at least `block_size` tokens, if there are so many.
    """
    return _setting(_CHUNK, {"total_tokens": total_tokens, "last": last})


def exact() -> AbstractContextManager[None]:
    """Let what this thread runs inside the `with` attend densely, however long: a question after a prefix, say."""
    return _setting(_EXACT, True)


@contextmanager
def _setting(variable: ContextVar[T], value: T) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


@contextmanager
def _listening(listeners: ContextVar[tuple[T, ...]], listener: T) -> Iterator[T]:
    listeners.set((*listeners.get(), listener))
    try:
        yield listener
    finally:  # not a reset to what was before: generators may end in another order than they began
        listeners.set(tuple(other for other in listeners.get() if other is not listener))


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks: query [B, H, Lq, D] over key and value [B, K, Lk, D]; returns [B, Lq, H, D].

    `attention_mask` comes from `_mask`: None, kv_start [B], or [B, 1, Lq, Lk]; or it is the user's own, which SDPA gets
    as it is.
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{NAME} cannot honour {name}, which {type(module).__name__} asks for")
    if dropout:
        raise ValueError(f"dropout must be 0 with {NAME}, which is for inference, got {dropout}")

    if query.dtype != value.dtype:  # under autocast, rotary embeddings leave queries and keys in float32
        query, key = query.to(value.dtype), key.to(value.dtype)
    if not hasattr(module, "layer_idx"):  # no layer of a decoder: vision, where the name was given to a whole model
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal)

    config, attention = _stored(module.config, module.layer_idx)
    if (part := _CHUNK.get()) is not None:
        config = config.for_chunk(**part, device=query.device)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attended = [callback(module.layer_idx, query, key, value, scale) for callback in _OBSERVERS.get()]

    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal or (attention_mask is not None and attention_mask.dim() != 1):
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, is_causal=False)
        if causal:
            _record_dense(module, query, key, config)
        return out, None

    kv_start = attention_mask
    # A question after a long prefix is short and exact, and so is decoding.
    sparse = attention == "rr" and not _EXACT.get()
    if sparse and query.shape[2] >= config.block_size and key.shape == value.shape:
        out, stats = rr_attention(query, key, value, config=config, scale=scale, kv_start=kv_start, return_stats=True)
        for prefill in _RECORDS.get():
            prefill.add(module.layer_idx, stats)
    else:
        known = next((out for out in attended if out is not None), None) if kv_start is None else None
        out = dense_attention(query, key, value, scale=scale, kv_start=kv_start) if known is None else known
        _record_dense(module, query, key, config, kv_start)
    return out.transpose(1, 2).contiguous(), None


def _record_dense(
    module: nn.Module, query: Tensor, key: Tensor, config: RRConfig, kv_start: Tensor | None = None
) -> None:
    if query.shape[2] == 1 or not _RECORDS.get():
        return
    grid = BlockGrid.of(query, query.shape[2], key.shape[2], config, kv_start=kv_start)
    stats = grid.dense_stats(query.shape[1])
    for prefill in _RECORDS.get():
        prefill.add(module.layer_idx, stats)


def _stored(text_config: Any, layer: int | None = None) -> tuple[RRConfig, Attention]:
    """Return what `enable` stored in the text part's config, or the defaults under a bare `attn_implementation`.

    For a `layer` with its row of weights alone: every call of every layer reads this, and a model has hundreds.
    """
    stored = getattr(text_config, NAME, None)
    if not stored:
        return RRConfig(), "rr"
    fields = stored["config"]
    if layer is not None and "head_weights" in fields:
        fields = fields | {"head_weights": [fields["head_weights"][layer]]}
    return RRConfig(**fields), stored["attention"]


def _mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """Return None for plain causal attention, kv_start [B] with padding on the left, else a bool mask [B, 1, Lq, Lk].

    One mask serves all layers, so that what has to be read from the device is read once per forward pass. The 2-D
    `attention_mask` [B, Lk] is True at valid keys.
    """
    plain = (
        mask_function is causal_mask_function
        and allow_is_causal_skip
        and not isinstance(q_offset, Tensor)  # compiled decoding over a static cache: no branch on its value
        and q_offset + q_length == kv_length  # the last query is the last key's own
    )
    if plain and attention_mask is None:
        return None
    if plain and attention_mask is not None and attention_mask.shape[-1] == kv_length:
        grows = attention_mask[:, 1:] >= attention_mask[:, :-1]
        unpadded, on_the_left = torch.stack([attention_mask.all(), grows.all()]).tolist()
        if unpadded:
            return None
        if on_the_left:
            return kv_length - attention_mask.sum(dim=-1)
    return sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        # A skipped mask is right only for the kernel that it is skipped for: sdpa counts causality from the first key.
        allow_is_causal_skip=False,
        **{**kwargs, "allow_is_bidirectional_skip": False},
    )
