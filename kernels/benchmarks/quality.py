"""Measure what block-sparse attention loses against how many blocks it keeps, for RRAttention and other ways to choose.

    python kernels/benchmarks/quality.py --model tiny                  videos of our world, questions with answers
    python kernels/benchmarks/quality.py --model PATH --text FILE FILE --tokens 8192 --excerpts 2
    python kernels/benchmarks/quality.py --model PATH --video FILE --ask "Who scores first?" "The red team."
    python kernels/benchmarks/quality.py --length 4096                 a generator's inputs: no model, so no loss

For each method and tau: the error of attention's output (relative L2 against dense attention) and the attention mass
that was kept, over the layers' true inputs; and the model's loss when all its layers attend that way, with how far its
predictions are from those of the dense model. Correctness comes first; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from baselines import METHODS, Way, block_mass
from chart import line_chart
from harness import check, default_device, finish, machine, print_gate, relative_error, table
from inputs import Inputs, generate
from models import Task, add_model_arguments, attending, capture, load_task
from torch import Tensor
from torch.nn.functional import kl_div, nll_loss

from rrattention import BlockGrid, BlockSelection, BlockStats, attend, dense_attention
from rrvideo.options import head_weights

Weights = Sequence[Sequence[float]]  # of the heads of each layer

GATE_LENGTH = 640  # tokens of a layer's inputs that everything is checked on, in float64
TINY = 1e-12  # a divergence that is as good as none
COLUMNS = {
    **{"method": "s", "tau": "g", "density": ".3f", "chosen": ".3f", "error": ".4f", "low": ".4f", "high": ".4f"},
    **{"mass": ".4f", "loss": ".4f", "increase": ".2%", "divergence": ".4f", "loss density": ".3f"},
}
EQUAL_COLUMNS = {
    **{"density": ".3f", "method": "s", "error": ".4f"},
    **{"loss density": ".3f", "increase": ".2%", "divergence": ".4f"},
}
LEGEND = """\
density, chosen    kept over visible blocks over all layers, and the same without the mandatory ones
error, low, high   relative L2 of attention's output against dense attention: median, least and most of the layers
mass               the share of the true attention mass that lies in the kept blocks
loss, increase     nats a token when all layers attend this way, and how much more than densely
divergence         nats a token from what the dense model predicts (KL): by chance it cannot fall, as a loss can
loss density       density in those runs, where each layer sees what the layers before it made of their inputs"""


def main() -> int:
    arguments = _arguments()
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    print(machine(device))
    if arguments.model:
        task = load_task(arguments, dtype, tokens=arguments.tokens)
        layers, name = capture(task, arguments.layers), task.name
    else:
        shape = (arguments.heads, arguments.kv_heads, arguments.head_dim, arguments.length)
        layers, task = [generate(*shape, dtype=dtype, device=device)], None
        name = f"{layers[0].name}, {arguments.length} tokens"
    print(name, flush=True)
    gate = list(check_all(layers[0].first(GATE_LENGTH), task))
    print_gate(gate)
    summary: dict[str, Any] = {"benchmark": "quality", "machine": machine(device), "dtype": arguments.dtype}
    summary |= {"inputs": name, "gate": gate, "green": all(one["green"] for one in gate)}
    if not summary["green"]:
        print("The gate is red: figures would mean nothing.")
        finish(summary, arguments.json)
        return 1

    weights = arguments.head_weights
    rows = measure(layers, arguments.methods, arguments.tau, weights)
    if task is not None:
        ways = [(METHODS[row["method"]], row["tau"]) for row in rows]
        summary["dense loss"], losses = losses_with(task, ways, weights)
        for row, found in zip(rows, losses, strict=True):
            row |= {"loss": found.loss, "increase": found.loss / summary["dense loss"] - 1}
            row |= {"divergence": found.divergence, "loss density": float(found.stats.density())}
    print(table(rows, COLUMNS))
    print(LEGEND)
    summary["at equal density"] = equal = at_equal_density(rows)
    if equal:
        print("at the densities of RRAttention paper, by linear interpolation:")
        print(table(equal, EQUAL_COLUMNS))
    if arguments.plot:
        series = {m: [(row["density"], row["error"]) for row in rows if row["method"] == m] for m in arguments.methods}
        title = f"Output error against density: {name}"
        arguments.plot.write_text(line_chart(title, "density", "relative L2 error", series), encoding="utf-8")
    finish(summary | {"rows": rows}, arguments.json)
    return 0


def check_all(inputs: Inputs, task: Task | None) -> Iterator[dict[str, Any]]:
    """Check what the figures rest on: the oracle's mass, that tau 1 is dense, and that the model is really replaced."""
    q, k, v = inputs.q.double(), inputs.k.double(), inputs.v.double()
    length, scale, ours = q.shape[2], inputs.scale, METHODS["RRAttention"]
    grid = BlockGrid.of(q, length, length, ours.config(1.0))
    size, group = grid.block_size, q.shape[1] // k.shape[1]
    logits = scale * q @ k.repeat_interleave(group, dim=1).mT
    hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    weights = logits.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    tiles = torch.stack([column.sum(dim=-1) for column in weights.split(size, dim=3)], dim=3)
    expected = torch.stack([row.sum(dim=2) for row in tiles.split(size, dim=2)], dim=2)
    mass = block_mass(q, k, grid, scale=scale)
    yield check("block mass against a whole attention map", relative_error(mass, expected))
    dense = dense_attention(q, k, v, scale=scale)
    yield check("dense attention against that map", relative_error(dense, weights @ v.repeat_interleave(group, dim=1)))
    # What dense attention loses in the inputs' own precision is the measure of what the backend may lose.
    own = inputs.q, inputs.k, inputs.v
    limit = 2 * relative_error(dense_attention(*own, scale=scale), dense) + 1e-6
    for name, way in METHODS.items():
        selection = chosen(way, 1.0, inputs.q, inputs.k, scale)
        out = attend(*own, selection, scale=scale, skipped=way.skipped)
        yield check(f"{name} with tau 1 against dense", relative_error(out, dense), limit)
    if task is not None:
        _, (replaced,) = losses_with(task, [(ours, 1.0)])
        close = 1e-2 if inputs.q.dtype == torch.bfloat16 else 1e-3
        yield check("loss with tau 1 against the model's own attention", abs(replaced.loss / task.loss() - 1), close)
        yield check("prefills that were not replaced", float(replaced.stats.visible == 0), 0.5)


