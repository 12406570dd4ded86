"""What a user would pick instead: dense attention by PyTorch or flash_attn, and flex_attention over listed blocks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cache

import torch
from harness import Work
from inputs import Inputs
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from rrattention import BlockSelection, dense_attention


def dense_ways(inputs: Inputs, against: list[str]) -> Iterator[tuple[str, Work]]:
    """Each way to compute dense attention that works here; what does not work is said."""
    q, k, v, scale = inputs.q, inputs.k, inputs.v, inputs.scale
    group = q.shape[1] // k.shape[1]

    def sdpa(backend: SDPBackend, k: Tensor, v: Tensor, grouped: bool) -> Work:
        def work() -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)

        return work

    if q.device.type == "cuda":
        kinds = {
            "flash": SDPBackend.FLASH_ATTENTION,
            "cuDNN": SDPBackend.CUDNN_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION,
        }
        for name, backend in kinds.items():
            if works_here(f"SDPA {name}", work := sdpa(backend, k, v, group > 1)):
                yield f"SDPA {name}", work
            elif group > 1:
                many_k, many_v = (x.repeat_interleave(group, dim=1) for x in (k, v))
                if works_here(f"SDPA {name} repeated", work := sdpa(backend, many_k, many_v, False)):
                    yield f"SDPA {name} repeated", work  # K and V once for each query head, made before the clock runs
    else:
        yield "SDPA", lambda: dense_attention(q, k, v, scale=scale)
    if "flash_attn" in against:
        try:
            from flash_attn import flash_attn_func
        except ImportError:
            print("flash_attn is not installed")
            return
        turned = [x.transpose(1, 2) for x in (q, k, v)]

        def flash() -> Tensor:
            return flash_attn_func(*turned, softmax_scale=scale, causal=True).transpose(1, 2)

        if works_here("flash_attn", flash):
            yield "flash_attn", flash


def works_here(name: str, work: Work) -> bool:
    """Try it, and print why it does not work if so."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SDPA tells of each backend why it was not taken
            work()
    except (RuntimeError, ImportError, TypeError, ValueError) as error:
        print(f"{name} does not work here: {str(error).splitlines()[0][:120]}")
        return False
    return True


def flex_over_blocks(inputs: Inputs, selection: BlockSelection) -> Work | None:
    """Compiled flex_attention over the same blocks, or None (and a word) where it does not work."""
    from torch.nn.attention.flex_attention import BlockMask

    grid, size = selection.grid, selection.grid.block_size
    diagonal = torch.zeros_like(selection.indices)
    diagonal[..., 0] = torch.arange(grid.query_blocks, device=grid.device)
    blocks = BlockMask.from_kv_blocks(
        torch.ones_like(selection.counts),  # the diagonal block, which is last in each list, is masked by token
        diagonal,
        selection.counts - 1,
        selection.indices.clamp(0, grid.key_blocks - 1),
        BLOCK_SIZE=(size, size),
        mask_mod=_causal,
        seq_lengths=(grid.query_length, grid.key_length),
    )
    grouped = inputs.q.shape[1] > inputs.k.shape[1]

    def work() -> Tensor:
        return _compiled_flex()(inputs.q, inputs.k, inputs.v, block_mask=blocks, scale=inputs.scale, enable_gqa=grouped)

    return work if works_here("flex_attention", work) else None


def _causal(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
    return row >= column


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    """One for all calls: it is compiled for the first length, and then once more for any."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
