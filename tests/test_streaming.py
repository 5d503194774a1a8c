"""Streams: however a signal is cut, the outputs are those of the whole, bit by bit."""

from __future__ import annotations

import io

import pytest
import torch
from cases import ACCUMULATIONS, SELECTIONS
from hypothesis import given, settings
from hypothesis import strategies as st

import torchpool as tp

named = {"ids": str}
WINDOWS = [
    tp.Window(3, 2),
    tp.Window(4, 1, padding="causal"),
    tp.Window(3, 1, padding="causal", dilation=3),
    tp.Window(3, 1, padding="same"),
    tp.Window(2, 5),
    tp.Window(3, 2, padding=((4, 5),)),
    tp.Window(3, 2, 1, ceil_mode=True),
    tp.Window(40, 7, padding=((39, 0),)),
]
CUTS = [[100], [1] * 100, [0, 3, 0, 0, 37, 1, 59, 0], [50, 50]]


def run(stream, x, cuts, dim=-1, **others):
    """The outputs of all chunks side by side."""
    parts = [t.split(cuts, dim) for t in (x, *others.values())]
    made = [stream(c[0], **dict(zip(others, c[1:], strict=True))) for c in zip(*parts, strict=True)]
    return torch.cat([*made, stream.flush()], dim)


@pytest.mark.parametrize("windows", WINDOWS, **named)
@pytest.mark.parametrize("reduction", [*SELECTIONS, *ACCUMULATIONS], **named)
def test_the_same_bits_for_any_cut(reduction, windows):
    x = torch.rand(2, 3, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = tp.pool(x, reduction, windows, lengths=torch.tensor([100, 100]))
    stream = tp.streaming(reduction, windows)
    for cuts in CUTS:
        assert torch.equal(run(stream, x, cuts), whole)
    dense = tp.pool(x, reduction, windows)
    torch.testing.assert_close(whole, dense, rtol=1e-12, atol=1e-12)
    if isinstance(reduction, tp.Selection):
        assert torch.equal(whole, dense)


@settings(max_examples=30, deadline=None)
@given(
    kernel=st.integers(1, 9),
    stride=st.integers(1, 9),
    dilation=st.integers(1, 3),
    padding=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    ceil=st.booleans(),
    cuts=st.lists(st.integers(0, 12), min_size=1, max_size=9),
    channels_last=st.booleans(),
)
def test_any_window_and_any_cut(kernel, stride, dilation, padding, ceil, cuts, channels_last):
    size, dim = sum(cuts), 1 if channels_last else 2
    window = tp.Window(kernel, stride, padding=(padding,), dilation=dilation, ceil_mode=ceil)
    if size == 0 or window.pool_lengths(size) == 0:
        return
    x = torch.rand((1, size, 2) if channels_last else (1, 2, size), dtype=torch.float64)
    whole = tp.pool(x, tp.Mean(True), window, lengths=torch.tensor([size]), dims=dim)
    made = run(tp.streaming(tp.Mean(True), window, dim=dim), x, cuts, dim)
    assert torch.equal(made, whole)


def test_causal_windows_answer_at_once():
    stream = tp.streaming(tp.Max(), tp.Window(5, 1, padding="causal"))
    x = torch.rand(20)
    for t in range(20):
        y = stream(x[t : t + 1])
        assert y.item() == x[max(0, t - 4) : t + 1].max()
    assert stream.flush().numel() == 0


def test_state_can_be_saved_and_restored():
    x, window = torch.rand(2, 50), tp.Window(7, 3, padding=((2, 4),))
    whole = run(tp.streaming(tp.Std(), window), x, [50])
    stream = tp.streaming(tp.Std(), window)
    first = stream(x[:, :23])
    file = io.BytesIO()
    torch.save(stream.state_dict(), file)
    file.seek(0)
    other = tp.streaming(tp.Std(), window)
    other.load_state_dict(torch.load(file))
    for goes_on in (stream, other):
        rest = [goes_on(x[:, 23:40]), goes_on(x[:, 40:]), goes_on.flush()]
        assert torch.equal(torch.cat([first, *rest], -1), whole)
    kept = tp.streaming(tp.Max(), tp.Window(3))
    kept(torch.rand(1, 1000))
    assert kept.state_dict()["kept"]["x"].shape[-1] < 3
    with pytest.raises(ValueError, match="not that of a Stream"):
        other.load_state_dict({"seen": 1})


def test_a_stream_can_be_used_again():
    stream = tp.streaming(tp.Sum(), tp.Window(2))
    x = torch.arange(6.0)
    for _ in range(2):
        assert torch.equal(run(stream, x, [5, 1]), tp.pool(x, tp.Sum(), tp.Window(2), dims=0))
    stream(x[:1])
    stream.reset()
    assert torch.equal(stream(x[:2]), torch.tensor([1.0]))


def test_masks_weights_gradients_and_integers():
    x = torch.rand(3, 30, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 30, dtype=torch.float64)
    mask = torch.rand(3, 30) > 0.4
    window = tp.Window(4, 3, padding=((1, 2),))
    lengths = torch.tensor([30, 30, 30])
    for others in ({"mask": mask}, {"weights": weights}, {"mask": mask, "weights": weights}):
        made = run(tp.streaming(tp.Mean(), window), x, [4, 0, 20, 6], **others)
        whole = tp.pool(x, tp.Mean(), window, lengths=lengths, **others)
        assert torch.equal(made, whole)
        grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (made, whole)]
        torch.testing.assert_close(*grads)
    numbers = torch.arange(12).reshape(1, 12)
    made = run(tp.streaming(tp.Sum(), tp.Window(3)), numbers, [1, 0, 11])
    assert made.tolist() == [[3, 12, 21, 30]]


