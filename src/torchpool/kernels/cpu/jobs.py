"""What is done with tensors: a kernel and its arguments, worked out for one call or for many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchpool.kernels.cpu import threads
from torchpool.kernels.cpu.shares import Call


class Job(NamedTuple):
    """A kernel, how many pieces of work it has, and its arguments for given arrays."""

    kernel: Any
    units: int
    arguments: Callable[..., tuple[Any, ...]]
    effort: float = 1
    """What a byte of input and output costs, as bytes that are only moved."""


def do(job: Job, traffic: int, arrays: tuple[Any, ...]) -> None:
    """Does a job once."""
    threads.run(job.kernel, job.units, int(job.effort * traffic), *job.arguments(*arrays))


class Prepared:
    """A job of which nothing but the elements changes.

    Args:
        job: what is done.
        likes: tensors like those that it is done with.
        arrays: tensors like `likes` as the job takes them.
        traffic: bytes moved, which decides whether threads pay; by default those of `likes`.
    """

    def __init__(
        self,
        job: Job,
        likes: tuple[Tensor, ...],
        arrays: Callable[..., tuple[Any, ...]],
        traffic: int | None = None,
    ) -> None:
        self._job, self._arrays = job, arrays
        if traffic is None:
            traffic = sum(like.nbytes for like in likes)
        self._traffic = int(job.effort * traffic)
        known = arrays(*likes)
        self._call = Call(job.kernel, job.units, job.arguments(*known), known)

    def run(self, *tensors: Tensor) -> None:
        """Does the job with tensors like those that it was prepared for."""
        job = self._job
        share = threads.split(job.units, self._traffic)
        if not self._call.run(*share, *[t.data_ptr() for t in tensors]):
            threads.fail(job.kernel, job.units, job.arguments(*self._arrays(*tensors)))


class Training(NamedTuple):
    """Both passes of a call, as functions of tensors like those that they were prepared for."""

    forward: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    """x -> the values of all windows, and what the backward pass needs."""
    backward: Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
    """The gradient by the values, in their layout, what was kept, and x if it was -> the gradient
    by x."""
    keeps_x: bool = False


def unwritten(shape: Any, stride: Any, dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU whose elements are yet to be written."""
    return torch.empty_strided(shape, stride, dtype=dtype, device="cpu")
