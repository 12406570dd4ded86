"""What the benchmarks share: timing by turns, peak memory, tables, and the JSON line at the end."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

Work = Callable[[], Any]
K = TypeVar("K", bound=Hashable)

FEWEST, MOST = 3, 50  # timed runs of one piece of work


class Times(NamedTuple):
    """Milliseconds of one piece of work over its runs, and the memory that it takes beside what was there before."""

    median: float
    low: float
    high: float
    runs: int
    peak_mb: float  # NaN where the system does not tell


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine(device: torch.device) -> str:
    """The device and the versions that a figure depends on."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    try:
        import triton

        versions = f"triton {triton.__version__}, {versions}"
    except ImportError:
        pass
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        size = properties.total_memory / 2**30
        name = f"{properties.name}, sm_{properties.major}{properties.minor}, {size:.0f} GiB"
    else:
        name = f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{name}; {versions}"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(works: Mapping[K, Work], device: torch.device, seconds: float) -> dict[K, Times]:
    """Time every piece of work for about `seconds` each, by turns, so that a busy moment does not fall on one alone.

    Each is run twice before: kernels are compiled then, and the second run says how much memory it takes and how often
    it fits into its seconds (at least `FEWEST` times). On a GPU, CUDA events take the time on the device, and the queue
    is emptied once a turn.
    """
    known = {name: _warm_up(work, device) for name, work in works.items()}
    runs = {name: min(MOST, max(FEWEST, int(seconds / once))) for name, (once, _) in known.items()}
    elapsed: dict[K, list[float]] = {name: [] for name in works}
    for turn in range(max(runs.values(), default=0)):
        now = {name: work for name, work in works.items() if turn < runs[name]}
        for name, milliseconds in _turn(now, device).items():
            elapsed[name].append(milliseconds)
    return {name: Times(statistics.median(e), min(e), max(e), len(e), known[name][1]) for name, e in elapsed.items()}


def _warm_up(work: Work, device: torch.device) -> tuple[float, float]:
    """Run twice, and return the seconds and the peak memory of the second run."""
    work()
    synchronize(device)
    started = time.perf_counter()
    peak = _peak_megabytes(work, device)
    return max(time.perf_counter() - started, 1e-6), peak


def _turn(works: Mapping[K, Work], device: torch.device) -> dict[K, float]:
    """Run each once and return its milliseconds."""
    if device.type != "cuda":
        elapsed = {}
        for name, work in works.items():
            started = time.perf_counter()
            work()
            elapsed[name] = 1e3 * (time.perf_counter() - started)
        return elapsed
    events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in works}
    for name, work in works.items():
        events[name][0].record()
        work()
        events[name][1].record()
    torch.cuda.synchronize(device)
    return {name: start.elapsed_time(stop) for name, (start, stop) in events.items()}


def _peak_megabytes(work: Work, device: torch.device) -> float:
    """The most memory that `work` takes beside what was there before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew
        before = _resident("VmRSS")
        work()
        return (_resident("VmHWM") - before) / 1e3
    except OSError:
        return float("nan")


def _resident(field: str) -> int:
    """A memory field of this process, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """L2 norm of the difference over that of `expected`, [batch, heads, ...], one head at a time to save memory."""
    difference = norm = 0.0
    for h in range(expected.shape[1]):
        wide = torch.promote_types(expected.dtype, torch.float32)
        mine, theirs = out[:, h].to(wide), expected[:, h].to(wide)
        difference += float((mine - theirs).square().sum(dtype=torch.float64))
        norm += float(theirs.square().sum(dtype=torch.float64))
    return (difference / norm) ** 0.5


def check(name: str, error: float, limit: float = 1e-6) -> dict[str, Any]:
    """One check of a correctness gate; an error that is NaN is red."""
    return {"check": name, "error": error, "limit": limit, "green": error <= limit}


def print_gate(checks: Iterable[Mapping[str, Any]]) -> None:
    """Print each check with its error and what it may be."""
    for one in checks:
        colour = "green" if one["green"] else "RED"
        print(f"gate {colour}: {one['check']}: {one['error']:.2e}, may be {one['limit']:.2e}", flush=True)


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Rows as aligned text: `columns` maps each heading to a format such as ".3f"; what a row lacks is left empty."""
    cells = [list(columns)]
    for row in rows:
        cells.append(["" if row.get(key) is None else format(row[key], spec) for key, spec in columns.items()])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def finish(summary: Mapping[str, Any], path: Path | None) -> None:
    """Print `summary` as one JSON line, which is the last, and write it to `path` if there is one."""
    line = json.dumps(_plain(summary), allow_nan=False)
    if path is not None:
        path.write_text(line + "\n", encoding="utf-8")
    print(line)


def _plain(value: Any) -> Any:
    """Only what JSON has: NaN becomes null, and floats keep six digits."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
