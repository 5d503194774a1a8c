"""torchpool among torch's own: compile, export, functional transforms, autocast, threads, forks,
memory."""

from __future__ import annotations

import copy
import functools
import importlib
import multiprocessing
import os
import pickle
import threading
import warnings

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

import torchpool as tp
from torchpool import ops

REDUCTIONS = [
    tp.Max(),
    tp.Min(),
    tp.Mean(),
    tp.SoftmaxMean(2.0),
    tp.Lp(3.0),
    tp.LogMeanExp(1.5),
    tp.Std(),
]
WINDOWS = [
    tp.Window(3, 2, 1),
    tp.Window(2, 1, padding=((1, 0), (2, 2))),
    tp.Adaptive((3, 2)),
    tp.Global(),
]


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_equals_eager(reduction, dynamic):
    torch._dynamo.reset()

    def run(x):
        return sum(tp.pool(x.sin(), reduction, w).square().sum() for w in WINDOWS)

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in ((2, 3, 9, 11), (2, 3, 12, 14)):
        a, b = (
            torch.linspace(-2, 3, int(np.prod(size))).reshape(size).requires_grad_()
            for _ in range(2)
        )
        torch.testing.assert_close(compiled(a), run(b))
        (ga,), (gb,) = torch.autograd.grad(compiled(a), a), torch.autograd.grad(run(b), b)
        torch.testing.assert_close(ga, gb)


