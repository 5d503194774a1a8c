"""The engine: operator schemas, fakes, autograd, and which backend runs.

Each operator is defined once with `torch.library`. The device decides which kernels are asked first
(Numba on the CPU, Triton on CUDA); a kernel that does not serve a case says why, and the reference
runs.
"""

from torchpool.ops import batching  # noqa: F401  registers itself
from torchpool.ops.backends import refusals
from torchpool.ops.calls import accumulate, over_runs, ready, select
from torchpool.ops.operators import pack, unpack
from torchpool.ops.plain import in_forward_mode, is_plain, is_watched

__all__ = [
    "accumulate",
    "in_forward_mode",
    "is_plain",
    "is_watched",
    "over_runs",
    "pack",
    "ready",
    "refusals",
    "select",
    "unpack",
]
