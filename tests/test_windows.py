"""Sizes and intervals against enumeration."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import torchpool as tp

small = st.integers(1, 9)


@given(
    st.integers(1, 60),
    small,
    small,
    st.integers(0, 12),
    st.integers(0, 12),
    st.integers(1, 4),
    st.booleans(),
)
def test_regular_windows_are_those_of_the_oracle(
    size, kernel, stride, before, after, dilation, ceil
):
    window = tp.Window(kernel, stride, ((before, after),), dilation, ceil)
    want = oracle.regular(size, kernel, stride, before, after, dilation, ceil)
    if not want:
        with pytest.raises(ValueError, match="does not fit"):
            window.axes((size,))
        return
    (axis,) = window.axes((size,))
    assert axis.out_size == len(want) == window.out_size(size)
    assert axis.starts() == tuple(w[0] for w in want)
    inside = [[j for j, p in enumerate(w) if 0 <= p < size] for w in want]
    assert [list(range(*taps)) for taps in axis.taps()] == inside
    assert axis.counts() == tuple(map(len, inside))
    assert axis.counts(True) == tuple(sum(p < size + after for p in w) for w in want)


@given(st.integers(1, 60), st.integers(1, 60))
def test_adaptive_windows_are_those_of_the_oracle(size, out):
    (axis,) = tp.Adaptive(out).axes((size,))
    want = oracle.adaptive(size, out)
    assert axis.starts() == tuple(w[0] for w in want)
    assert axis.lengths() == tuple(map(len, want))
    assert max(axis.lengths()) <= axis.kernel <= max(axis.lengths()) + 1


@given(st.integers(1, 40), small, small, st.integers(1, 3))
def test_same_and_causal(size, kernel, stride, dilation):
    for padding in ("same", "same_lower", "causal"):
        (axis,) = tp.Window(kernel, stride, padding, dilation).axes((size,))
        assert axis.out_size == -(-size // stride)
        if padding == "causal":
            last = [start + (kernel - 1) * dilation for start in axis.starts()]
            assert last == [o * stride for o in range(axis.out_size)]
        else:
            extra = axis.after - axis.before
            assert extra in ((0, 1) if padding == "same" else (0, -1))


@given(st.integers(4, 40), st.integers(1, 5), st.integers(1, 5), st.booleans(), st.integers(1, 2))
def test_out_size_is_torchs(size, kernel, stride, ceil, dilation):
    padding = kernel // 2
    if size + 2 * padding < dilation * (kernel - 1) + 1:
        return
    want = F.max_pool1d(torch.zeros(1, 1, size), kernel, stride, padding, dilation, ceil).shape[-1]
    assert tp.Window(kernel, stride, padding, dilation, ceil).out_size(size) == want


def test_pool_mask_tells_which_outputs_saw_something():
    mask = torch.tensor([[[True, False, False, False, True]]])
    assert tp.Window(2, 1).pool_mask(mask).tolist() == [[[True, False, False, True]]]
    assert tp.Window(2, 2, padding=((2, 1),)).pool_mask(mask).tolist() == [
        [[False, True, False, True]]
    ]
    assert tp.Adaptive(2).pool_mask(mask).tolist() == [[[True, True]]]
    tokens = mask.transpose(1, 2)
    assert tp.Global().pool_mask(tokens, dims=(1,)).tolist() == [[[True]]]