@pytest.mark.parametrize(
    "layer", [tp.nn.MaxPool2d(2), tp.nn.Pool(tp.Max(), tp.Window(2))], ids=["drop-in", "Pool"]
)
def test_nothing_is_compiled_twice(layer):
    """A float of a signature or a layer, as a `fill` of 0.0, is taken for an input that may change,
    and the graph is made again once it turns out not to be one."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for size in ((2, 3, 9, 11), (2, 3, 12, 14)):
        x = torch.randn(size)
        assert torch.equal(compiled(x), layer(x))
    assert counter.frame_count == 1


def test_a_compiled_graph_holds_our_operators(monkeypatch):
    """Also under torch 2.10 and 2.11, whose compiler says that every graph is exported."""
    torch._dynamo.reset()
    answers = torch._dynamo.variables.TorchInGraphFunctionVariable._get_handlers()
    yes = lambda *_: torch._dynamo.variables.ConstantVariable.create(True)  # noqa: E731
    monkeypatch.setitem(answers, torch.compiler.is_exporting, yes)
    found = []

    def keep(graph, _inputs):
        found.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    pool = lambda x: tp.pool(tp.max_pool2d(x, 3, 2, 1), tp.SoftmaxMean(1.0), tp.Window(2))  # noqa: E731
    x = torch.randn(2, 3, 9, 11)
    compiled = torch.compile(pool, fullgraph=True, backend=keep)
    torch.testing.assert_close(compiled(x), pool(x))
    assert [target for target in found if target.startswith("torchpool")] == [
        "torchpool.select",
        "torchpool.accumulate",
    ]


def test_compiled_with_inductor():
    torch._dynamo.reset()
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        tp.nn.MaxPool2d(2),
        tp.nn.Pool(tp.PowerMean(3.0, learnable=True), tp.Adaptive(1)),
    )
    x = torch.randn(2, 3, 12, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(net, fullgraph=True)
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_operators_pass_opcheck(layout):
    x = torch.randn(2, 3, 7, 8).contiguous(memory_format=layout).requires_grad_()
    axes = ops.pack(tp.Window(3, 2, 1).axes((7, 8)))
    mask, weights = torch.rand(2, 3, 7, 8) > 0.3, torch.rand(2, 3, 7, 8).requires_grad_()
    own = torch.ops.torchpool
    torch.library.opcheck(own.select.default, (x, mask, None, tp.Max().spec, axes, True))
    y, state = own.select(x, None, None, tp.Max().spec, axes, True)
    grad = torch.randn_like(y).requires_grad_()
    channels_last = layout == torch.channels_last
    torch.library.opcheck(own.select_backward.default, (grad, state, None, axes, channels_last))
    torch.library.opcheck(own.select_take.default, (x, state, None, axes))
    for reduction, p in ((tp.Mean(), None), (tp.SoftmaxMean(), torch.ones(1, requires_grad=True))):
        spec = reduction.spec
        torch.library.opcheck(
            own.accumulate.default, (x, torch.ones_like(mask), weights, p, None, spec, axes, True)
        )
        y, stats = own.accumulate(x, None, None, p, None, spec, axes, True)
        grad = torch.randn_like(y).requires_grad_()
        arguments = (
            grad,
            x,
            None,
            None,
            p,
            None,
            stats.detach(),
            spec,
            axes,
            channels_last,
            [True, False, p is not None],
        )
        torch.library.opcheck(own.accumulate_backward.default, arguments)


@pytest.mark.parametrize("reduction", [*REDUCTIONS, tp.Var()], ids=str)
def test_functional_transforms(reduction):
    def run(t):
        return tp.pool(t, reduction, tp.Window(3, 2, 1))

    def loss(t):
        return run(t).square().sum()

    x, v = (
        torch.randn(4, 2, 3, 7, 8, dtype=torch.float64),
        torch.randn(2, 3, 7, 8, dtype=torch.float64),
    )
    assert torch.equal(torch.vmap(run)(x), torch.stack([run(t) for t in x]))
    assert torch.equal(
        torch.vmap(run, in_dims=2)(x.movedim(0, 2)), torch.stack([run(t) for t in x])
    )
    each = torch.stack([torch.func.grad(loss)(t) for t in x])
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(x), each)
    _, tangent = torch.func.jvp(run, (x[0],), (v,))
    step = 1e-6
    torch.testing.assert_close(
        tangent, (run(x[0] + step * v) - run(x[0] - step * v)) / (2 * step), rtol=1e-5, atol=1e-6
    )
    leaf = x[0].clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(loss(leaf), leaf)[0], each[0])


BATCHED = {
    **{str(r): lambda t, r=r: tp.pool(t, r, tp.Window(3, 2, 1)) for r in REDUCTIONS},
    "learned": tp.nn.Pool(tp.SoftmaxMean(1.0, learnable=True), tp.Window(3, 2, 1)),
    "channels last": lambda t: tp.max_pool2d(t.contiguous(memory_format=torch.channels_last), 2),
    "segments": lambda t: tp.segment_pool(t[0], tp.Std(), dim=1, offsets=torch.tensor([0, 3, 7])),
    "lengths": lambda t: tp.pool(
        t[0], tp.Max(), tp.Global(), lengths=torch.tensor([3, 7, 0]), dims=1
    ),
    "unpooling": lambda t: tp.max_unpool2d(*tp.max_pool2d(t, 2, return_indices=True), 2),
}


@pytest.mark.parametrize("run", BATCHED.values(), ids=BATCHED)
def test_batches_of_gradients(run):
    """`is_grads_batched`, on which torch's own vectorised Jacobians and Hessians stand."""
    x = torch.randn(1, 3, 7, 8, dtype=torch.float64, requires_grad=True)
    y = run(x)
    upstream = torch.randn(4, *y.shape, dtype=torch.float64)
    (batch,) = torch.autograd.grad(y, x, upstream, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in upstream]
    assert torch.equal(batch, torch.stack(each))
    cubes = lambda t: run(t).pow(3).sum()  # noqa: E731
    hessian = torch.autograd.functional.hessian
    torch.testing.assert_close(hessian(cubes, x, vectorize=True), hessian(cubes, x))


def _along(transform, gradient, upstream, direction):
    """The directional derivative of a gradient by what comes from above."""
    if transform == "torch.func.jvp":
        return torch.func.jvp(gradient, (upstream,), (direction,))[1]
    with forward_ad.dual_level():
        found = gradient(forward_ad.make_dual(upstream, direction))
        return forward_ad.unpack_dual(found).tangent


@pytest.mark.parametrize("transform", ["dual_level", "torch.func.jvp"])
@pytest.mark.parametrize("lengths", [None, torch.tensor([4, 6])], ids=["grid", "ragged"])
@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
def test_a_gradient_carries_the_tangent_of_what_comes_from_above(reduction, lengths, transform):
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    weights = None if isinstance(reduction, (tp.Max, tp.Min)) else torch.rand_like(x) + 0.5
    y = tp.pool(x, reduction, tp.Window(3, 2, 1), weights=weights, lengths=lengths)
    upstream, direction = torch.randn_like(y), torch.randn_like(y)
    leaf = upstream.clone().requires_grad_()
    (gx,) = torch.autograd.grad(y, x, leaf, create_graph=True)

    def gradient(g):
        return torch.autograd.grad(y, x, g, retain_graph=True)[0]

    def gradient_of_gradient(g):
        return torch.autograd.grad(gx, leaf, g, retain_graph=True)[0]

    # Both are linear in what comes from above.
    found = _along(transform, gradient, upstream, direction)
    torch.testing.assert_close(found, gradient(direction))
    found = _along(transform, gradient_of_gradient, torch.randn_like(x), x.detach())
    torch.testing.assert_close(found, gradient_of_gradient(x.detach()))


