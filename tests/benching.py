"""The scripts of kernels/benchmarks in tests: how they are imported, and small inputs for them."""

import importlib
from pathlib import Path

import pytest

from rrattention import BlockGrid, RRConfig

FOLDER = Path(__file__).parent.parent / "kernels" / "benchmarks"
SMALL = RRConfig(block_size=16, stride=4, min_tokens=0)


def room(name):
    """Import a script. They import one another as files of one folder do: they are no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return importlib.import_module(name)


def generated(length, seed=0, heads=4, kv_heads=2, head_dim=32):
    return room("inputs").generate(heads, kv_heads, head_dim, length, seed=seed)


def grid_of(inputs, config):
    length = inputs.q.shape[2]
    return BlockGrid.of(inputs.q, length, length, config)
