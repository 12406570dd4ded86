"""The three stages as Triton kernels: NVIDIA GPUs from Ampere on, or any CPU under `TRITON_INTERPRET=1`."""

from __future__ import annotations

from rrattention.triton.attend import attend
from rrattention.triton.estimate import estimate
from rrattention.triton.select import select

__all__ = ["attend", "estimate", "select"]
