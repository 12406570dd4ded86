"""The compilation gate: what the launch table asks of the compiler, on every architecture and with no GPU present."""

import pytest
from compiling import compiled as compile_once

pytest.importorskip("triton")

ARCHITECTURES = (80, 89, 90, 100, 120)


@pytest.fixture
def compiled():
    return compile_once()


def named(case):
    return f"{case['kernel']} sm_{case['arch']} {case['dtype']} D{case['head_dim']} block {case['block_size']}"


def test_every_kernel_compiles_for_every_architecture(compiled):
    kernels = {(case["kernel"], case["arch"]) for case in compiled}
    everywhere = ("pool", "estimate", "select", "attend", "means", "segments")
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
