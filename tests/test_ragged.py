"""Samples of different lengths: what a sample gives in a batch is what it gives alone, whatever the
padding holds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from cases import ACCUMULATIONS, SELECTIONS, TOLERANCE
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import torchpool as tp
from torchpool import ops, ragged

named = {"ids": str}
LENGTHS = torch.tensor([5, 0, 40, 1, 33])
SIZE = 40
PACKED = torch.nn.functional.pad(LENGTHS.cumsum(0), (1, 0))
WINDOWS = [
    tp.Global(),
    tp.Adaptive(3),
    tp.Adaptive(None),
    tp.Window(3, 2),
    tp.Window(3, 1, padding="same"),
    tp.Window(4, 3, padding="same_lower"),
    tp.Window(3, 2, 1, ceil_mode=True),
    tp.Window(2, 2, padding="causal", dilation=2),
    tp.Window(2, 3, padding=((3, 4),)),
    tp.Window(33, 3, padding=((16, 0),)),
]
REDUCTIONS = [*SELECTIONS, *ACCUMULATIONS, tp.Mean(count_include_pad=True), tp.Mean(divisor=3.0)]
SOME = [tp.Max(), tp.Mean(), tp.SoftmaxMean(1.5), tp.Std(1.0)]


def batch(kind=torch.float64, channels=3, padding=math.nan, seed=0):
    """Positive numbers (N, C, T) whose padding holds something else."""
    x = torch.rand(5, channels, SIZE, generator=torch.Generator().manual_seed(seed)) + 0.1
    return torch.where(tp.length_mask(LENGTHS, SIZE)[:, None], x, padding).to(kind)


def alone(x, n, reduction, windows):
    """One sample without its padding; None where there is no window."""
    length = int(LENGTHS[n])
    if length == 0 or int(windows.pool_lengths(length)) == 0:
        return None
    return tp.pool(x[n : n + 1, :, :length], reduction, windows)


@pytest.mark.parametrize("windows", WINDOWS, **named)
@pytest.mark.parametrize("reduction", REDUCTIONS, **named)
def test_a_sample_gives_the_same_alone_and_in_any_batch(reduction, windows):
    x = batch()
    y = tp.pool(x, reduction, windows, lengths=LENGTHS)
    pooled = windows.pool_lengths(LENGTHS)
    for n, count in enumerate(pooled.tolist()):
        assert (y[n, :, count:] == 0).all()
        expected = alone(x, n, reduction, windows)
        if expected is None:
            assert (y[n] == 0).all()
            continue
        assert expected.shape[-1] == count
        torch.testing.assert_close(y[n : n + 1, :, :count], expected, **TOLERANCE[x.dtype])
        same = tp.pool(x[n : n + 1, :, : LENGTHS[n]], reduction, windows, lengths=LENGTHS[n, None])
        assert torch.equal(y[n : n + 1, :, :count], same)
    channels_last = tp.pool(x.transpose(1, 2), reduction, windows, lengths=LENGTHS, dims=1)
    torch.testing.assert_close(channels_last.transpose(1, 2), y, **TOLERANCE[x.dtype])


@pytest.mark.parametrize("windows", WINDOWS, **named)
@pytest.mark.parametrize("reduction", SOME, **named)
def test_every_ragged_form_gives_the_same_rows(reduction, windows):
    x = batch()
    y = tp.pool(x, reduction, windows, lengths=LENGTHS)
    pooled = windows.pool_lengths(LENGTHS)
    real = tp.length_mask(pooled, y.shape[-1])
    rows = y.transpose(1, 2)[real]
    packed = x.transpose(1, 2)[tp.length_mask(LENGTHS, SIZE)]
    values, offsets = tp.pool(packed, reduction, windows, offsets=PACKED)
    torch.testing.assert_close(values, rows, **TOLERANCE[x.dtype])
    assert torch.equal(offsets.diff(), pooled)
    nested = torch.nested.nested_tensor_from_jagged(packed, PACKED)
    made = tp.pool(nested, reduction, windows)
    assert made.layout is torch.jagged
    assert torch.equal(made.values(), values)
    assert torch.equal(made.offsets(), offsets)
    left = torch.full_like(x, math.nan)
    wanted = torch.zeros_like(y)
    for n, (length, count) in enumerate(zip(LENGTHS.tolist(), pooled.tolist(), strict=True)):
        left[n, :, SIZE - length :] = x[n, :, :length]
        wanted[n, :, y.shape[-1] - count :] = y[n, :, :count]
    made = tp.pool(left, reduction, windows, lengths=LENGTHS, padding_side="left")
    torch.testing.assert_close(made, wanted, **TOLERANCE[x.dtype])
    _sequences(x, reduction, windows, y, pooled)


def _sequences(x, reduction, windows, y, pooled):
    keep = pooled.nonzero()[:, 0] if (LENGTHS > 0).all() else ((pooled > 0) & (LENGTHS > 0))
    part = x.transpose(1, 2)[keep]
    sequence = pack_padded_sequence(part, LENGTHS[keep], batch_first=True, enforce_sorted=False)
    made, lengths = pad_packed_sequence(tp.pool(sequence, reduction, windows), batch_first=True)
    assert torch.equal(lengths, pooled[keep])
    wanted = y.transpose(1, 2)[keep][:, : made.shape[1]]
    torch.testing.assert_close(made, wanted, **TOLERANCE[x.dtype])


@pytest.mark.parametrize("reduction", [tp.Max(), tp.Mean(), tp.Lp(3.0), tp.Var()], **named)
def test_global_against_the_oracle(reduction):
    x = batch()
    y = tp.pool(x, reduction, tp.Global(), lengths=LENGTHS, fill=-7.0)
    for n, length in enumerate(LENGTHS.tolist()):
        taps = [list(range(length))]
        name, p = type(reduction).__name__, reduction.value or 0.0
        expected = oracle.pool(x[n : n + 1].numpy(), [taps], name, p, fill=-7.0)[0]
        np.testing.assert_allclose(y[n : n + 1].numpy(), expected, rtol=1e-12)
        if length > 1:  # the oracle can fail
            del taps[0][int(x[n, 0, :length].argmax())]
            other = oracle.pool(x[n : n + 1].numpy(), [taps], name, p)[0]
            assert not np.allclose(y[n : n + 1].numpy(), other, rtol=1e-12)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("windows", [WINDOWS[i] for i in (0, 1, 4, 7, 9)], **named)
@pytest.mark.parametrize("reduction", SOME, **named)
def test_gradients_are_those_of_the_reference_and_padding_gets_none(
    reduction, windows, channels_last, monkeypatch
):
    x = batch(channels=20 if channels_last else 3)
    x = x.transpose(1, 2).contiguous() if channels_last else x
    dim = 1 if channels_last else 2
    slopes = torch.randn(5, 60, 60, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    found = []
    for backend in ("cpu", "reference"):
        monkeypatch.setenv("TORCHPOOL_BACKEND", backend)
        leaf = x.clone().requires_grad_()
        y = tp.pool(leaf, reduction, windows, lengths=LENGTHS, dims=dim)
        (grad,) = torch.autograd.grad(y, leaf, slopes[:, : y.shape[1], : y.shape[2]])
        found.append(grad)
    torch.testing.assert_close(*found, **TOLERANCE[x.dtype])
    assert (found[0][x.isnan()] == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS, **named)
def test_gradcheck(reduction):
    lengths = torch.tensor([4, 0, 6])
    x = (torch.rand(3, 2, 6, dtype=torch.float64) + 0.1).requires_grad_()
    for windows in (tp.Global(), tp.Window(3, 1, padding="same")):

        def run(t, windows=windows):
            return tp.pool(t, reduction, windows, lengths=lengths)

        assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)


@pytest.mark.parametrize("reduction", [tp.Max(), tp.Mean(), tp.LogMeanExp(2.0)], **named)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_masks_weights_and_parameters(reduction, backend, monkeypatch):
    monkeypatch.setenv("TORCHPOOL_BACKEND", backend)
    x = batch()
    generator = torch.Generator().manual_seed(5)
    weights = torch.rand(x.shape, generator=generator, dtype=x.dtype)
    weights = torch.where(weights < 0.3, 0.0, weights)
    hidden = torch.where(weights == 0, math.nan, x)
    inside = tp.length_mask(LENGTHS, SIZE)[:, None]
    for windows in (tp.Global(), tp.Window(3, 2)):
        y = tp.pool(hidden, reduction, windows, lengths=LENGTHS, mask=weights > 0)
        same = tp.pool(hidden, reduction, windows, mask=(weights > 0) & inside)
        shared = windows.pool_lengths(LENGTHS)
        real = tp.length_mask(shared, y.shape[-1])[:, None]
        torch.testing.assert_close(y, same * real, **TOLERANCE[x.dtype])
        leaf, w = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
        padded = torch.where(inside, w, math.nan)
        made = tp.pool(leaf, reduction, windows, lengths=LENGTHS, weights=padded, fill=-1.0)
        wanted = tp.pool(leaf, reduction, windows, weights=torch.where(inside, w, 0), fill=-1.0)
        torch.testing.assert_close(made, torch.where(real, wanted, -1.0), **TOLERANCE[x.dtype])
        leaves = [leaf, w] if isinstance(reduction, tp.Accumulation) else [leaf]
        grads = [torch.autograd.grad((t * real).square().sum(), leaves) for t in (made, wanted)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, **TOLERANCE[x.dtype])
    if reduction.value is not None:
        p = torch.tensor([0.5, 1.0, 2.0], dtype=x.dtype, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda q: tp.pool(x, reduction.replace(q), tp.Adaptive(2), lengths=LENGTHS), p
        )


RUNS = [tp.Max(), tp.Min(), tp.Sum(), tp.Mean(), tp.Mean(divisor=3.0)]
"""What whole samples are pooled with past everything else."""


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize(
    ("shape", "dim"), [((4, 9, 3), 1), ((4, 3, 9), 2), ((4, 2, 9, 3), 2), ((4, 9), 1)], **named
)
@pytest.mark.parametrize("reduction", RUNS, **named)
def test_whole_samples_of_any_shape(reduction, shape, dim, padding_side, monkeypatch):
    lengths = torch.tensor([9, 0, 4, 1])
    valid = tp.length_mask(lengths, 9, padding_side=padding_side)
    valid = valid.reshape(*(s if i in (0, dim) else 1 for i, s in enumerate(shape)))

    def call(x):
        return tp.pool(
            x, reduction, tp.Global(), lengths=lengths, dims=dim, padding_side=padding_side
        )

    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(shape, dtype=dtype).masked_fill(~valid, math.nan).requires_grad_()
        y = call(x)
        g = torch.randn(y.shape, dtype=dtype)
        y.backward(g)
        assert torch.equal(call(x.detach()), y)
        with monkeypatch.context() as context:
            context.setenv("TORCHPOOL_BACKEND", "reference")
            other = x.detach().masked_fill(~valid, 0).requires_grad_()
            z = tp.pool(other, reduction, tp.Global(), mask=valid, dims=dim)
            z.backward(g)
        near = TOLERANCE[dtype]
        torch.testing.assert_close(y, z, **near)
        torch.testing.assert_close(x.grad, other.grad, **near)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, x)
    assert torch.autograd.gradgradcheck(call, x)


@pytest.mark.parametrize("inner", [1, 3, 8, 70, 5000])
@pytest.mark.parametrize("reduction", [tp.Sum(), tp.Mean()], **named)
def test_gradients_of_long_runs(reduction, inner):
    counts = torch.tensor([0, 1, 2, 5, 1000, 0, 392])
    x = torch.randn(int(counts.sum()), inner, requires_grad=True)
    y = tp.segment_pool(x, reduction, offsets=torch.nn.functional.pad(counts.cumsum(0), (1, 0)))
    g = torch.randn_like(y)
    y.backward(g)
    share = g if isinstance(reduction, tp.Sum) else g / counts.clamp(min=1)[:, None]
    torch.testing.assert_close(x.grad, share.repeat_interleave(counts, 0), rtol=1e-6, atol=0)


def test_a_second_derivative_past_a_byte_of_state():
    x = torch.randn(300, 2, requires_grad=True)
    g = torch.randn(2, 2, requires_grad=True)
    y = tp.segment_pool(x, tp.Max(), offsets=torch.tensor([0, 299, 300]))
    (gx,) = torch.autograd.grad(y, x, g, create_graph=True)
    assert torch.equal(gx.sum(0), g.sum(0))
    weights = torch.rand(300, 2)
    (gx * weights).sum().backward()
    expected = torch.stack([weights[:299].gather(0, x[:299].argmax(0)[None])[0], weights[299]])
    assert torch.equal(g.grad, expected)


def test_half_and_integer_dtypes():
    x = batch(torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        for reduction in (tp.Max(), tp.Mean(), tp.Std()):
            low = x.to(dtype).requires_grad_()
            y = tp.pool(low, reduction, tp.Adaptive(3), lengths=LENGTHS)
            wide = tp.pool(low.double(), reduction, tp.Adaptive(3), lengths=LENGTHS)
            assert y.dtype == dtype
            torch.testing.assert_close(y.double(), wide, **TOLERANCE[dtype])
            (grad,) = torch.autograd.grad(y.double().sum(), low)
            assert not grad.isnan().any()
    whole = (torch.nan_to_num(x) * 100).long()
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.int16):
        y = tp.pool(whole.to(dtype), tp.Max(), tp.Global(), lengths=LENGTHS)
        assert torch.equal(y[2], whole[2].to(dtype).amax(-1, keepdim=True))
        assert y.dtype == dtype
    y = tp.pool(whole.int(), tp.Sum(), tp.Global(), lengths=LENGTHS)
    assert torch.equal(y[4, :, 0], whole[4, :, :33].sum(-1))


def test_ties_nan_and_infinities_inside_a_sample():
    x = torch.full((2, 1, 70), -math.inf)
    x[1, 0, [10, 50, 65]] = 3.0
    lengths = torch.tensor([70, 60])
    for shape in ((2, 1, 70), (2, 70, 1), (2, 70, 20)):
        v = x.reshape(2, -1, 1).expand(2, 70, 20) if shape[2] == 20 else x.reshape(shape)
        dim = 2 if shape[1] == 1 else 1
        y, i = tp.pool(v, tp.Max(), tp.Global(), lengths=lengths, dims=dim, return_indices=True)
        assert (i.flatten(1) == torch.tensor([[0], [10]])).all()
        bad = v.clone()
        bad.select(dim, 5)[1], bad.select(dim, 40)[1] = math.nan, math.nan
        y, i = tp.pool(bad, tp.Max(), tp.Global(), lengths=lengths, dims=dim, return_indices=True)
        assert y[1].isnan().all()
        assert (i[1] == 40).all()
        bad = v.clone()
        bad.select(dim, 65)[1] = math.nan
        assert not tp.pool(bad, tp.Max(), tp.Global(), lengths=lengths, dims=dim).isnan().any()


def test_indices_point_into_what_was_given():
    x = batch()
    y, i = tp.pool(x, tp.Max(), tp.Window(3, 2), lengths=LENGTHS, return_indices=True)
    found = x.gather(2, i.clamp(min=0))
    assert torch.equal(torch.where(i < 0, 0, found), y)
    packed = x.transpose(1, 2)[tp.length_mask(LENGTHS, SIZE)]
    (rows, _), i = tp.pool(packed, tp.Max(), tp.Window(3, 2), offsets=PACKED, return_indices=True)
    assert torch.equal(packed.gather(0, i), rows)
    nested = torch.nested.nested_tensor_from_jagged(packed, PACKED)
    _, inside = tp.pool(nested, tp.Max(), tp.Window(3, 2), return_indices=True)
    sample = torch.repeat_interleave(inside.offsets().diff())
    assert torch.equal(inside.values() + PACKED[sample, None], i)


def test_shapes_beside_the_usual():
    x = batch()
    flat = tp.pool(x[:, 0], tp.Mean(), tp.Global(), lengths=LENGTHS)
    assert torch.equal(flat, tp.pool(x[:, :1], tp.Mean(), tp.Global(), lengths=LENGTHS)[:, 0])
    deep = x[:, None].expand(5, 2, 3, SIZE).transpose(2, 3)
    y = tp.pool(deep, tp.Mean(), tp.Adaptive(2), lengths=LENGTHS, dims=2)
    assert torch.equal(
        y[:, 1].transpose(1, 2), tp.pool(x, tp.Mean(), tp.Adaptive(2), lengths=LENGTHS)
    )
    rows = x[2, 0]
    one, _ = tp.pool(rows, tp.Mean(), tp.Global(), offsets=torch.tensor([0, SIZE]))
    torch.testing.assert_close(one, rows.mean().reshape(1))
    none, offsets = tp.pool(
        torch.zeros(0, 3), tp.Mean(), tp.Global(), offsets=torch.zeros(3).long(), fill=2.0
    )
    assert torch.equal(none, torch.full((2, 3), 2.0))
    assert offsets.tolist() == [0, 1, 2]
    none, offsets = tp.pool(
        torch.zeros(0, 3, requires_grad=True), tp.Max(), tp.Window(2), offsets=torch.zeros(3).long()
    )
    assert none.shape == (0, 3)
    empty = tp.pool(x, tp.Std(), tp.Window(3), lengths=torch.zeros(5).long(), fill=4.0)
    assert (empty == 4).all()
    assert tp.pool(x[:0], tp.Max(), tp.Global(), lengths=LENGTHS[:0]).shape == (0, 3, 1)


def test_pool_lengths():
    for windows in WINDOWS:
        for length in range(1, 20):
            try:
                wanted = windows.out_size(length)
            except ValueError:
                wanted = 0
            assert windows.pool_lengths(length) == wanted, (windows, length)
        many = torch.arange(20)
        assert windows.pool_lengths(many)[1:].tolist() == [
            windows.pool_lengths(n) for n in range(1, 20)
        ]
    with pytest.raises(ValueError, match="no rule for samples of different lengths"):
        tp.Fractional(2, output_ratio=0.5).pool_lengths(5)
    with pytest.raises(ValueError, match="lengths speak of one"):
        tp.Window((2, 3)).pool_lengths(5)


X = torch.zeros(2, 3, 7)
BAD = [
    ({"lengths": torch.tensor([3, 9])}, ValueError, r"lengths\[1\]=9"),
    ({"lengths": torch.tensor([-1, 2])}, ValueError, r"lengths\[0\]=-1"),
    ({"lengths": torch.tensor([3])}, ValueError, r"shape \(1,\)"),
    ({"lengths": torch.tensor([[3, 1]])}, ValueError, r"shape \(1, 2\)"),
    ({"lengths": torch.tensor([3.0, 1.0])}, TypeError, "lengths has dtype torch.float32"),
    ({"lengths": torch.tensor([True, False])}, TypeError, "dtype torch.bool"),
    ({"lengths": [3, 1]}, TypeError, "not list"),
    ({"lengths": torch.zeros(2, dtype=torch.long, device="meta")}, ValueError, "lies on meta"),
    ({"lengths": torch.tensor([3, 1]), "padding_side": "up"}, ValueError, "padding_side='up'"),
    ({"lengths": torch.tensor([3, 1]), "dims": 0}, ValueError, "counts the samples"),
    ({"lengths": torch.tensor([3, 1]), "dims": (1, 2)}, ValueError, "speak of one axis"),
    ({"lengths": torch.tensor([3, 1]), "offsets": PACKED}, ValueError, "both tell the lengths"),
    ({"lengths": torch.tensor([3, 1]), "mask": torch.ones(4).bool()}, ValueError, "mask of shape"),
    ({"offsets": torch.tensor([0, 2, 1, 2])}, ValueError, r"offsets\[1\]=2 > offsets\[2\]=1"),
    ({"offsets": torch.tensor([0, 1])}, ValueError, "from 0 to 2"),
    ({"offsets": torch.tensor([1, 2])}, ValueError, "from 1 to 2"),
    ({"offsets": torch.tensor(0)}, ValueError, "offsets of shape"),
    ({"offsets": torch.tensor([0.0, 2.0])}, TypeError, "offsets has dtype"),
]


@pytest.mark.parametrize(("options", "error", "words"), BAD)
def test_bad_input_is_named(options, error, words):
    with pytest.raises(error, match=words):
        tp.pool(X, tp.Mean(), tp.Global(), **options)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_bad_ragged_forms_are_named():
    strided = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)])
    with pytest.raises(TypeError, match="layout torch"):
        tp.pool(strided, tp.Mean(), tp.Global())
    nested = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)], layout=torch.jagged)
    with pytest.raises(ValueError, match="the axis of different lengths is 1"):
        tp.pool(nested, tp.Mean(), tp.Global(), dims=2)
    with pytest.raises(TypeError, match="mask must be a NestedTensor"):
        tp.pool(nested, tp.Mean(), tp.Global(), mask=torch.ones(6, 3).bool())
    with pytest.raises(ValueError, match="both tell the lengths"):
        tp.pool(nested, tp.Mean(), tp.Global(), lengths=torch.tensor([2, 4]))
    sequence = pack_padded_sequence(X.transpose(1, 2), torch.tensor([7, 2]), batch_first=True)
    with pytest.raises(ValueError, match="a sequence of 2 elements gives no window"):
        tp.pool(sequence, tp.Mean(), tp.Window(3))
    with pytest.raises(ValueError, match="has no winner"):
        tp.pool(X, tp.Mean(), tp.Global(), lengths=torch.tensor([1, 2]), return_indices=True)
    with pytest.raises(ValueError, match="gives no window"):
        tp.pool(X, tp.Mean(), tp.Window(9), lengths=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="no rule for samples"):
        tp.pool(X, tp.Max(), tp.Fractional(2, 3), lengths=torch.tensor([5, 6]))


def test_masks_of_nested_tensors():
    packed = batch().transpose(1, 2)[tp.length_mask(LENGTHS, SIZE)]
    mask = packed > 0.5
    nested, valid = (torch.nested.nested_tensor_from_jagged(t, PACKED) for t in (packed, mask))
    made = tp.pool(nested, tp.Mean(), tp.Global(), mask=valid).values()
    wanted, _ = tp.pool(packed, tp.Mean(), tp.Global(), offsets=PACKED, mask=mask)
    assert torch.equal(made, wanted)
    other = torch.nested.nested_tensor_from_jagged(mask, torch.tensor([0, len(mask)]))
    with pytest.raises(ValueError, match="sample by sample"):
        tp.pool(nested, tp.Mean(), tp.Global(), mask=other)


@pytest.mark.parametrize("reduction", [tp.Max(), tp.SoftmaxMean(1.0)], **named)
def test_compiled_is_eager(reduction):
    def padded(x, lengths):
        return tp.pool(x, reduction, tp.Window(3, 2, padding="same"), lengths=lengths)

    def packed(rows, offsets):
        return tp.pool(rows, reduction, tp.Adaptive(2), offsets=offsets)[0]

    def nested(t):
        return tp.pool(t, reduction, tp.Global()).values()

    x = batch(torch.float32).requires_grad_()
    rows = x.detach().transpose(1, 2)[tp.length_mask(LENGTHS, SIZE)].requires_grad_()
    jagged = torch.nested.nested_tensor_from_jagged(rows.detach(), PACKED)
    for function, args in (
        (padded, (x, LENGTHS)),
        (packed, (rows, PACKED)),
        (nested, (jagged,)),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        a, b = function(*args), compiled(*args)
        assert torch.equal(a, b)
        if args[0].requires_grad:
            ga, gb = (torch.autograd.grad(t.square().sum(), args[0])[0] for t in (a, b))
            assert torch.equal(torch.nan_to_num(ga), torch.nan_to_num(gb))


def test_exported_is_eager():
    class Padded(torch.nn.Module):
        def forward(self, x, lengths):
            return tp.pool(x, tp.LogMeanExp(2.0), tp.Global(), lengths=lengths)

    class Packed(torch.nn.Module):
        def forward(self, rows, offsets):
            return tp.segment_pool(rows, tp.LogMeanExp(2.0), offsets=offsets)

    x = torch.nan_to_num(batch(torch.float32))
    rows = x.transpose(1, 2)[tp.length_mask(LENGTHS, SIZE)]
    for module, args in ((Padded(), (x, LENGTHS)), (Packed(), (rows, PACKED))):
        program = torch.export.export(module, args)
        torch.testing.assert_close(program.module()(*args), module(*args))
        plain = not any("torchpool" in str(node.target) for node in program.graph.nodes)
        assert plain == isinstance(module, Padded)


def test_vmap_over_a_stack_of_batches():
    x = torch.stack([torch.nan_to_num(batch(seed=s)) for s in range(3)])
    for reduction in (tp.Max(), tp.Mean(), tp.Var()):

        def run(t, reduction=reduction):
            return tp.pool(t, reduction, tp.Adaptive(2), lengths=LENGTHS)

        torch.testing.assert_close(torch.vmap(run)(x), torch.stack([run(t) for t in x]))


def test_opcheck_with_a_table():
    table = tp.ragged.padded_table(tp.Window(3, 2), torch.tensor([5, 0, 6]), 6, 2, "right")
    axes = ops.pack([table.axis])
    x = torch.rand(3, 2, 6, requires_grad=True)
    select = (x, None, table.rows, tp.Max().spec, axes, True)
    torch.library.opcheck(torch.ops.torchpool.select, select)
    p = torch.tensor([1.5], requires_grad=True)
    accumulate = (x, None, None, p, table.rows, tp.SoftmaxMean(1.0).spec, axes, True)
    torch.library.opcheck(torch.ops.torchpool.accumulate, accumulate)


def test_same_bits_on_any_number_of_threads():
    x = torch.rand(7, 3000, 24)
    lengths = torch.tensor([3000, 10, 1500, 2, 900, 2999, 31])
    before = torch.get_num_threads()
    for reduction in (tp.Max(), tp.Mean(), tp.SoftmaxMean(2.0)):
        results = []
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                leaf = x.clone().requires_grad_()
                for dim in (1, 2):
                    t = leaf if dim == 1 else leaf.transpose(1, 2).contiguous()
                    y = tp.pool(t, reduction, tp.Window(100, 7), lengths=lengths, dims=dim)
                    results.append((y, torch.autograd.grad(y.square().sum(), leaf)[0]))
        finally:
            torch.set_num_threads(before)
        for one, two in zip(results[:2], results[2:], strict=True):
            assert torch.equal(one[0], two[0])
            assert torch.equal(one[1], two[1])


def test_lengths_that_a_mask_tells():
    """Of every mask of two samples of four elements, and of one without samples."""

    def told(rows: list[str]) -> Any:
        for side in ("right", "left"):
            stripped = [row.rstrip("0") if side == "right" else row.lstrip("0") for row in rows]
            if not any("0" in row for row in stripped):
                return [len(row) for row in stripped], side
        return None

    patterns = [f"{number:04b}" for number in range(16)]
    batches = [[first, second] for first in patterns for second in patterns]
    assert sum(told(rows) is None for rows in batches) == 256 - 2 * 25 + 4
    for rows in batches:
        mask = torch.tensor([[c == "1" for c in row] for row in rows])
        found = ragged.lengths_of(mask)
        assert (None if found is None else (found[0].tolist(), found[1])) == told(rows), rows
    lengths, side = ragged.lengths_of(torch.ones(0, 4, dtype=torch.bool))
    assert (lengths.shape, side) == ((0,), "right")


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_mask_without_holes_costs_what_lengths_cost(side: str) -> None:
    """The same bits as lengths, by the same operator; with a hole what the loop says."""
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(4))
    lengths = torch.tensor([8, 3, 0])
    mask = tp.length_mask(lengths, 8, padding_side=side)
    layer = tp.nn.SequencePool(tp.SoftmaxMean(1.0), padding_side=side, fill=7.0)
    assert torch.equal(layer(x, mask), layer(x, lengths=lengths))
    with_hole = mask.clone()
    with_hole[0, 4] = False
    kept = x[0].double()[:, with_hole[0]]
    wanted = (kept * kept.softmax(1)).sum(1)
    torch.testing.assert_close(layer(x, with_hole)[0].double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dims", [(1,), (2,)])
@pytest.mark.parametrize(
    "reduction", [tp.Max(), tp.Mean(), tp.Lp(3.0), tp.Std()], ids=lambda r: type(r).__name__
)
def test_a_mask_that_tells_lengths_gives_what_any_mask_gives(reduction, dims, backend):
    """One mask for all channels and the same mask written out, which is served as any mask is:
    values, winners, gradients; NaN and infinity behind the lengths, and a sample without any."""
    x = torch.randn(3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(6)).abs()
    inside = tp.length_mask(torch.tensor([4, 2, 0]), 4)
    inside = inside[:, :, None] if dims == (1,) else inside[:, None]
    x = torch.where(inside, x, torch.tensor([math.nan, math.inf, 1e300, -1.0])[:, None])
    every = inside.expand(x.shape)
    found = []
    for mask in (inside, every.clone(memory_format=torch.contiguous_format)):
        given = x.clone().requires_grad_()
        y = tp.pool(given, reduction, tp.Global(), dims=dims, mask=mask, fill=5.0)
        (y * torch.arange(1.0, y.numel() + 1).reshape(y.shape)).sum().backward()
        found.append((y, given.grad))
        if isinstance(reduction, tp.Max):
            options = {"dims": dims, "mask": mask, "return_indices": True}
            found[-1] += (tp.pool(given, reduction, tp.Global(), **options)[1],)
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_a_recorded_graph_takes_any_mask(mode):
    """What a mask tells is not written down in a graph, which is run with other masks."""
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(7))
    first, other = (tp.length_mask(torch.tensor(n), 8) for n in ([8, 2], [3, 5]))
    layer = tp.nn.SequencePool(tp.Mean())
    for call in (layer, lambda t, m: tp.pool(t, tp.Mean(), tp.Global(), mask=m[:, None])):
        graph = make_fx(call, tracing_mode=mode)(x, first)
        torch.testing.assert_close(graph(x, other), call(x, other))


@pytest.mark.parametrize("windows", [tp.Global(), tp.Window(3), tp.Window(3, dilation=2)], ids=str)
@pytest.mark.parametrize("channels", [2, 4, 8, 16, 32])
def test_channels_do_not_meet(windows, channels):
    """Several positions share a vector where channels are few; each channel has its gradient alone,
    with a parameter of its own."""
    generator = torch.Generator().manual_seed(channels)
    x, w = (torch.rand(2, 11, channels, generator=generator) + 0.1 for _ in range(2))
    beta, lengths = torch.linspace(-2, 3, channels), torch.tensor([4, 11])

    def gradients(x, w, beta):
        leaves = [t.clone().requires_grad_() for t in (x, w, beta)]
        pool = tp.SoftmaxMean(leaves[2])
        options = {"lengths": lengths, "weights": leaves[1], "dims": 1}
        y = tp.pool(leaves[0], pool, windows, **options)
        y = y if isinstance(windows, tp.Global) else y[0]
        return torch.autograd.grad(y.square().sum(), leaves)

    together = gradients(x, w, beta)
    each = [gradients(x[..., c : c + 1], w[..., c : c + 1], beta[c]) for c in range(channels)]
    for all_, *alone in zip(together, *each, strict=True):
        alone = [t.reshape(*all_.shape[:-1], 1) for t in alone]
        torch.testing.assert_close(all_, torch.cat(alone, -1), rtol=1e-5, atol=1e-6)