def measure(
    layers: Sequence[Inputs], methods: Sequence[str], taus: Sequence[float], weights: Weights | None = None
) -> list[dict[str, Any]]:
    """Return a row for each method and tau: density, error and kept mass over `layers`."""
    found: dict[tuple[str, float], list[tuple[BlockStats, float, float]]] = {}
    for inputs in layers:
        q, k, v = inputs.q, inputs.k, inputs.v
        dense = dense_attention(q, k, v, scale=inputs.scale)
        masses: dict[int, Tensor] = {}  # by the size of the blocks
        for name in methods:
            way = METHODS[name]
            for tau in taus:
                selection = chosen(way, tau, q, k, inputs.scale, weights and weights[inputs.layer])
                if way.block_size not in masses:
                    masses[way.block_size] = block_mass(q, k, selection.grid, scale=inputs.scale)
                mass = masses[way.block_size]
                out = attend(q, k, v, selection, scale=inputs.scale, skipped=way.skipped)
                kept = float((mass * selection.mask()).sum() / mass.sum())
                found.setdefault((name, tau), []).append((selection.stats(), relative_error(out, dense), kept))
    return [_row(name, tau, of_layers) for (name, tau), of_layers in found.items()]


def chosen(
    way: Way, tau: float, query: Tensor, key: Tensor, scale: float, head_weights: Sequence[float] | None = None
) -> BlockSelection:
    """Which blocks `way` keeps of a causal call, in a layer of these `head_weights`."""
    config = way.config(tau, head_weights)
    return way.choose(query, key, BlockGrid.of(query, query.shape[2], key.shape[2], config), config, scale)


@dataclass(slots=True)
class Losses:
    """What a model loses, in nats a token, and the blocks that its layers kept."""

    loss: float
    divergence: float
    stats: BlockStats


