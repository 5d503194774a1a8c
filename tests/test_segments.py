"""Segments of packed rows against naive loops, torch.segment_reduce and graph networks."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from cases import ACCUMULATIONS, SELECTIONS, TOLERANCE

import torchpool as tp

named = {"ids": str}
OFFSETS = torch.tensor([0, 7, 7, 8, 50, 53])
INDEX = torch.repeat_interleave(OFFSETS.diff())


def rows(channels=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(53, channels, generator=generator, dtype=torch.float64) + 0.1


def expected(x, reduction, weights=None, fill=0.0):
    """Each segment by the oracle, as the one window of its rows."""
    p = reduction.value if reduction.value is not None else 0.0
    made = []
    for begin, end in zip(OFFSETS[:-1].tolist(), OFFSETS[1:].tolist(), strict=True):
        taps = [[list(range(begin, end))]]
        w = None if weights is None else weights.T[None].numpy()
        y = oracle.pool(x.T[None].numpy(), taps, type(reduction).__name__, p, None, w, fill)
        made.append(y[0][0, :, 0])
    return torch.from_numpy(np.stack(made))


@pytest.mark.parametrize("channels", [1, 5, 20, 300])
@pytest.mark.parametrize("reduction", [*SELECTIONS, *ACCUMULATIONS], **named)
def test_against_the_oracle(reduction, channels):
    x = rows(channels)
    y = tp.segment_pool(x, reduction, offsets=OFFSETS, fill=-3.0)
    torch.testing.assert_close(y, expected(x, reduction, fill=-3.0), **TOLERANCE[x.dtype])
    shuffle = torch.randperm(53, generator=torch.Generator().manual_seed(1))
    for given, index in ((x, INDEX), (x[shuffle], INDEX[shuffle])):
        made = tp.segment_pool(given, reduction, index=index, num_segments=5, fill=-3.0)
        torch.testing.assert_close(made, y, **TOLERANCE[x.dtype])


@pytest.mark.parametrize("name", ["sum", "mean", "max", "min"])
def test_as_torch_segment_reduce(name):
    x = rows().requires_grad_()
    reduction = {"sum": tp.Sum(), "mean": tp.Mean(), "max": tp.Max(), "min": tp.Min()}[name]
    full = torch.tensor([0, 7, 8, 50, 53])  # torch fills empty segments with other values
    ours = tp.segment_pool(x, reduction, offsets=full)
    theirs = torch.segment_reduce(x, name, offsets=full)
    torch.testing.assert_close(ours, theirs)
    slopes = torch.randn(4, 5, dtype=x.dtype)
    grads = [torch.autograd.grad(y, x, slopes)[0] for y in (ours, theirs)]
    torch.testing.assert_close(*grads)


PLAIN = {
    tp.Sum(): lambda rows: rows.sum(0),
    tp.Mean(): lambda rows: rows.mean(0),
    tp.Max(): lambda rows: rows.amax(0),
    tp.Min(): lambda rows: rows.amin(0),
    tp.PowerMean(2.0): lambda rows: rows.square().mean(0).sqrt(),
    tp.SoftmaxMean(0.5): lambda rows: (rows.mul(0.5).softmax(0) * rows).sum(0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", PLAIN, **named)
def test_rows_of_one_shape_are_cut_anew_by_each_call(reduction, dtype):
    """What is worked out once for a shape knows neither the segments nor the elements."""
    before = torch.get_num_threads()
    try:
        for threads, cuts in itertools.product((2, 1), ((3, 4), (0, 90), (50, 51), (90, 90))):
            torch.set_num_threads(threads)
            columns = [(torch.randperm(90) + 1) / 64 for _ in range(5)]  # without ties
            x = torch.stack(columns, 1).to(dtype).requires_grad_()
            y = tp.segment_pool(x, reduction, offsets=torch.tensor([0, *cuts, 90]))
            wide = x.detach().double().requires_grad_()
            parts = wide.tensor_split(cuts)
            nothing = torch.zeros(5, dtype=torch.float64)
            made = [PLAIN[reduction](p) if len(p) else nothing for p in parts]
            torch.testing.assert_close(y, torch.stack(made).to(dtype))
            slopes = torch.randn(3, 5).to(dtype)
            (wanted,) = torch.autograd.grad(torch.stack(made), wide, slopes.double())
            (gx,) = torch.autograd.grad(y, x, slopes)
            torch.testing.assert_close(gx, wanted.to(dtype))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("reduction", PLAIN, **named)
def test_gradients_of_any_strides_are_those_that_are_differentiated_further(reduction):
    x = (torch.rand(6, 4) + 0.5).requires_grad_()
    y = tp.segment_pool(x, reduction, offsets=torch.tensor([0, 2, 3, 6]))
    for grad in (torch.ones(()).expand(3, 4), torch.randn(4, 3).t(), torch.randn(3, 4)):
        (plain,) = torch.autograd.grad(y, x, grad, retain_graph=True)
        (watched,) = torch.autograd.grad(y, x, grad, create_graph=True)
        torch.testing.assert_close(plain, watched.detach())


@pytest.mark.parametrize("shape", [(3, 4, 7), (3, 7, 4)], ids=["last axis", "axis of channels"])
@pytest.mark.parametrize("reduction", PLAIN, **named)
def test_samples_that_are_prepared_have_further_derivatives(reduction, shape):
    dims = shape.index(7)
    x = (torch.rand(shape, dtype=torch.float64) + 0.5).requires_grad_()
    lengths = torch.tensor([7, 1, 4])
    pool = lambda x: tp.pool(x, reduction, tp.Global(), lengths=lengths, dims=dims)  # noqa: E731
    assert torch.autograd.gradcheck(pool, x)
    assert torch.autograd.gradgradcheck(pool, x)


def test_another_default_device():
    x, offsets = torch.rand(5, 3).requires_grad_(), torch.tensor([0, 2, 5])
    with torch.device("meta"):
        for reduction in (tp.Sum(), tp.Max(), tp.SoftmaxMean(0.25)):
            y = tp.segment_pool(x, reduction, offsets=offsets)
            (gx,) = torch.autograd.grad(y, x, y.detach(), create_graph=True)
            assert y.is_cpu
            assert gx.is_cpu


def test_the_aggregations_of_graph_networks():
    """The formulas of PyTorch Geometric's aggregations, written with scatter operations."""
    x = rows() - 0.5
    index = torch.randint(0, 5, (53,), generator=torch.Generator().manual_seed(2))
    wide = index[:, None].expand_as(x)
    zeros = torch.zeros(5, 5, dtype=x.dtype)
    count = torch.bincount(index, minlength=5).clamp(min=1)[:, None]

    def total(v):
        return zeros.scatter_add(0, wide, v)

    mean = total(x) / count
    var = total(x * x) / count - mean * mean
    top = zeros.scatter_reduce(0, wide, 0.7 * x, "amax", include_self=False)
    e = torch.exp(0.7 * x - top[index])
    power = x.clamp(min=0.01)
    cases = [
        (tp.Sum(), x, total(x)),
        (tp.Mean(), x, mean),
        (tp.Max(), x, zeros.scatter_reduce(0, wide, x, "amax", include_self=False)),
        (tp.Min(), x, zeros.scatter_reduce(0, wide, x, "amin", include_self=False)),
        (tp.Var(), x, var),
        (tp.Std(), x, var.sqrt()),
        (tp.SoftmaxMean(0.7), x, total(x * e) / total(e)),
        (tp.PowerMean(2.5), power, (total(power**2.5) / count) ** (1 / 2.5)),
    ]
    for reduction, values, wanted in cases:
        made = tp.segment_pool(values, reduction, index=index, num_segments=5)
        torch.testing.assert_close(made, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reduction", [*SELECTIONS, *ACCUMULATIONS], **named)
def test_gradients(reduction):
    offsets = torch.tensor([0, 3, 3, 8])
    x = rows(2)[:8].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: tp.segment_pool(t, reduction, offsets=offsets), x)
    index = torch.tensor([2, 0, 2, 0, 2, 2, 0, 2])
    assert torch.autograd.gradcheck(
        lambda t: tp.segment_pool(t, reduction, index=index, num_segments=4), x
    )
    if isinstance(reduction, tp.Accumulation):
        w = rows(2, 3)[:8].clone().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda t, v: tp.segment_pool(t, reduction, index=index, weights=v), (x, w)
        )


