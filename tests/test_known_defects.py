"""What goes wrong elsewhere, each with its entry of docs/known-defects.md."""

from __future__ import annotations

import math
import warnings

import defects
import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from defects import defect

import torchpool as tp

TESTED = torch.__version__.startswith("2.13")
"""Whether torch is the version whose defects are shown."""


def test_the_page_is_up_to_date():
    assert defects.PAGE.read_text(encoding="utf-8") == defects.page(), "run python tests/defects.py"


@pytest.fixture
def _deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _everything(x: torch.Tensor) -> list[torch.Tensor]:
    """Results of the operators that torch has no deterministic implementation of."""
    samples = torch.full((*x.shape[:2], 2), 0.3)
    y, indices = tp.max_pool2d(x, 3, 1, 1, return_indices=True)
    return [
        tp.avg_pool3d(x.unsqueeze(2), (1, 3, 3), 1, (0, 1, 1)),
        tp.adaptive_avg_pool2d(x, (5, 3)),
        tp.adaptive_avg_pool3d(x.unsqueeze(2), (1, 5, 3)),
        tp.adaptive_max_pool2d(x, (5, 3)),
        tp.fractional_max_pool2d(x, 3, output_size=5, _random_samples=samples),
        tp.max_unpool2d(y, indices, 3, 1, 1),
    ]


