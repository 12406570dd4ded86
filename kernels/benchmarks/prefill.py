"""Time one attention call of a prefill: dense, block-sparse by others, and RRAttention, stage by stage.

    python kernels/benchmarks/prefill.py                             a generator's inputs, on the GPU if there is one
    python kernels/benchmarks/prefill.py --lengths 8192 131072 --tau .95 .9 --rule default paper --ceilings
    python kernels/benchmarks/prefill.py --model PATH --text FILE    what reaches one layer of a model

Correctness comes first: at a small length every stage is compared with the reference in float64, and at each length
some rows of the output are computed again in float64. A red gate ends the run with exit code 1 and without a speedup.
Times are medians over runs by turns; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Times, Work, check, default_device, finish, machine, measure, print_gate, relative_error, table
from inputs import Inputs, generate
from models import add_model_arguments, capture, load_task
from rivals import dense_ways, flex_over_blocks
from torch import Tensor

from rrattention import BACKENDS, BlockSelection, RRConfig, attend, dense_attention, estimate, rr_attention, select
from rrattention.config import RULES

GATE_LENGTH = 1100  # tokens: nine blocks, the last of them ragged
SPOT_ROWS = 16  # rows of the output that are computed again at each length
# How far scores may be from those of float64, as relative L2: products in the inputs' own precision, and logits of 30.
SCORE_ERROR = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.08}
# Shape, type and lengths that are usual for a device: Qwen2-VL-7B on a GPU, an eighth of it on a CPU.
DEFAULTS = {
    "cuda": (28, 4, 128, "bfloat16", [2**i for i in range(12, 19)]),
    "cpu": (8, 2, 64, "float32", [4096, 8192, 16384]),
}
COLUMNS = {
    **{"length": "d", "way": "s", "tau": "g", "ms": ".3f", "low": ".3f", "high": ".3f", "speedup": ".2f"},
    **{"density": ".3f", "chosen": ".3f", "estimate": ".3f", "select": ".3f", "attend": ".3f", "flex": ".3f"},
    **{"overhead": ".1%", "TFLOP/s": ".4g", "rate": ".0%", "error": ".4f", "peak MB": ".0f"},
}
LEGEND = """\
ms, low, high     median, fastest and slowest run of the whole call
speedup           against the fastest dense way in the same run
density, chosen   kept over visible blocks, and the same without the mandatory ones
estimate, ...     ms of the stages; flex: of compiled flex_attention over the same blocks, to be compared with attend
overhead          estimate and select over the fastest dense way
TFLOP/s           4 * head_dim for each (query, key) pair that the blocks hold, over the time of attention alone
rate              these TFLOP/s over those of the fastest dense way
error             relative L2 of the output against dense attention
peak MB           memory that the call takes beside its inputs"""


def main() -> int:
    arguments = _arguments()
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    print(machine(device))
    summary: dict[str, Any] = {"benchmark": "prefill", "machine": machine(device), "dtype": arguments.dtype}
    gate = list(check_small(arguments, dtype))
    print_gate(gate)
    limit = gate[-1]["limit"]
    rows: list[dict[str, Any]] = []
    if arguments.ceilings and all(one["green"] for one in gate):
        summary["ceilings"] = ceilings(device)
        print(", ".join(f"{name} {value:.1f}" for name, value in summary["ceilings"].items()))
    for inputs in _inputs(arguments, dtype):
        if not all(one["green"] for one in gate):
            break
        found, checks = time_length(inputs, arguments, limit=limit)
        gate += checks
        print_gate(checks)
        if all(one["green"] for one in checks):
            rows += found
            print(table(found, COLUMNS), flush=True)
            summary |= {"inputs": inputs.name, "heads": inputs.q.shape[1], "kv_heads": inputs.k.shape[1]}
            summary |= {"head_dim": inputs.q.shape[3]}
        del inputs
    green = all(one["green"] for one in gate)
    print(LEGEND if green else "The gate is red: a stage is wrong, and its speed means nothing.")
    finish(summary | {"green": green, "gate": gate, "rows": rows}, arguments.json)
    return 0 if green else 1


def check_small(arguments: argparse.Namespace, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Compare every stage with the reference in float64 at `GATE_LENGTH` tokens."""
    backend = arguments.backend
    shape = (arguments.heads, arguments.kv_heads, arguments.head_dim, GATE_LENGTH)
    inputs = generate(*shape, dtype=dtype, device=arguments.device)
    q, k, v, scale = inputs.q, inputs.k, inputs.v, inputs.scale
    exact_q, exact_k, exact_v = q.double(), k.double(), v.double()

    # What dense attention loses in this precision is the measure of what ours may lose.
    dense = dense_attention(exact_q, exact_k, exact_v, scale=scale)
    limit = 2 * relative_error(dense_attention(q, k, v, scale=scale), dense) + 1e-6
    for rule in arguments.rule:
        config = ruled(rule, arguments.tau[0])
        scores = estimate(q, k, config=config, scale=scale, backend=backend)
        expected = estimate(exact_q, exact_k, config=config, scale=scale, backend="reference")
        yield check(f"estimate {rule}", relative_error(scores, expected), SCORE_ERROR[dtype])
        for tau in (*arguments.tau, 1.0):
            kept, wanted = (
                select(scores, GATE_LENGTH, GATE_LENGTH, config=ruled(rule, tau), backend=b).mask()
                for b in (backend, "reference")
            )
            yield check(f"select {rule} tau {tau:g}", float((kept != wanted).sum() / wanted.sum()), 1e-3)
        whole = rr_attention(q, k, v, config=ruled(rule, 1.0), scale=scale, backend=backend)
        yield check(f"{rule} tau 1 against dense", relative_error(whole, dense), limit)
        selection = select(scores, GATE_LENGTH, GATE_LENGTH, config=config, backend=backend)
        for skipped in ("pooled", "dropped"):
            out = attend(q, k, v, selection, scale=scale, skipped=skipped, backend=backend)
            expected = attend(exact_q, exact_k, exact_v, selection, scale=scale, skipped=skipped, backend="reference")
            yield check(f"attend {rule}, {skipped}", relative_error(out, expected), limit)