@pytest.mark.parametrize(
    "layer",
    [
        tp.nn.Pool(tp.PowerMean(2.0, learnable=True), tp.Window(3, 2)),
        tp.nn.MaxPool1d(3, 2, 1),
        torch.nn.AvgPool1d(3, 2, 1, ceil_mode=True),
        tp.nn.LPPool1d(2.0, 3, stride=2),
    ],
    ids=str,
)
def test_layers(layer):
    x = torch.rand(1, 2, 31)
    made = run(tp.streaming(layer), x, [3, 9, 0, 19])
    torch.testing.assert_close(made, layer(x))


BAD = [
    ((tp.Max(), tp.Global()), ValueError, "depends on the length of the whole signal"),
    ((tp.Max(), tp.Adaptive(3)), ValueError, "depends on the length of the whole signal"),
    ((tp.Max(), tp.Window(3, 2, padding="same")), ValueError, "use padding='causal'"),
    ((tp.Max(), tp.Window((2, 2))), ValueError, "lengths speak of one"),
    ((tp.Max(), None), TypeError, "windows=None must be a Window"),
    ((tp.Max, tp.Window(2)), TypeError, "must be a reduction"),
    ((torch.nn.Linear(2, 2), None), TypeError, "has no stream"),
    ((tp.nn.MaxPool1d(2), tp.Window(2)), ValueError, "has windows of its own"),
    ((tp.nn.MaxPool1d(2, return_indices=True), None), ValueError, "gives values only"),
    ((torch.nn.LPPool1d(2, 2, ceil_mode=True), None), TypeError, "has no stream"),
]


@pytest.mark.parametrize(("arguments", "error", "words"), BAD, ids=lambda v: str(v)[:40])
def test_what_has_no_stream_says_why(arguments, error, words):
    with pytest.raises(error, match=words):
        tp.streaming(*arguments)


def test_bad_chunks_are_named():
    stream = tp.streaming(tp.Max(), tp.Window(3))
    with pytest.raises(ValueError, match="before the first chunk"):
        stream.flush()
    stream(torch.zeros(2, 1))
    with pytest.raises(ValueError, match="does not fit a signal of 1 elements"):
        stream.flush()
    with pytest.raises(ValueError, match="does not go on with the chunk before"):
        stream(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="float64 on cpu"):
        stream(torch.zeros(2, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="in every call or in none"):
        stream(torch.zeros(2, 1), mask=torch.ones(2, 1).bool())