@defect(
    1,
    "Several pooling operators have no deterministic backward, and raise in deterministic mode.",
    "Gradients are gathered, never added by atomics: the same bits every time, in every mode.",
    "#131972 #50198 #59783 #110698 #107011 #85425 #78249",
    seen=True,
)
@pytest.mark.usefixtures("_deterministic")
def test_the_same_bits_in_deterministic_mode():
    x = torch.randn(2, 3, 7, 8)
    if TESTED:
        y, indices = F.max_pool2d(x, 2, return_indices=True)
        with pytest.raises(RuntimeError, match="deterministic"):
            F.max_unpool2d(y, indices, 2)
    runs = []
    for _ in range(3):
        leaf = x.clone().requires_grad_()
        outputs = _everything(leaf)
        total = sum(y.square().sum() for y in outputs)
        runs.append([*outputs, *torch.autograd.grad(total, leaf)])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@defect(
    3,
    "Adaptive pooling cannot be exported where sizes do not divide or are dynamic.",
    "Exports as ordinary operators, for any sizes.",
    "#42653 #64806 #74034 #81551 pytorch/TensorRT#49 NVIDIA-AI-IOT/torch2trt#864",
    seen=True,
)
@pytest.mark.parametrize("reduction", [tp.Mean(), tp.Max()], ids=str)
def test_adaptive_pooling_exports(reduction):
    class Model(torch.nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def forward(self, x):
            return self.function(x)

    x = torch.randn(1, 2, 7, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if TESTED and reduction == tp.Max():
            with pytest.raises(torch.onnx.errors.OnnxExporterError):
                torch.onnx.export(
                    Model(lambda x: F.adaptive_max_pool2d(x, 3)), (x,), dynamo=True, verbose=False
                )
        model = Model(lambda x: tp.pool(x, reduction, tp.Adaptive(3)))
        size = torch.export.Dim("size", min=4, max=99)
        program = torch.export.export(model, (x,), dynamic_shapes={"x": {2: size}})
        targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
        assert not any("torchpool" in target for target in targets)
    for height in (7, 10):
        x = torch.randn(1, 2, height, 7)
        torch.testing.assert_close(program.module()(x), model(x))


@defect(
    4,
    "ONNX export forgets divisor_override: other numbers, no warning.",
    "Whatever ONNX cannot say in one operator is written out; results are checked in a runtime.",
    "#183528 #71549 #116420 microsoft/onnxruntime#15446 microsoft/onnxruntime#16203 "
    "microsoft/onnxruntime#16351 onnx/onnx#4958 apache/tvm#18594",
    seen=True,
)
def test_the_divisor_survives_export():
    import onnxruntime

    x = torch.randn(1, 1, 7, 7)
    wanted = F.avg_pool2d(x, 3, 2, 1, divisor_override=5)
    equal = []
    for function in (F.avg_pool2d, tp.avg_pool2d):

        class Model(torch.nn.Module):
            def forward(self, x, function=function):
                return function(x, 3, 2, 1, divisor_override=5)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            onnx = torch.onnx.export(Model(), (x,), dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(onnx.model_proto.SerializeToString())
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        equal.append(np.allclose(y, wanted.numpy(), atol=1e-6))
    assert equal[1]
    if TESTED:
        assert not equal[0]


@defect(
    5,
    "Padding is limited to half of the kernel and to both sides alike; there is no “same”.",
    'Any padding, on either side, "same", "same_lower" and "causal".',
    "#3298 #103423 #3867 keras-team/keras#5090 google-research/simclr#26",
    seen=True,
)
def test_any_padding():
    x = torch.randn(1, 2, 5, 7)
    with pytest.raises(RuntimeError, match="half"):
        F.max_pool2d(x, 2, padding=2)
    taps = [oracle.regular(5, 2, 2, 3, 0, 1, False), oracle.regular(7, 2, 2, 0, 4, 1, False)]
    wanted, _ = oracle.pool(x.double().numpy(), taps, "Max")
    got = tp.pool(x, tp.Max(), tp.Window(2, 2, padding=((3, 0), (0, 4))))
    assert torch.equal(got.double(), torch.from_numpy(wanted))
    for padding in ("same", "same_lower", "causal"):
        assert tp.pool(x, tp.Max(), tp.Window(3, 2, padding)).shape == (1, 2, 3, 4)


@defect(
    7,
    "Max pooling keeps int64 indices and its input for the backward pass.",
    "Keeps one byte per output and no input; mean pooling keeps nothing.",
    "#103785 #41099 Comfy-Org/ComfyUI#13389",
    seen=True,
)
@pytest.mark.parametrize("kernel", [3, 15])
def test_one_byte_per_output(kernel):
    def kept(function):
        sizes = {}

        def keep(t):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = function(torch.randn(1, 2, 40, 40, requires_grad=True))
        return sum(sizes.values()), y.numel()

    window = (kernel, 1, kernel // 2)
    theirs, outputs = kept(lambda x: F.max_pool2d(x, *window))
    assert theirs >= 12 * outputs
    assert kept(lambda x: tp.max_pool2d(x, *window))[0] == outputs
    assert kept(lambda x: tp.avg_pool2d(x, *window))[0] == 0


@defect(
    8,
    "Packages of the literature's poolings do not install, or compute something else than the "
    "paper: negative results cut to 0, overflow, a wrong gradient.",
    "Pure Python; each method is compared with naive loops in float64.",
    "alexandrosstergiou/SoftPool#34 alexandrosstergiou/SoftPool#30 alexandrosstergiou/SoftPool#23 "
    "alexandrosstergiou/SoftPool#37 alexandrosstergiou/SoftPool#45 alexandrosstergiou/SoftPool#31 "
    "alexandrosstergiou/SoftPool#38 tk1980/GaussianPooling#2",
)
def test_softmax_mean_is_the_papers():
    x = torch.tensor([[[-3.0, -1.0, 400.0, 401.0]]], dtype=torch.float64, requires_grad=True)
    y = tp.pool(x, tp.SoftmaxMean(1.0), tp.Window(2))
    shares = [math.exp(-2) / (1 + math.exp(-2)), math.exp(-1) / (1 + math.exp(-1))]
    wanted = [-1 - 2 * shares[0], 401 - shares[1]]
    torch.testing.assert_close(y.flatten(), torch.tensor(wanted, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda t: tp.pool(t, tp.SoftmaxMean(1.0), tp.Window(2)), x)


@defect(
    9,
    "Odd arguments overflow 32-bit sizes, read foreign memory or end the interpreter.",
    "Sizes have 64 bits, and what is impossible raises an exception that names the argument.",
    "#52822 #84018 #68418 #38764 #145349 #189664 #81409 #42582 #91553 FluxML/NNlib.jl#508",
)
def test_odd_arguments_raise():
    x = torch.randn(1, 1, 6, 6)
    big = 2**62
    impossible = [
        lambda: tp.max_pool2d(x, big),
        lambda: tp.max_pool2d(x, 2, dilation=big),
        lambda: tp.max_pool2d(x, -1),
        lambda: tp.max_pool2d(x, 2, stride=0),
        lambda: tp.avg_pool2d(x, 2, divisor_override=0),
        lambda: tp.adaptive_max_pool2d(x, -3),
        lambda: tp.max_pool2d(torch.randn(1, 1, 0, 6), 2),
        lambda: tp.fractional_max_pool2d(x, 9, output_size=3),
        lambda: tp.max_unpool2d(torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), big), 2),
        lambda: tp.max_unpool2d(torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), -1), 2),
        lambda: tp.lp_pool2d(x, 2.0, (1, 2, 3)),
    ]
    for call in impossible:
        with pytest.raises((ValueError, TypeError)):
            call()
    assert tp.max_pool2d(x, 2, stride=big).shape == (1, 1, 1, 1)
    assert tp.Window(3, 2, 1).out_size(2**40) == 2**39


@defect(
    10,
    "On some devices adaptive sizes must divide, or give wrong values.",
    "One reference of ordinary operators runs on every device.",
    "#97109 #143864 #190064",
)
@pytest.mark.parametrize("sizes", [(3, 4), (7, 11), (9, 13)])
def test_the_reference_takes_any_sizes(sizes, monkeypatch):
    monkeypatch.setenv("TORCHPOOL_BACKEND", "reference")
    x = torch.randn(2, 3, 7, 11)
    torch.testing.assert_close(tp.adaptive_avg_pool2d(x, sizes), F.adaptive_avg_pool2d(x, sizes))
    assert torch.equal(tp.adaptive_max_pool2d(x, sizes), F.adaptive_max_pool2d(x, sizes))
    meta = tp.pool(torch.empty(2, 3, 7, 11, device="meta"), tp.Mean(), tp.Adaptive(sizes))
    assert meta.shape == (2, 3, *sizes)


@defect(
    11,
    "Whole numbers, bool and half types are refused by some operators and taken by others.",
    "All real dtypes for every reduction; half types are computed in float32.",
    "#33086 #107412 #136110 #139115",
    seen=True,
)
@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64],
    ids=str,
)
def test_every_dtype(dtype):
    x = torch.arange(8).reshape(1, 1, 2, 2, 2).to(dtype)
    if TESTED and dtype != torch.int64:
        with pytest.raises(NotImplementedError, match="not implemented for"):
            F.avg_pool3d(x, 2)
    assert tp.avg_pool3d(x, 2).item() == (3.5 if dtype.is_floating_point else 3)
    assert tp.adaptive_avg_pool3d(x, 1).dtype == dtype
    assert tp.max_pool3d(x, 2).item() == 7
    assert tp.pool(x > 3, tp.Max(), tp.Global()).item() is True
    assert tp.pool(x > 3, tp.Mean(), tp.Global()).item() == 0.5