PLAIN = {
    tp.Max(): lambda x: F.max_pool2d(x, 2, 1),
    tp.Mean(): lambda x: F.avg_pool2d(x, 2, 1),
    tp.Lp(3.0): lambda x: F.avg_pool2d(x.abs() ** 3, 2, 1).mul(4) ** (1 / 3),
    tp.SoftmaxMean(1.0): lambda x: F.avg_pool2d(x.exp() * x, 2, 1) / F.avg_pool2d(x.exp(), 2, 1),
    tp.Var(): lambda x: F.avg_pool2d(x.square(), 2, 1) - F.avg_pool2d(x, 2, 1).square(),
}
"""Poolings of windows of 2x2 at stride 1, out of torch's own operators."""


@pytest.mark.parametrize("reduction", PLAIN, ids=str)
def test_third_derivatives(reduction):
    x, found = torch.randn(1, 2, 3, 4, dtype=torch.float64), []
    for pool in (lambda t: tp.pool(t, reduction, tp.Window(2, 1)), PLAIN[reduction]):
        leaf = x.clone().requires_grad_()
        total = pool(leaf).pow(3).sum()
        for _ in range(2):
            (derivative,) = torch.autograd.grad(total, leaf, create_graph=True)
            total = derivative.square().sum()
        found.append(torch.autograd.grad(total, leaf)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("reduction", PLAIN, ids=str)
def test_forward_over_reverse(reduction):
    x, v = (torch.randn(1, 2, 3, 4, dtype=torch.float64) for _ in range(2))

    def loss(t):
        return tp.pool(t, reduction, tp.Window(2, 1)).pow(3).sum()

    def plain_loss(t):
        return PLAIN[reduction](t).pow(3).sum()

    wanted = torch.autograd.functional.hessian(plain_loss, x)
    torch.testing.assert_close(torch.func.hessian(loss)(x), wanted)
    _, tangent = torch.func.jvp(torch.func.grad(loss), (x,), (v,))
    torch.testing.assert_close(tangent, torch.einsum("abcdefgh,efgh->abcd", wanted, v))
    leaf = x.clone().requires_grad_()
    with forward_ad.dual_level():
        (found,) = torch.autograd.grad(loss(forward_ad.make_dual(leaf, v)), leaf)
        torch.testing.assert_close(forward_ad.unpack_dual(found).tangent, tangent)


def test_autocast_copies_and_pickles():
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = tp.nn.MaxPool2d(2)(F.conv2d(x, torch.randn(4, 3, 3, 3)))
    assert y.dtype == torch.bfloat16
    layer = tp.nn.Pool(tp.PowerMean(2.5, learnable=True), tp.Window(2), channels=3)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    assert pickle.loads(pickle.dumps(tp.Window(3, 2, "same"))) == tp.Window(3, 2, "same")
    assert pickle.loads(pickle.dumps(tp.Lp(3.0))) == tp.Lp(3.0)


class _Wrapped(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


EXPORTED = {
    "max": lambda x: tp.max_pool2d(x, 3, 2, 1),
    "max, ceil_mode": lambda x: tp.max_pool2d(x, 3, 2, 1, ceil_mode=True),
    "avg": lambda x: tp.avg_pool2d(x, 3, 2, 1),
    "avg, ceil_mode": lambda x: tp.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
    "avg, divisor_override": lambda x: tp.avg_pool2d(x, 3, 2, 1, divisor_override=5),
    "adaptive avg": lambda x: tp.adaptive_avg_pool2d(x, (5, 3)),
    "adaptive max": lambda x: tp.adaptive_max_pool2d(x, (5, 3)),
    "global avg": lambda x: tp.adaptive_avg_pool2d(x, 1),
    "PowerMean": lambda x: tp.pool(x, tp.PowerMean(3.0), tp.Global()),
    "SoftmaxMean": lambda x: tp.pool(x, tp.SoftmaxMean(2.0), tp.Window(2)),
    "Std, same": lambda x: tp.pool(x, tp.Std(), tp.Window(3, 2, "same")),
    "Min": lambda x: tp.pool(x, tp.Min(), tp.Window(2)),
}


@pytest.fixture(scope="module")
def one_registry():
    """What ONNX knows of torch's operators, collected once: a fifth of the time of an export."""
    registry = importlib.import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
    with pytest.MonkeyPatch.context() as patch:
        once = staticmethod(functools.cache(registry.from_torchlib))
        patch.setattr(registry, "from_torchlib", once)
        yield


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.usefixtures("one_registry")
def test_exported_graphs_are_ordinary_and_run_elsewhere(name, dynamic):
    import onnxruntime

    function = EXPORTED[name]
    free = {
        i: torch.export.Dim(s, min=low, max=400)
        for i, s, low in ((0, "n", 1), (2, "h", 8), (3, "w", 8))
    }
    shapes = {"x": free} if dynamic else None
    sizes = [(2, 3, 13, 11), *([(1, 3, 17, 14), (4, 3, 8, 30)] if dynamic else [])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            _Wrapped(function),
            (torch.randn(sizes[0]),),
            dynamic_shapes={"x": free} if dynamic else None,
        )
        targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert not any("torchpool" in target for target in targets)
        onnx = torch.onnx.export(program, dynamo=True, verbose=False, dynamic_shapes=shapes)
    session = onnxruntime.InferenceSession(onnx.model_proto.SerializeToString())
    for size in sizes:
        x = torch.randn(size)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(y, function(x).numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("free", [(2,), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("reduction", [tp.Max(), tp.Mean(), tp.Lp(3.0)], ids=str)
def test_adaptive_windows_export_with_any_of_their_sizes_free(reduction, free):
    model = _Wrapped(lambda x: tp.pool(x, reduction, tp.Adaptive((3, 2))))
    sizes = {dim: torch.export.Dim(f"s{dim}", min=4, max=99) for dim in free}
    program = torch.export.export(model, (torch.randn(1, 2, 7, 9),), dynamic_shapes={"x": sizes})
    for shape in ((7, 9), (6, 8), (23, 31)):
        x = torch.randn(1, 2, *(shape[d - 2] if d in free else (7, 9)[d - 2] for d in (2, 3)))
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


def _saved(function, x):
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = function(x.requires_grad_())
    return sum(kept.values()), y


def test_what_is_saved_for_backward():
    x = torch.randn(2, 4, 32, 32)
    for window in (tp.Window(2), tp.Window(3, 2, 1), tp.Window(16, 1)):
        saved, y = _saved(lambda t, window=window: tp.pool(t, tp.Max(), window), x)
        assert saved == y.numel()
    saved, y = _saved(lambda t: tp.pool(t, tp.Max(), tp.Global()), x)
    assert saved == 2 * y.numel()
    assert _saved(lambda t: tp.pool(t, tp.Mean(), tp.Window(3, 2, 1)), x)[0] == 0


def _in_a_child(queue, x):
    torch.set_num_threads(1)  # as DataLoader does: torch's own thread pool does not survive a fork
    y = tp.max_pool2d(x, 3, 2, 1)
    queue.put(float(y.sum() + tp.pool(x, tp.SoftmaxMean(), tp.Window(2)).sum()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
def test_forked_children():
    x = torch.randn(4, 16, 64, 64)
    want = float(tp.max_pool2d(x, 3, 2, 1).sum() + tp.pool(x, tp.SoftmaxMean(), tp.Window(2)).sum())
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_a_child, args=(queue, x))
    child.start()
    child.join(120)
    assert child.exitcode == 0
    assert queue.get() == pytest.approx(want, rel=1e-5)


def test_several_python_threads():
    x = torch.randn(4, 16, 64, 64)
    want = tp.max_pool2d(x, 3, 2, 1), tp.avg_pool2d(x, 2)
    failures = []

    def work():
        for _ in range(20):
            if not (
                torch.equal(tp.max_pool2d(x, 3, 2, 1), want[0])
                and torch.equal(tp.avg_pool2d(x, 2), want[1])
            ):
                failures.append("differs")

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
