"""The compilation gate: what the launch table asks of the compiler, on every architecture and with no GPU present."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent.parent / "kernels" / "benchmarks" / "compile_report.py"
ARCHITECTURES = (80, 89, 90, 100, 120)
# A part of what `compile_report.py` compiles, to save time: bfloat16 everywhere, other dims, types and small blocks
# on two architectures.
SHARES = [
    "--dtype bf16 --head-dim 128 256 --block-size 128 --stride 8",
    "--kernel attend estimate --arch 80 90 --dtype bf16 --head-dim 64 80 --block-size 128 --stride 8",
    "--kernel attend estimate --arch 80 90 --dtype fp16 fp32 --head-dim 128 --block-size 64 --stride 8",
]


@pytest.fixture(scope="module")
def compiled():
    """One dict for each compiled kernel, made in processes of their own: in this one Triton interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    lines = []
    for share in SHARES:
        command = [sys.executable, SCRIPT, *share.split(), "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        lines += done.stdout.splitlines()
    return [json.loads(line) for line in lines]


def named(case):
    return f"{case['kernel']} sm_{case['arch']} {case['dtype']} D{case['head_dim']} block {case['block_size']}"


def test_every_kernel_compiles_for_every_architecture(compiled):
    kernels = {(case["kernel"], case["arch"]) for case in compiled}
    everywhere = ("pool", "estimate", "select", "attend", "means")
    assert kernels == {(kernel, arch) for kernel in everywhere for arch in ARCHITECTURES} | {("hopper", 90)}


def test_shared_memory_is_within_the_limit_of_the_chip(compiled):
    assert [named(case) for case in compiled if case["shared"] > case["shared_limit"]] == []


def test_nothing_spills_up_to_head_dim_128_and_next_to_nothing_at_256(compiled):
    allowed = {256: 32}
    too_many = [case for case in compiled if case["spills"] > allowed.get(case["head_dim"], 0)]
    assert [f"{named(case)}: {case['spills']} bytes" for case in too_many] == []


def test_estimate_and_attend_multiply_in_the_tensor_cores(compiled):
    products = [case for case in compiled if case["kernel"] in ("estimate", "attend")]
    assert [named(case) for case in products if case["mma"] == "none"] == []
    hopper = [case for case in products if case["arch"] == 90 and case["dtype"] != "fp32"]
    assert len(hopper) == 10
    assert [named(case) for case in hopper if case["mma"] != "HGMMA"] == []