@defect(
    12,
    "Rules for NaN and ties vary with the memory layout and the lane of the vector unit: the index "
    "of an all -inf window, say.",
    "One rule for every layout: the first of equals wins, the last NaN.",
    "#7645 #39846 #39044 #40131 tensorflow/tensorflow#125965",
    seen=True,
)
def test_the_index_of_a_window_of_minus_infinity():
    x = torch.full((1, 17, 4, 4, 4), -math.inf)
    last = x.contiguous(memory_format=torch.channels_last_3d)
    theirs = [F.max_pool3d(t, 2, return_indices=True)[1] for t in (x, last)]
    if TESTED:
        assert not torch.equal(*theirs)
    for t in (x, last):
        assert torch.equal(tp.max_pool3d(t, 2, return_indices=True)[1], theirs[0])
    x[0, :, 0, 0, 0] = x[0, :, 1, 1, 0] = math.nan
    for t in (x, x.contiguous(memory_format=torch.channels_last_3d)):
        y, indices = tp.max_pool3d(t, 2, return_indices=True)
        assert y[0, :, 0, 0, 0].isnan().all()
        assert (indices[0, :, 0, 0, 0] == 20).all()


@defect(
    13,
    "The Lp norm of negative numbers is NaN for odd and broken p; no padding, no p to learn.",
    "(Σ|x|^p)^(1/p), with a gradient of 0 at 0, p = ∞, any padding, and p as a parameter.",
    "#184037 #134841 #80380 #91593",
    seen=True,
)
@pytest.mark.parametrize("p", [1.0, 2.5, 3.0, math.inf])
def test_lp_of_negative_numbers(p):
    x = torch.tensor([[[-1.0, -2.0, 0.0, 0.0]]], requires_grad=True)
    if TESTED and math.isfinite(p) and p > 1:
        assert F.lp_pool1d(x, p, 2).isnan().any()
    y = tp.pool(x, tp.Lp(p), tp.Window(2))
    norm = 2.0 if math.isinf(p) else (1 + 2**p) ** (1 / p)
    torch.testing.assert_close(y.flatten(), torch.tensor([norm, 0.0]))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.isfinite().all()
    assert gradient[..., 2:].count_nonzero() == 0


@defect(
    14,
    "Unpooling to one place twice has no defined result, and sends the gradient to the loser too.",
    "The last value wins, in row-major order, and it alone gets the gradient.",
    "#80204 #80827",
    seen=True,
)
def test_unpooling_to_one_place_twice():
    indices = torch.tensor([[[0, 0]]])
    gradients = []
    for unpool in (F.max_unpool1d, tp.max_unpool1d):
        x = torch.tensor([[[1.0, 2.0]]], requires_grad=True)
        y = unpool(x, indices, 2)
        gradients.append(torch.autograd.grad(y.sum(), x)[0].tolist())
    assert y.tolist() == [[[2.0, 0.0, 0.0, 0.0]]]
    assert gradients[1] == [[[0.0, 1.0]]]
    if TESTED:
        assert gradients[0] == [[[1.0, 1.0]]]


