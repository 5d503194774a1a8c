"""Every sample of torch's own operator database gives torch's values, indices and gradients."""

from __future__ import annotations

import pytest
import torch
from cases import TOLERANCE
from torch.testing._internal.common_methods_invocations import op_db

import torchpool as tp

OPERATORS = [
    op
    for op in op_db
    if "pool" in op.name
    and hasattr(tp, op.name.split(".")[-1])
    and op.name != "max_pool2d_with_indices_backward"
]
SEED = 42  # what the database seeds its random operators with


def test_the_database_holds_what_we_think():
    names = {op.name.split(".")[-1] for op in OPERATORS}
    kinds = ("max_pool", "avg_pool", "max_unpool", "adaptive_max_pool", "adaptive_avg_pool")
    assert {f"{kind}{d}d" for kind in kinds for d in (1, 2, 3)} <= names
    assert {"fractional_max_pool2d", "fractional_max_pool3d"} <= names


def _formats(x: torch.Tensor) -> list[torch.Tensor]:
    other = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    return [x] if other is None else [x, x.contiguous(memory_format=other)]


def _run(function, x, sample, grad):  # type: ignore[no-untyped-def]
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(grad)
    torch.manual_seed(SEED)
    outputs = function(x, *sample.args, **sample.kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not grad:
        return outputs, None
    weights = torch.linspace(-1, 1, outputs[0].numel(), dtype=x.dtype).reshape(outputs[0].shape)
    return outputs, torch.autograd.grad(outputs[0], x, weights)[0]


def _accurate(function, x, sample):  # type: ignore[no-untyped-def]
    """Torch's gradient in float32, rounded once: in half types torch's own kernels round every
    addition."""
    _, gradient = _run(function, x.float(), sample, True)
    return gradient.to(x.dtype)


@pytest.mark.parametrize(
    "op",
    OPERATORS,
    ids=lambda op: f"{op.name.split('.')[-1]}{op.variant_test_name and '-' + op.variant_test_name}",
)
def test_samples(op):
    ours, theirs = getattr(tp, op.name.split(".")[-1]), op.op
    unpool = "unpool" in op.name
    seen = 0
    for dtype in sorted(op.supported_dtypes("cpu"), key=str):
        grad = (
            dtype.is_floating_point and dtype in op.supported_backward_dtypes("cpu") and not unpool
        )
        for sample in op.sample_inputs("cpu", dtype):
            for x in _formats(sample.input):
                if op.name.endswith("max_pool3d") and x.ndim == 4 and not x.is_contiguous():
                    continue  # torch refuses a volume whose strides read as channels_last
                want, gradient = _run(theirs, x, sample, grad)
                got, found = _run(ours, x, sample, grad)
                assert len(got) == len(want)
                for a, b in zip(got, want, strict=True):
                    assert (a.dtype, a.shape) == (b.dtype, b.shape)
                    tight = (
                        {"rtol": 0, "atol": 0}
                        if "max" in op.name or not dtype.is_floating_point
                        else TOLERANCE[dtype]
                    )
                    torch.testing.assert_close(a, b, equal_nan=True, **tight)
                if grad:
                    tolerance = TOLERANCE[dtype]
                    if dtype in (torch.float16, torch.bfloat16):
                        if "fractional" in op.name:  # in float32 it would draw other windows
                            tolerance = {name: 4 * bound for name, bound in tolerance.items()}
                        else:
                            gradient = _accurate(theirs, x, sample)
                    torch.testing.assert_close(found, gradient, equal_nan=True, **tolerance)
                seen += 1
    assert seen


@pytest.mark.parametrize(
    "op", [op for op in OPERATORS if op.error_inputs_func], ids=lambda op: op.name.split(".")[-1]
)
def test_error_inputs_raise(op):
    ours = getattr(tp, op.name.split(".")[-1])
    for error in op.error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            ours(sample.input, *sample.args, **sample.kwargs)