@torch.no_grad()
def losses_with(
    task: Task, ways: Sequence[tuple[Way, float]], weights: Weights | None = None
) -> tuple[float, list[Losses]]:
    """The loss when all prefills of `task` attend densely, and what each way and tau makes of it."""
    zero = torch.zeros((), dtype=torch.long)
    totals = [Losses(0.0, 0.0, BlockStats(zero, zero, zero)) for _ in ways]
    dense_loss, tokens = 0.0, 0
    for read in task.readings:
        with attending(task.model, _dense):
            logits, right = read()
        dense = logits.float().log_softmax(dim=-1)
        dense_loss += float(nll_loss(dense, right, reduction="sum"))
        tokens += len(right)
        for (way, tau), total in zip(ways, totals, strict=True):
            with attending(task.model, partial(_sparse, way, tau, total, weights)):
                found = read()[0].float().log_softmax(dim=-1)
            total.loss += float(nll_loss(found, right, reduction="sum"))
            total.divergence += float(kl_div(found, dense, reduction="sum", log_target=True))
    for total in totals:
        total.loss, total.divergence = total.loss / tokens, total.divergence / tokens
    return dense_loss / tokens, totals


def _dense(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return dense_attention(q, k, v, scale=scale)


def _sparse(
    way: Way,
    tau: float,
    total: Losses,
    weights: Weights | None,
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
) -> Tensor:
    if q.shape[2] < k.shape[2]:  # a question after its video is short, and exact
        return dense_attention(q, k, v, scale=scale)
    selection = chosen(way, tau, q, k, scale, weights and weights[layer])
    stats = selection.stats()
    total.stats += BlockStats(stats.kept.cpu(), stats.visible.cpu(), stats.mandatory.cpu())
    return attend(q, k, v, selection, scale=scale, skipped=way.skipped)


def at_equal_density(rows: Sequence[dict[str, Any]], reference: str = "RRAttention paper") -> list[dict[str, Any]]:
    """What each method loses at each density of `reference`, read off the lines between its points.

    Losses are compared at the densities of the runs that they come from.
    """
    found = []
    for point in sorted((row for row in rows if row["method"] == reference), key=lambda row: -row["density"]):
        for name in dict.fromkeys(row["method"] for row in rows):
            mine = [row for row in rows if row["method"] == name]
            here: dict[str, Any] = {"density": point["density"], "method": name}
            here["error"] = _interpolate([(row["density"], row["error"]) for row in mine], point["density"])
            if density := point.get("loss density"):
                here["loss density"] = density
                here["increase"] = _interpolate([(row["loss density"], row["increase"]) for row in mine], density)
                # A divergence falls as steeply as the density grows: it is on the line of its logarithms.
                logs = [(row["loss density"], math.log(max(row["divergence"], TINY))) for row in mine]
                log = _interpolate(logs, density)
                here["divergence"] = None if log is None else math.exp(log)
            if here["error"] is not None or here.get("increase") is not None:
                found.append(here)
    return found


def _interpolate(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """The value at `x` on the line through `points`, or None beyond its ends."""
    ordered = sorted(points)
    for (x0, y0), (x1, y1) in pairwise(ordered):
        if x0 <= x <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


def _row(method: str, tau: float, of_layers: Sequence[tuple[BlockStats, float, float]]) -> dict[str, Any]:
    stats, errors, masses = zip(*of_layers, strict=True)
    total = stats[0]
    for more in stats[1:]:
        total += more
    return {
        "method": method,
        "tau": tau,
        "density": float(total.density()),
        "chosen": float(total.density(mandatory=False)),
        "error": statistics.median(errors),
        "low": min(errors),
        "high": max(errors),
        "mass": statistics.mean(masses),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--tokens", type=int, help="of --text (default: all)")
    parser.add_argument("--layers", type=int, nargs="+", default=[], help="whose inputs are taken (default: all)")
    parser.add_argument("--length", type=int, default=4096, help="of the generator, without --model")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--tau", type=float, nargs="+", default=[0.99, 0.97, 0.95, 0.9, 0.85, 0.8])
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help="default: all that can be run")
    parser.add_argument(
        "--head-weights", type=head_weights, metavar="FILE", help="what calibrate.py has written of the model"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw error against density")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the last line there too")
    arguments = parser.parse_args()
    weighted = [name for name, way in METHODS.items() if way.weighted]
    lacking = [name for name in arguments.methods or () if name in weighted]
    if lacking and not arguments.head_weights:
        parser.error(f"{lacking[0]} needs --head-weights")
    arguments.methods = arguments.methods or [
        name for name in METHODS if arguments.head_weights or name not in weighted
    ]
    arguments.device = arguments.device or default_device()
    arguments.dtype = arguments.dtype or ("bfloat16" if arguments.device.type == "cuda" else "float32")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