@defect(
    15,
    "Compiled pooling differs from eager, or falls back, for large windows, dilation and divisors.",
    "Operators of our own with shapes for the compiler: full graphs, the same results.",
    "#164178 #166662 #183249 #198119 #195123",
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_pooling_is_eager_pooling(dynamic):
    torch._dynamo.reset()

    def run(x):
        return (
            tp.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
            tp.avg_pool2d(x, 13, 1, 6, divisor_override=7),
            tp.max_pool2d(x, 4, 3, 1, dilation=3),
            tp.lp_pool2d(x, 3.0, 11, 2),
        )

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    a, b = (torch.linspace(-2, 3, 289).reshape(1, 1, 17, 17).requires_grad_() for _ in range(2))
    got, wanted = compiled(a), run(b)
    for mine, eager in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, eager)
    totals = (sum(y.square().sum() for y in outputs) for outputs in (got, wanted))
    gradients = [torch.autograd.grad(t, x)[0] for t, x in zip(totals, (a, b), strict=True)]
    torch.testing.assert_close(*gradients)


@defect(
    16,
    "channels_last takes other code, which is slow backward at a batch of one.",
    "Both layouts are native: same values, same gradients, output in the layout of the input.",
    "#59168 #42779 #97775",
)
@pytest.mark.parametrize("reduction", [tp.Max(), tp.Mean()], ids=str)
def test_channels_last_at_a_batch_of_one(reduction):
    x = torch.randn(1, 19, 12, 14)
    made = []
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = x.clone(memory_format=layout).requires_grad_()
        y = tp.pool(leaf, reduction, tp.Window(3, 2, 1))
        assert y.is_contiguous(memory_format=layout)
        (gradient,) = torch.autograd.grad(y.square().sum(), leaf)
        assert gradient.is_contiguous(memory_format=layout)
        made.append((y, gradient))
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@defect(
    17,
    "Sums in half precision overflow or stop growing: ones can average to 0.5, a norm to infinity.",
    "Half types are accumulated in float32 and rounded once, forward and backward.",
    "ROCm/MIOpen#2109 huggingface/candle#3719",
    seen=True,
)
def test_half_sums():
    ones = torch.ones(1, 1, 64, 64, dtype=torch.float16)
    assert tp.avg_pool2d(ones, 64).item() == 1
    assert tp.pool(ones * 60000, tp.Mean(), tp.Global()).item() == 60000
    loud = torch.full((1, 1, 8, 8), 300.0, dtype=torch.float16)
    if TESTED:
        assert F.lp_pool2d(loud, 2, 8).isinf().all()
    assert tp.lp_pool2d(loud, 2, 8).item() == 2400


@defect(
    19,
    "No dilation for averages and norms, and one or two leading axes only.",
    "Any window with any reduction, over any axes.",
    "#14907 #18728 #108197",
    seen=True,
)
def test_dilation_and_leading_axes():
    x = torch.randn(2, 3, 4, 9)
    with pytest.raises(RuntimeError):
        F.max_pool1d(x, 2)
    taps = [oracle.regular(9, 3, 2, 1, 1, 2, False)]
    for reduction, p in ((tp.Mean(), 0.0), (tp.Lp(3.0), 3.0)):
        y = tp.pool(x, reduction, tp.Window(3, 2, 1, dilation=2), dims=(-1,))
        name = type(reduction).__name__
        wanted, _ = oracle.pool(x.double().flatten(0, 1).numpy(), taps, name, p)
        torch.testing.assert_close(y.flatten(0, 1).double(), torch.from_numpy(wanted))


@defect(
    20,
    "Random windows take no generator: a run cannot be repeated.",
    "Takes a generator, or the samples themselves.",
    "#171258 #173985",
)
def test_random_windows_can_be_repeated():
    x = torch.randn(2, 3, 11, 13)
    made = [
        tp.pool(
            x,
            tp.Max(),
            tp.Fractional(2, output_ratio=0.6, generator=torch.Generator().manual_seed(5)),
        )
        for _ in range(2)
    ]
    assert torch.equal(*made)
    samples = torch.rand(2, 3, 2)
    fixed = tp.Fractional(2, output_size=(5, 6), samples=samples)
    assert torch.equal(tp.pool(x, tp.Max(), fixed), tp.pool(x, tp.Max(), fixed))


@defect(
    21,
    "On CUDA the gradient of a padded average over a channels-last input is wrong, silently.",
    "One gather serves both layouts, on every device.",
    "#188344 #107201",
)
def test_gradients_of_padded_averages_channels_last():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    last = x.to(device).to(memory_format=torch.channels_last).requires_grad_()
    gradients = []
    for leaf, pool in ((x.requires_grad_(), F.avg_pool2d), (last, tp.avg_pool2d)):
        y = pool(leaf, 3, 1, 1)
        upstream = torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape).to(y)
        (gradient,) = torch.autograd.grad(y, leaf, upstream)
        gradients.append(gradient.cpu())
    torch.testing.assert_close(*gradients)
