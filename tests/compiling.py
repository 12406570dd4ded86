"""What the compiler makes of the kernels, for the tests that look at it: made once, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parent.parent / "kernels" / "benchmarks"
# A part of what `compile_report.py` compiles, to save time: bfloat16 everywhere, other dims, types and small blocks
# on two architectures, and all of Gluon's kernel.
SHARES: list[dict[str, Any]] = [
    {"dtype": ["bf16"], "head_dim": [128, 256], "block_size": [128], "stride": [8]},
    {
        "kernel": ["attend", "estimate"],
        "arch": [80, 90],
        "dtype": ["bf16"],
        "head_dim": [64, 80],
        "block_size": [128],
        "stride": [8],
    },
    {
        "kernel": ["attend", "estimate"],
        "arch": [80, 90],
        "dtype": ["fp16", "fp32"],
        "head_dim": [128],
        "block_size": [64],
        "stride": [8],
    },
    {"kernel": ["hopper"], "head_dim": [64, 128]},
]
CODE = """
import json, os, sys
from dataclasses import asdict
from compile_report import cases, compile_all

chosen = dict.fromkeys(case for share in json.loads(sys.argv[1]) for case in cases(share))
for case, report in compile_all([*chosen], os.cpu_count() or 1):
    print(json.dumps(asdict(case) | asdict(report)))
"""


@cache
def compiled() -> list[dict[str, Any]]:
    """One dict for each compiled kernel: in this process Triton interprets, so that others do it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", CODE, json.dumps(SHARES)]
    done = subprocess.run(command, env=environment, cwd=BENCHMARKS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