def test_rows_beside_each_other_do_not_leak():
    x = rows()
    x[7] = math.nan
    for reduction in (tp.Max(), tp.Mean(), tp.SoftmaxMean(1.0)):
        leaf = x.clone().requires_grad_()
        y = tp.segment_pool(leaf, reduction, offsets=OFFSETS)
        assert y[2].isnan().all()
        assert not y[[0, 1, 3, 4]].isnan().any()
        (grad,) = torch.autograd.grad(y[[0, 1, 3, 4]].sum(), leaf)
        assert not grad[INDEX != 2].isnan().any()


def test_indices_dims_masks_and_one_axis():
    x = rows()
    shuffle = torch.randperm(53, generator=torch.Generator().manual_seed(1))
    index = INDEX[shuffle]
    y, where = tp.segment_pool(x, tp.Max(), index=index, num_segments=6, return_indices=True)
    assert torch.equal(x.gather(0, where.clamp(min=0))[[0, 2, 3, 4]], y[[0, 2, 3, 4]])
    assert (where[[1, 5]] == -1).all()
    assert (index[where[3]] == 3).all()
    turned = tp.segment_pool(x.T, tp.Mean(), offsets=OFFSETS, dim=1)
    torch.testing.assert_close(turned, tp.segment_pool(x, tp.Mean(), offsets=OFFSETS).T)
    line = tp.segment_pool(x[:, 0], tp.Mean(), offsets=OFFSETS)
    torch.testing.assert_close(line, turned[0])
    mask = x[:, :1] > 0.5
    made = tp.segment_pool(x, tp.Sum(), index=index, mask=mask)
    torch.testing.assert_close(made, tp.segment_pool(x * mask, tp.Sum(), index=index))
    cube = x.reshape(53, 5, 1).expand(53, 5, 3)
    p = torch.tensor([0.5, 1.0, 2.0], dtype=x.dtype)
    made = tp.segment_pool(cube, tp.LogMeanExp(p), offsets=OFFSETS)
    for i in range(3):
        one = tp.segment_pool(x, tp.LogMeanExp(float(p[i])), offsets=OFFSETS)
        torch.testing.assert_close(made[..., i], one)


