"""Time launch configurations on the GPU at hand, and print or write the lines of the launch table that are fastest.

    python kernels/benchmarks/autotune.py --length 131072 --heads 28 --kv-heads 4 --head-dim 128 --dtype bf16

Candidates that spill registers or do not fit into shared memory are left out, as the tests would refuse them. Every
other one has to return what the table's launch returns. `--write` puts the lines into `rrattention/triton/launch.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from compile_report import ARCHITECTURES, CHOICES, Case, compile_case, dtype_named, essential
from torch import Tensor

from rrattention import BlockGrid, BlockSelection, RRConfig
from rrattention.triton import launch as launch_table
from rrattention.triton.launch import TABLE, Launch

# Values of tile_m, tile_n, num_warps and num_stages, all with all.
CANDIDATES = {
    "pool": ((16, 32, 64, 128), (1,), (2, 4, 8), (1,)),
    "estimate": ((64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4)),
    "select": ((1,), (512, 1024, 2048, 4096), (2, 4, 8), (1,)),
    "attend": ((16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (2, 3, 4)),
    "means": ((64, 128), (16, 32, 64), (4, 8), (1, 2, 3)),
    "segments": ((16, 32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)),
}
DENSITY = 0.3  # of the lists that "attend" is timed with
QUESTION, STEP = 30, 180  # tokens of the queries and of the segments that "segments" is timed with


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one launch: median, and the fifths that were fastest and slowest."""

    launch: Launch
    median: float
    fast: float
    slow: float


def calls(arguments: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    """Return one call of each kernel on random tensors laid out as Hugging Face does."""
    from rrattention import triton as stages
    from rrattention.triton.means import add_means
    from rrattention.triton.pool import pool
    from rrattention.triton.segments import segment_logsumexp

    launch_table.GLUON_VERSIONS = ()  # "attend" means the Triton kernel here

    def rows(heads: int) -> Tensor:
        shape = 1, arguments.length, heads, arguments.head_dim
        return torch.randn(shape, device="cuda", dtype=dtype_named(arguments.dtype)).transpose(1, 2)

    query, key, value = rows(arguments.heads), rows(arguments.kv_heads), rows(arguments.kv_heads)
    scale = arguments.head_dim**-0.5
    config = RRConfig(arguments.block_size, arguments.stride)
    grid = BlockGrid.of(query, arguments.length, arguments.length, config)
    scores = stages.estimate(query, key, grid, stride=config.stride, scale=scale)
    kept = (torch.rand_like(scores) < DENSITY) | grid.mandatory()[:, None]
    selection = BlockSelection.from_mask(kept & grid.visible()[:, None], grid)
    attended = stages.attend(query, key, value, selection, scale=scale)
    starts = torch.arange(0, arguments.length, STEP, dtype=torch.int32, device="cuda")
    log_sums = torch.full(query.shape[:3], 3.0, device="cuda")  # as if each query had given away some weight

    def means() -> Tensor:
        out = attended.clone()
        add_means(query, key, value, out, log_sums, selection, scale=scale)
        return out

    return {
        "means": means,
        "pool": lambda: pool(key, grid, stride=config.stride),
        "estimate": lambda: stages.estimate(query, key, grid, stride=config.stride, scale=scale),
        "select": lambda: stages.select(scores, grid, config).counts,
        "attend": lambda: stages.attend(query, key, value, selection, scale=scale),
        "segments": lambda: segment_logsumexp(query[:, :, -QUESTION:], [*key], starts, scale=scale),
    }


def compilable(case: Case, processes: int) -> list[Launch]:
    """Return the table's launch and after it the candidates that keep to registers and shared memory."""
    others = [Launch(*values) for values in itertools.product(*CANDIDATES[case.kernel])]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:  # a fork would share the GPU's state
        fits = list(pool.map(partial(_fits, case), others))
    table = TABLE[ARCHITECTURES[case.arch][0]][case.key]
    return list(dict.fromkeys([table, *itertools.compress(others, fits)]))


def timings(case: Case, candidates: list[Launch], call: Callable[[], Tensor]) -> Iterator[Timing]:
    """Time `call` with each of the candidates, the first of which says what it has to return."""
    launches = TABLE[ARCHITECTURES[case.arch][0]]
    expected = call().float()
    for launch in candidates:
        launches[case.key] = launch
        if torch.allclose(call().float(), expected, rtol=2e-2, atol=2e-2):
            yield Timing(launch, *triton.testing.do_bench(call, quantiles=[0.5, 0.2, 0.8]))
        else:
            print(f"    {launch} returns something else", flush=True)
    launches[case.key] = candidates[0]


def main() -> None:
    """Parse the shapes, time each kernel, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--heads", type=int, default=28)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=CHOICES["dtype"], default="bf16")
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--stride", type=int, default=8)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile")
    parser.add_argument("--write", action="store_true", help="put the fastest into the table, in its file")
    arguments = parser.parse_args()

    major, minor = torch.cuda.get_device_capability()
    arch = max(each for each in ARCHITECTURES if each <= 10 * major + minor)
    shape = (arguments.dtype, arguments.head_dim, arguments.block_size, arguments.stride)
    cases = [essential(Case(kernel, arch, *shape)) for kernel in arguments.kernel]
    device, call = torch.cuda.get_device_name(), calls(arguments)
    print(f"{device}, torch {torch.__version__}, triton {triton.__version__}")
    best, lines = {}, []
    for case in cases:
        candidates = compilable(case, arguments.processes)
        print(f"{case.kernel}: {len(candidates)} candidates, the table's first", flush=True)
        timed = []
        for timing in timings(case, candidates, call[case.kernel]):
            timed.append(timing)
            print(f"    {timing.launch} {timing.median:9.3f} ms ({timing.fast:.3f} to {timing.slow:.3f})", flush=True)
        fastest = min(timed, key=lambda each: each.median)
        best[case.kernel] = {"launch": astuple(fastest.launch), "ms": fastest.median, "table_ms": timed[0].median}
        gain = timed[0].median / fastest.median
        kernel, dim, bits = case.key
        launch = f"Launch{astuple(fastest.launch)}"
        lines.append(f'        ("{kernel}", {dim}, {bits}): {launch},  # {fastest.median:.3f} ms, {gain:.2f}x as fast')

        if arguments.write:
            write(Path(launch_table.__file__), ARCHITECTURES[arch][0], case.key, fastest.launch)

    print(f"for TABLE[{ARCHITECTURES[arch][0]}]:", *lines, sep="\n")
    print(json.dumps(vars(arguments) | {"device": device, "best": best}))


def write(path: Path, architecture: int, key: tuple[str, int, int], launch: Launch) -> None:
    """Replace one line of the launch table in the file at `path`. ValueError if it has no such line."""
    before, start, rest = path.read_text(encoding="utf-8").partition(f"    {architecture}: {{\n")
    section, end, after = rest.partition("    },\n")
    kernel, dim, bits = key
    line = re.compile(rf'^( *\("{kernel}", {dim}, {bits}\): )Launch\([^)]*\)', re.MULTILINE)
    section, found = line.subn(rf"\g<1>Launch{astuple(launch)}", section)
    if found != 1:
        raise ValueError(f"{path} has no line for {key} under {architecture}")
    path.write_text(before + start + section + end + after, encoding="utf-8")


def _fits(case: Case, launch: Launch) -> bool:
    try:
        report = compile_case(case, launch)
    except Exception:  # the compiler has many ways to refuse a tile
        return False
    return report.spills <= (32 if case.head_dim > 128 else 0) and report.shared <= report.shared_limit


if __name__ == "__main__":
    main()
