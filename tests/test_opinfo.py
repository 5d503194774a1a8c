"""Every sample of torch's own operator database gives torch's values, indices and gradients."""

from __future__ import annotations

import pytest
import torch
from cases import TOLERANCE
from torch.testing._internal import common_utils
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


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Samples are small: waking a second thread takes longer than to pool them. And the database
    seeds before each of its calls, which formats three stack traces for other devices' sake, and
    looks through the stack for torch's own test of each sample, which it is not part of."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "manual_seed", torch.default_generator.manual_seed)
        patch.setattr(common_utils, "extract_test_fn", lambda: None)
        yield
    torch.set_num_threads(before)


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
    return outputs, torch.autograd.grad(outputs[0], x, _weights(outputs[0], x.dtype))[0]


def _weights(y, dtype):  # type: ignore[no-untyped-def]
    return torch.linspace(-1, 1, y.numel(), dtype=dtype).reshape(y.shape)


def _accepted(op, x):  # type: ignore[no-untyped-def]
    """The input in a layout that torch takes: it refuses unbatched volumes whose strides read as
    channels_last, and counts the positions of channels_last volumes in the input's own dtype."""
    refused = op.name.endswith("max_pool3d") and (
        x.ndim == 4 or x.dtype in (torch.int8, torch.uint8)
    )
    return x.contiguous() if refused else x


def _accurate(op, x, sample):  # type: ignore[no-untyped-def]
    """Torch's gradient in float32, rounded once: in half types torch's own kernels round every
    addition. Where windows are drawn, in each type others, torch's indices tell what they hold."""
    function = op.op
    if "fractional" not in op.name:
        wide = x.float().requires_grad_()
        y = function(wide, *sample.args, **sample.kwargs)
        y = y[0] if isinstance(y, tuple) else y
        return torch.autograd.grad(y, wide, _weights(y, x.dtype).float())[0].to(x.dtype)
    torch.manual_seed(SEED)
    _, indices = function(x, *sample.args, **{**sample.kwargs, "return_indices": True})
    planes = x.ndim - (3 if "3d" in op.name else 2)
    gradient = torch.zeros(x.shape).flatten(planes)
    sent = _weights(indices, x.dtype).float().flatten(planes)
    return gradient.scatter_add_(-1, indices.flatten(planes), sent).view(x.shape).to(x.dtype)


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
                want, gradient = _run(theirs, _accepted(op, x), sample, grad)
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
                    if dtype in (torch.float16, torch.bfloat16):
                        gradient = _accurate(op, _accepted(op, x), sample)
                    torch.testing.assert_close(found, gradient, equal_nan=True, **TOLERANCE[dtype])
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
