"""What the compiler makes of the Triton kernels, for every architecture and with no GPU present.

    python kernels/benchmarks/compile_report.py                   # every configuration of the launch table
    python kernels/benchmarks/compile_report.py --kernel attend --arch 90 --dtype bf16 --head-dim 128

One line for each: registers of a thread, KB of shared memory and the chip's limit, bytes of spilled registers, and the
instruction that does the matrix products. With `--json` each line is a JSON object.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from rrattention.triton.launch import DTYPES, TABLE, Launch, key_for

# Each architecture with its line of the launch table and the KB of shared memory that a program may have there.
ARCHITECTURES = {80: (80, 163), 89: (86, 99), 90: (90, 227), 100: (100, 227), 120: (120, 99)}
CHOICES = {
    "kernel": ("pool", "estimate", "select", "attend", "means", "segments", "hopper"),
    "arch": tuple(ARCHITECTURES),
    "dtype": tuple(DTYPES.values()),
    "head_dim": (64, 80, 96, 128, 256),
    "block_size": (64, 128),
    "stride": (4, 8, 16),
}
# What a kernel's code does not depend on; "select" always reads float32 scores.
INDIFFERENT = {
    "select": ("dtype", "head_dim", "stride"),
    "attend": ("stride",),
    "means": ("stride",),
    "segments": ("block_size", "stride"),
    "hopper": ("block_size", "stride"),
}
DEFAULTS = {"dtype": "fp32", "head_dim": 128, "block_size": 128, "stride": 8}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX_INSTRUCTION = re.compile(r"\b(?:HGMMA|HMMA|UTC\w*MMA)\b")


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel to compile: the choices that its code depends on."""

    kernel: str
    arch: int
    dtype: str
    head_dim: int
    block_size: int
    stride: int

    @property
    def key(self) -> tuple[str, int, int]:
        """Where the launch table has it, in the architecture's part; ValueError: it has no such case."""
        return key_for(TABLE[ARCHITECTURES[self.arch][0]], self.kernel, self.head_dim, dtype_named(self.dtype))

    def exists(self) -> bool:
        """Whether the launch table has it: Gluon's kernel is for one architecture."""
        try:
            return bool(self.key)
        except ValueError:
            return False


@dataclass(frozen=True, slots=True)
class Report:
    """What came out: registers of a thread; bytes of shared memory, of the chip's limit on it, and of spills."""

    registers: int
    shared: int
    shared_limit: int
    spills: int
    mma: str  # the instruction of the matrix products


def cases(chosen: Mapping[str, Sequence | None]) -> list[Case]:
    """Return every case among the chosen values, none twice; a field that is not chosen takes all its values."""
    every = itertools.product(*(chosen.get(field) or values for field, values in CHOICES.items()))
    return list(filter(Case.exists, dict.fromkeys(essential(Case(*values)) for values in every)))


def essential(case: Case) -> Case:
    """Return the case with what the kernel's code does not depend on set to one value."""
    return replace(case, **{field: DEFAULTS[field] for field in INDIFFERENT.get(case.kernel, ())})


def dtype_named(name: str) -> torch.dtype:
    return next(dtype for dtype, each in DTYPES.items() if each == name)


def compile_case(case: Case, launch: Launch | None = None) -> Report:
    """Compile one kernel as it would be launched on `case.arch`, and look into the machine code.

    launch: instead of the table's.
    """
    row, limit = ARCHITECTURES[case.arch]
    launch = launch or TABLE[row][case.key]
    shape = (case.head_dim, dtype_named(case.dtype), case.block_size, case.stride)
    module = importlib.import_module(f"rrattention.triton.{case.kernel}")
    kernel, signature, constants, launch = module.specialization(*shape, launch)
    types = {name: signature.get(name, "constexpr").partition(":")[0] for name in kernel.arg_names}
    aligned = [i for i, name in enumerate(kernel.arg_names) if signature.get(name, "").endswith(":16")]
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    compiled = triton.compile(
        source(kernel, types, dict(constants), {(i,): [["tt.divisibility", 16]] for i in aligned}),
        target=GPUTarget("cuda", case.arch, 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", cubin.name)
        code = _run("nvdisasm", cubin.name) if "mma" in compiled.asm["ptx"] else ""
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    instruction = MATRIX_INSTRUCTION.search(code)
    return Report(registers, compiled.metadata.shared, limit * 1024, stack, instruction[0] if instruction else "none")


def compile_all(chosen: list[Case], processes: int) -> Iterator[tuple[Case, Report]]:
    """Compile in `processes` processes, which share Triton's cache on disk; yields in the order of `chosen`."""
    with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:
        yield from zip(chosen, pool.map(compile_case, chosen), strict=True)


def main() -> None:
    """Parse the choices, compile, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field, values in CHOICES.items():
        parser.add_argument(f"--{field.replace('_', '-')}", nargs="+", choices=values, type=type(values[0]))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    if not arguments.json:
        print(f"triton {triton.__version__}")
        print("kernel    arch   dtype    D  block  stride  registers  shared KB  limit  spills  matrix products")
    for case, report in compile_all(cases(vars(arguments)), arguments.processes):
        if arguments.json:
            print(json.dumps(asdict(case) | asdict(report)), flush=True)
            continue
        what = f"{case.kernel:9s} sm_{case.arch:<3d} {case.dtype:5s} {case.head_dim:4d} {case.block_size:6d}"
        memory = f"{report.shared / 1024:10.1f} {report.shared_limit // 1024:6d} {report.spills:7d}"
        print(f"{what} {case.stride:7d} {report.registers:10d} {memory}  {report.mma}", flush=True)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