@pytest.mark.parametrize("interpolation", ["linear", "lower", "higher", "nearest", "midpoint"])
@pytest.mark.parametrize("q", [0.0, 0.3, 0.5, 1.0])
def test_quantiles(q, interpolation):
    x = rows()
    y = tp.segment_quantile(x, q, offsets=OFFSETS, interpolation=interpolation, fill=-1.0)
    for i, (begin, end) in enumerate(itertools.pairwise(OFFSETS)):
        part = x[begin:end]
        wanted = (
            torch.full((5,), -1.0, dtype=x.dtype)
            if begin == end
            else torch.quantile(part, q, dim=0, interpolation=interpolation)
        )
        torch.testing.assert_close(y[i], wanted)
    shuffle = torch.randperm(53)
    made = tp.segment_quantile(
        x[shuffle], q, index=INDEX[shuffle], interpolation=interpolation, fill=-1.0
    )
    torch.testing.assert_close(made, y)


def test_medians():
    x = rows()
    y = tp.segment_median(x, offsets=OFFSETS)
    assert torch.equal(y[0], x[:7].median(0).values)
    assert torch.equal(y[3], x[8:50].median(0).values)
    assert (y[1] == 0).all()
    leaf = x[:9].clone().requires_grad_()
    offsets = torch.tensor([0, 4, 9])
    assert torch.autograd.gradcheck(lambda t: tp.segment_quantile(t, 0.3, offsets=offsets), leaf)
    x[2, 0], x[3, 1], x[4, 1] = math.nan, math.inf, math.inf
    y = tp.segment_quantile(x, 0.9, offsets=OFFSETS)
    assert y[0, 0].isnan()
    assert y[0, 1] == math.inf
    assert not y[3].isnan().any()


VALUES = torch.zeros(4, 2)
BAD = [
    ({}, ValueError, "give either offsets"),
    ({"offsets": OFFSETS, "index": INDEX}, ValueError, "give either offsets"),
    ({"offsets": torch.tensor([0, 4]), "num_segments": 1}, ValueError, "belongs to index"),
    ({"index": torch.tensor([0, 1])}, ValueError, r"index of shape \(2,\)"),
    ({"index": torch.tensor([0, 1, -2, 0])}, ValueError, r"index\[2\]=-2"),
    ({"index": torch.tensor([0, 1, 5, 0]), "num_segments": 3}, ValueError, r"index\[2\]=5"),
    ({"index": torch.zeros(4)}, TypeError, "index has dtype torch.float32"),
    ({"offsets": torch.tensor([0, 5])}, ValueError, "from 0 to 4"),
    ({"offsets": torch.tensor([0, 3, 2, 4])}, ValueError, r"offsets\[1\]=3 > offsets\[2\]=2"),
    ({"offsets": torch.tensor([0, 4]), "dim": 2}, ValueError, "dim=2 is out of range"),
    ({"offsets": torch.tensor([0, 4]), "mask": 1}, TypeError, "mask must be a torch.Tensor"),
    ({"offsets": torch.tensor([0, 4]), "mask": torch.ones(3, 2).bool()}, ValueError, "broadcast"),
]


@pytest.mark.parametrize(("options", "error", "words"), BAD)
def test_bad_input_is_named(options, error, words):
    with pytest.raises(error, match=words):
        tp.segment_pool(VALUES, tp.Mean(), **options)


def test_bad_quantiles_are_named():
    offsets = torch.tensor([0, 4])
    with pytest.raises(ValueError, match=r"q=1.5"):
        tp.segment_quantile(VALUES, 1.5, offsets=offsets)
    with pytest.raises(ValueError, match="interpolation='cubic'"):
        tp.segment_quantile(VALUES, 0.5, offsets=offsets, interpolation="cubic")
    with pytest.raises(TypeError, match="need floating"):
        tp.segment_median(VALUES.long(), offsets=offsets)


def test_compiled_is_eager():
    def run(x, offsets):
        y = tp.segment_pool(x, tp.Std(), offsets=offsets)
        return y, tp.segment_quantile(x, 0.3, offsets=offsets)

    x = rows().requires_grad_()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(x, OFFSETS), compiled(x, OFFSETS), strict=True):
        assert torch.equal(a, b)
        ga, gb = (torch.autograd.grad(t.sum(), x, retain_graph=True)[0] for t in (a, b))
        assert torch.equal(ga, gb)


def test_triton_kernels():
    environment = {**os.environ, "TORCHPOOL_BACKEND": "gpu"}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    checks = str(Path(__file__).parent / "gpu_segment_checks.py")
    done = subprocess.run(
        [sys.executable, checks],
        env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checked 27 cases" in done.stdout