def time_length(
    inputs: Inputs, arguments: argparse.Namespace, *, limit: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Time all ways at one length. Returns table rows and the checks of the outputs at that length."""
    q, k, v, scale = inputs.q, inputs.k, inputs.v, inputs.scale
    length, device, backend = q.shape[2], q.device, arguments.backend
    dense = dict(dense_ways(inputs, arguments.against))
    works: dict[Any, Work] = {("dense", name): work for name, work in dense.items()}
    baseline = next(iter(dense.values()))()
    dense_rows: list[dict[str, Any]] = [
        {"way": name, "error": relative_error(work(), baseline)} for name, work in dense.items()
    ]

    configs = {(rule, tau): ruled(rule, tau) for tau in arguments.tau for rule in arguments.rule}
    scores: dict[tuple[int, int], Tensor] = {}  # tau does not matter to them
    for config in configs.values():
        if (size := (config.block_size, config.stride)) not in scores:
            works["estimate", size] = partial(estimate, q, k, config=config, scale=scale, backend=backend)
            scores[size] = works["estimate", size]()
    rows: list[dict[str, Any]] = []
    checks = []
    for (rule, tau), config in configs.items():
        scored = scores[config.block_size, config.stride]
        selection = select(scored, length, length, config=config, backend=backend)
        out = attend(q, k, v, selection, scale=scale, skipped=config.skipped, backend=backend)
        wrong = spot_error(inputs, selection, out, pooled=config.skipped == "pooled")
        checks.append(check(f"rows at {length}, {rule} tau {tau:g}", wrong, 2 * limit))  # a few scatter more than all
        rows.append(_described(rule, tau, selection) | {"error": relative_error(out, baseline)})
        works |= {(config, name): work for name, work in _stages(inputs, config, scored, selection, backend).items()}
        if "flex" in arguments.against and (flex := flex_over_blocks(inputs, selection)):
            works[config, "flex"] = flex
    del baseline, out

    times = measure(works, device, arguments.seconds)
    pairs = length * (length + 1) // 2 * q.shape[1]
    flops = 4e-9 * q.shape[3]  # of a pair, so that milliseconds give TFLOP/s
    fastest = min(times["dense", name].median for name in dense)
    best_rate = flops * pairs / fastest
    for row in dense_rows:
        taken = times["dense", row["way"]]
        row |= {"length": length, **_columns(taken), "speedup": fastest / taken.median}
        row |= {"TFLOP/s": flops * pairs / taken.median}
    for config, row in zip(configs.values(), rows, strict=True):
        taken = times[config, "total"]
        row |= {"length": length, **_columns(taken), "speedup": fastest / taken.median}
        row |= {"estimate": times["estimate", (config.block_size, config.stride)].median}
        row |= {name: times[config, name].median for name in ("select", "attend", "flex") if (config, name) in times}
        row |= {"overhead": (row["estimate"] + row["select"]) / fastest}
        row |= {"TFLOP/s": flops * row["pairs"] / row["attend"]}
        row |= {"rate": row["TFLOP/s"] / best_rate}
    return dense_rows + rows, checks


def ruled(rule: str, tau: float) -> RRConfig:
    """The configuration of one of `RULES`, sparse at any length."""
    return replace(RULES[rule](tau=tau), min_tokens=0)


def spot_error(inputs: Inputs, selection: BlockSelection, out: Tensor, *, pooled: bool) -> float:
    """Relative L2 error of some rows of `out`, from early to late, against attention over their blocks in float64.

    With `pooled`, the mean key and value of each block before the row's own that is not among them take part.
    """
    length, heads, size = inputs.q.shape[2], inputs.q.shape[1], selection.grid.block_size
    group, difference, norm = heads // inputs.k.shape[1], 0.0, 0.0
    for i in range(SPOT_ROWS):
        h, r = i * 5 % heads, (length - 1) * (i + 1) // SPOT_ROWS
        count = int(selection.counts[0, h, r // size])
        blocks = selection.indices[0, h, r // size, :count].long()
        columns = (blocks[:, None] * size + torch.arange(size, device=out.device)).flatten()
        columns = columns[columns <= r]
        key, value = inputs.k[0, h // group].double(), inputs.v[0, h // group].double()
        keys, values, weight = key[columns], value[columns], torch.zeros(len(columns), device=out.device)
        if pooled:
            skipped = torch.ones(r // size, dtype=torch.bool, device=out.device)
            skipped[blocks[blocks < r // size]] = False
            means = (x[: r // size * size].unflatten(0, (-1, size)).mean(dim=1)[skipped] for x in (key, value))
            keys, values = (torch.cat(parts) for parts in zip((keys, values), means, strict=True))
            weight = torch.cat([weight, torch.full((int(skipped.sum()),), math.log(size), device=out.device)])
        expected = torch.softmax(inputs.scale * keys @ inputs.q[0, h, r].double() + weight, dim=0) @ values
        difference += float((out[0, h, r].double() - expected).square().sum())
        norm += float(expected.square().sum())
    return (difference / norm) ** 0.5


def kept_pairs(selection: BlockSelection) -> int:
    """How many (query, key) pairs causal attention over the kept blocks computes, over batch and heads.

    The diagonal block is always kept; all others are whole, except that the last query block may have fewer rows.
    """
    grid = selection.grid
    size, length = grid.block_size, grid.query_length
    rows = (length - torch.arange(grid.query_blocks, device=grid.device) * size).clamp(max=size)
    pairs = rows * size * (selection.counts - 1) + rows * (rows + 1) // 2
    return int(pairs.sum())


def ceilings(device: torch.device) -> dict[str, float]:
    """What the machine can do at best: GB/s of a large copy (read and written), TFLOP/s of a large matrix product."""
    if device.type == "cuda":
        count, size, dtype = 2**29, 8192, torch.bfloat16
    else:
        count, size, dtype = 2**26, 2048, torch.float32
    source = torch.zeros(count, dtype=dtype, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = measure({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, device, 0.5)
    kind = str(dtype).removeprefix("torch.")
    return {
        "copy GB/s": 2e-6 * source.nbytes / times["copy"].median,
        f"{kind} matmul TFLOP/s": 2e-9 * size**3 / times["matmul"].median,
    }


def _stages(
    inputs: Inputs, config: RRConfig, scores: Tensor, selection: BlockSelection, backend: str
) -> dict[str, Work]:
    q, k, v, scale, length = inputs.q, inputs.k, inputs.v, inputs.scale, inputs.q.shape[2]
    return {
        "total": lambda: rr_attention(q, k, v, config=config, scale=scale, backend=backend),
        "select": lambda: select(scores, length, length, config=config, backend=backend),
        "attend": lambda: attend(q, k, v, selection, scale=scale, skipped=config.skipped, backend=backend),
    }


def _described(rule: str, tau: float, selection: BlockSelection) -> dict[str, Any]:
    return {
        "way": "RRAttention" if rule == "default" else f"RRAttention {rule}",
        "tau": tau,
        "density": float(selection.density()),
        "chosen": float(selection.density(mandatory=False)),
        "pairs": kept_pairs(selection),
    }


def _columns(times: Times) -> dict[str, Any]:
    return {"ms": times.median, "low": times.low, "high": times.high, "runs": times.runs, "peak MB": times.peak_mb}


def _inputs(arguments: argparse.Namespace, dtype: torch.dtype) -> Iterator[Inputs]:
    """The inputs of each length: a captured layer's first tokens, or generated."""
    if arguments.model:
        task = load_task(arguments, dtype, tokens=max(arguments.lengths))
        layer = task.layers // 2 if arguments.layer is None else arguments.layer
        (whole,) = capture(task, [layer])[:1]
        for length in sorted(arguments.lengths):
            if length <= whole.q.shape[2]:
                yield whole.first(length)
            else:
                print(f"{whole.name} has {whole.q.shape[2]} tokens: no {length}")
    else:
        for length in sorted(arguments.lengths):
            shape = (arguments.heads, arguments.kv_heads, arguments.head_dim, length)
            yield generate(*shape, dtype=dtype, device=arguments.device, seed=arguments.seed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--layer", type=int, help="which layer of --model (default: the one in the middle)")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="TOKENS", help="default: as far as the device goes")
    parser.add_argument("--heads", type=int, help="of the generator (default: 28 on a GPU, 8 on a CPU)")
    parser.add_argument("--kv-heads", type=int, help="default: 4 on a GPU, 2 on a CPU")
    parser.add_argument("--head-dim", type=int, help="default: 128 on a GPU, 64 on a CPU")
    parser.add_argument("--seed", type=int, default=0, help="of the generator")
    parser.add_argument("--tau", type=float, nargs="+", default=[0.95, 0.9])
    parser.add_argument(
        "--rule", nargs="+", choices=RULES, default=["default", "paper"], help="which blocks are kept (default: by two)"
    )
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="whose stages are timed")
    parser.add_argument(
        "--against",
        nargs="*",
        choices=("flash_attn", "flex"),
        help="what to compare with beside SDPA (default: both on a GPU; on a CPU flex takes long to compile)",
    )
    parser.add_argument("--seconds", type=float, default=0.3, help="of timed runs for each piece of work")
    parser.add_argument("--ceilings", action="store_true", help="also the bandwidth of a copy and the rate of a matmul")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the last line there too")
    arguments = parser.parse_args()
    arguments.device = arguments.device or default_device()
    on_gpu = arguments.device.type == "cuda"
    heads, kv_heads, head_dim, dtype, lengths = DEFAULTS["cuda" if on_gpu else "cpu"]
    arguments.heads, arguments.kv_heads = arguments.heads or heads, arguments.kv_heads or kv_heads
    arguments.head_dim, arguments.dtype = arguments.head_dim or head_dim, arguments.dtype or dtype
    arguments.lengths = arguments.lengths or lengths
    if arguments.against is None:
        arguments.against = ["flash_attn", "flex"] if on_gpu else []
    return arguments


if __name__ == "__main__":
    sys.exit(main())
