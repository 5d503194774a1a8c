"""Samples of different lengths in one tensor: padded with lengths, packed with offsets, jagged
nested tensors, packed sequences.

Nothing here loops over samples or waits for a device. Values are checked where reading them costs
nothing, on plain CPU tensors; anywhere else (another device, a traced graph, under `torch.func`)
they are clamped into their range instead.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils.rnn import PackedSequence

from torchpool.windows import Axis, Global, Span, Windows

PADDING_SIDES = ("right", "left")


def is_readable(t: Tensor) -> bool:
    """Whether looking at values is free: a plain tensor on the CPU that nobody traces."""
    return (
        t.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not isinstance(t, FakeTensor)
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)
    )


def check_lengths(lengths: Any, size: int, device: torch.device, *, count: int | None) -> Tensor:
    """Lengths as int64, each within [0, size].

    Args:
        lengths: integer tensor (N,).
        size: elements of the axis that they speak of.
        device: where the values lie.
        count: how many there must be; None for any number.
    Raises:
        TypeError: not an integer tensor.
        ValueError: another shape or device, or (on the CPU) a length outside of [0, size].
    """
    made = _integers(lengths, "lengths", device)
    if made.ndim != 1 or (count is not None and made.shape[0] != count):
        wanted = "(N,)" if count is None else f"({count},), one length per sample"
        raise ValueError(f"lengths of shape {tuple(made.shape)} must have the shape {wanted}")
    if not is_readable(made):
        return made.clamp(0, size)
    known = made.numpy()
    if known.size and not 0 <= np.minimum.reduce(known) <= np.maximum.reduce(known) <= size:
        sample = int(((known < 0) | (known > size)).argmax())
        raise ValueError(
            f"lengths[{sample}]={known[sample]} must lie in [0, {size}], "
            f"the elements along the axis"
        )
    return made


def check_offsets(offsets: Any, size: int, device: torch.device) -> Tensor:
    """Offsets as int64: segment i is the rows `offsets[i] .. offsets[i + 1] - 1`.

    Args:
        offsets: integer tensor (M + 1,), not decreasing, from 0 to `size`.
        size: rows of the packed values.
        device: where the values lie.
    Raises:
        TypeError: not an integer tensor.
        ValueError: another shape or device, or (on the CPU) values that are not sorted or do not
            run from 0 to `size`.
    """
    made = _integers(offsets, "offsets", device)
    if made.ndim != 1 or made.shape[0] == 0:
        raise ValueError(
            f"offsets of shape {tuple(made.shape)} must have the shape (segments + 1,)"
        )
    if not is_readable(made):
        return made.clamp(0, size).cummax(0).values
    known = made.numpy()
    if known[0] != 0 or known[-1] != size:
        raise ValueError(
            f"offsets run from {known[0]} to {known[-1]}; they must run from 0 to "
            f"{size}, the number of packed rows"
        )
    falls = known[1:] < known[:-1]
    if falls.any():
        i = int(falls.argmax())
        raise ValueError(
            f"offsets must not decrease, but offsets[{i}]={known[i]} > "
            f"offsets[{i + 1}]={known[i + 1]}"
        )
    return made


def check_index(index: Any, size: int, device: torch.device, num_segments: int | None) -> Tensor:
    """The segment of each row as int64.

    Args:
        index: integer tensor (P,), not negative.
        size: rows, P.
        device: where the values lie.
        num_segments: segments that there are; None where the index tells.
    Raises:
        TypeError: not an integer tensor.
        ValueError: another shape or device, or (on the CPU) an entry outside of [0, num_segments).
    """
    made = _integers(index, "index", device)
    if made.shape != (size,):
        raise ValueError(
            f"index of shape {tuple(made.shape)} must have the shape ({size},), one per row"
        )
    if is_readable(made):
        wrong = made < 0
        if num_segments is not None:
            wrong = wrong | (made >= num_segments)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            limit = "" if num_segments is None else f" and less than num_segments={num_segments}"
            raise ValueError(f"index[{row}]={int(made[row])} must be at least 0{limit}")
    return made


def _integers(t: Any, name: str, device: torch.device) -> Tensor:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be an integer torch.Tensor, not {type(t).__name__}")
    if t.dtype.is_floating_point or t.dtype.is_complex or t.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {t.dtype}; it must be an integer type ({name}.long())")
    if t.device != device:
        raise ValueError(
            f"{name} lies on {t.device}, the values on {device}; "
            f"move it with {name}.to({str(device)!r})"
        )
    return t.long()


def check_side(padding_side: Any) -> None:
    """Raises unless padding_side is "right" or "left"."""
    if padding_side not in PADDING_SIDES:
        raise ValueError(f"padding_side={padding_side!r} must be 'right' or 'left'")


def length_mask(lengths: Tensor, size: int, *, padding_side: str = "right") -> Tensor:
    """Which elements of a padded batch belong to a sample.

    Args:
        lengths: integer tensor, elements of each sample.
        size: elements along the padded axis.
        padding_side: "right" where samples begin at 0, "left" where they end at `size`.
    Shape:
        lengths (N,) -> bool (N, size)
    Raises:
        TypeError: lengths is not an integer tensor.
        ValueError: lengths has another shape, or holds a value outside of [0, size] (checked on the
            CPU; elsewhere values are clamped, so that nothing waits for the device).

    >>> length_mask(torch.tensor([2, 0, 3]), 3)
    tensor([[ True,  True, False],
            [False, False, False],
            [ True,  True,  True]])
    """
    check_side(padding_side)
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be an integer torch.Tensor, not {type(lengths).__name__}")
    lengths = check_lengths(lengths, size, lengths.device, count=None)
    places = torch.arange(size, device=lengths.device)
    if padding_side == "left":
        return places >= size - lengths.unsqueeze(-1)
    return places < lengths.unsqueeze(-1)


def lengths_of(mask: Tensor) -> tuple[Tensor, str] | None:
    """The lengths that a mask tells, and the side of its padding; None where the valid elements of
    some sample are not one run at that end, where looking at them costs something, and where calls
    are recorded: a graph would hold this mask's lengths for every mask.

    Shape:
        bool (N, T) -> int64 (N,), T at least 1
    """
    if not is_readable(mask) or is_recorded():
        return None
    known = mask.numpy()
    size, total = known.shape[1], np.count_nonzero(known)
    end, begin, starts = known.argmin(1), known.argmax(1), known[:, 0]
    right = np.where(starts & (end == 0), size, end)  # up to the first that is not valid
    left = np.where(starts | (begin > 0), size - begin, 0)  # from the first that is
    for side, lengths in (("right", right), ("left", left)):
        if lengths.sum() == total:
            return torch.from_numpy(lengths), side
    return None


def is_recorded() -> bool:
    """Whether somebody may write down the calls of operators, to repeat them for other values."""
    modes: int = torch._C._len_torch_dispatch_stack()
    return modes > 0 or torch._C._get_tracing_state() is not None


# Windows of samples of different lengths: tables ----------------------------------------


class Table(NamedTuple):
    """The windows of a batch, each sample's as if it were alone."""

    rows: Tensor
    """int64 (N or 1, 1, 1, M, 3): first position, number of taps, padding that a mean may count."""
    axis: Axis
    """The pooled axis as operators take it; its kernel bounds the taps of a window."""


def rows(span: Span, length: Tensor, live: Tensor, begin: Tensor | int) -> Tensor:
    """The rows of a table: windows clipped to their samples, which begin at `begin`."""
    step = span.dilation
    end = (-((span.start - length) // step)).clamp(min=0).clamp(max=span.taps)
    skipped = (-(span.start // step)).clamp(min=0)
    count = (end - skipped).clamp(min=0) * live
    reach = (-((span.start - span.high) // step)).clamp(min=0).clamp(max=span.taps)
    padded = (reach * live - count).clamp(min=0)
    first = torch.where(count > 0, span.start + skipped * step, 0) + begin
    return torch.stack(torch.broadcast_tensors(first, count, padded), -1)


def padded_table(
    windows: Windows, lengths: Tensor, size: int, outputs: int, padding_side: str
) -> Table:
    """The windows of a padded batch.

    Args:
        lengths: int64 (N,), within [0, size].
        size: elements along the axis.
        outputs: room for windows; those that a sample does not have are empty, and stand on the
            side where its padding stands.
    """
    if isinstance(windows, Global):
        first = size - lengths if padding_side == "left" else torch.zeros_like(lengths)
        return Table(_runs(first, lengths)[:, None, None, None], Axis(size, 1, size, 1, 1, 0, 0))
    length = lengths.unsqueeze(-1)
    pooled = windows.pool_lengths(length)
    output = torch.arange(outputs, device=lengths.device)
    begin: Tensor | int = 0
    if padding_side == "left":
        output, begin = output - (outputs - pooled), size - length
    live = (output >= 0) & (output < pooled)
    span = windows.spans(length, output)
    made = rows(span, length, live, begin)[:, None, None]
    return Table(made, Axis(size, outputs, windows.most_taps(size), 1, span.dilation, 0, 0))


def packed_table(windows: Windows, offsets: Tensor, size: int) -> tuple[Table, Tensor]:
    """The windows of packed samples, and the offsets of the packed results (int64, (N + 1,)).

    Waits for the device where the number of windows depends on the lengths: for all but `Global`,
    `Adaptive` and windows that keep every length.

    Args:
        offsets: int64 (N + 1,).
        size: packed rows.
    """
    if isinstance(windows, Global):
        return segment_table(offsets, size), torch.arange(offsets.shape[0], device=offsets.device)
    lengths = offsets.diff()
    made = torch.cat([offsets.new_zeros(1), windows.pool_lengths(lengths).cumsum(0)])
    outputs = _total(windows, made, size)
    output = torch.arange(outputs, device=offsets.device)
    sample = torch.searchsorted(made, output, right=True) - 1
    length = lengths[sample]
    span = windows.spans(length, output - made[sample])
    table = rows(span, length, output >= 0, offsets[sample])[None, None, None]
    axis = Axis(size, outputs, windows.most_taps(size), 1, span.dilation, 0, 0)
    return Table(table, axis), made


def _total(windows: Windows, made: Tensor, size: int) -> int:
    """Number of windows of all samples, read from the device only where nothing else tells it."""
    fixed = windows.pool_lengths(0)
    if fixed:
        return int(fixed) * (made.shape[0] - 1)
    # The number of windows is the floor of a linear function of the length: equal at three lengths
    # in a row, equal at all.
    if all(windows.pool_lengths(length) == length for length in (1, 2, 3)):
        return size
    return int(made[-1])


def segment_table(offsets: Tensor, size: int) -> Table:
    """One window per segment of packed rows."""
    count = offsets.diff()
    table = _runs(offsets[:-1], count)[None, None, None]
    return Table(table, Axis(size, count.shape[0], size, 1, 1, 0, 0))


def _runs(first: Tensor, count: Tensor) -> Tensor:
    """The rows of a table whose windows are runs of positions without padding."""
    return torch.stack([first, count, torch.zeros_like(count)], -1)


def padded_runs(lengths: Tensor, size: int, padding_side: str) -> Any:
    """The rows of `padded_table` of readable lengths and one window per sample, as an array of
    int64 (N, 1, 3)."""
    table = np.zeros((lengths.shape[0], 1, 3), np.int64)
    table[:, 0, 1] = known = lengths.numpy()
    if padding_side == "left":
        table[:, 0, 0] = size - known
    return table


def packed_runs(offsets: Tensor) -> Any:
    """The rows of `segment_table` of readable offsets, as an array of int64 (1, M, 3)."""
    known = offsets.numpy()
    table = np.zeros((1, known.shape[0] - 1, 3), np.int64)
    table[0, :, 0] = known[:-1]
    np.subtract(known[1:], known[:-1], out=table[0, :, 1])
    return table


# Jagged nested tensors and packed sequences ---------------------------------------------


class Packed(NamedTuple):
    """Samples one after another along one axis."""

    values: Tensor
    offsets: Tensor
    dim: int


def is_ragged(x: Any) -> bool:
    """Whether a value carries its own lengths."""
    return isinstance(x, PackedSequence) or (isinstance(x, Tensor) and x.is_nested)


def unpack(x: Any) -> Packed:
    """The samples of a jagged nested tensor or a packed sequence.

    Raises:
        TypeError: a nested tensor of torch's strided layout.
    """
    if isinstance(x, PackedSequence):
        return _unpack_sequence(x)
    if x.layout is not torch.jagged:
        raise TypeError(
            "x is a nested tensor of layout torch.strided; torchpool takes the jagged layout: "
            "torch.nested.nested_tensor(list(x.unbind()), layout=torch.jagged)"
        )
    if x.lengths() is not None:
        x = x.contiguous()
    return Packed(x.values(), x.offsets().long(), x._ragged_idx - 1)


def repack(like: Any, values: Tensor, offsets: Tensor, dim: int) -> Any:
    """Samples in the form of `like`, from which they were made."""
    if isinstance(like, PackedSequence):
        return _repack_sequence(like, values, offsets)
    return torch.nested.nested_tensor_from_jagged(values, offsets, jagged_dim=dim + 1)


def _unpack_sequence(x: PackedSequence) -> Packed:
    """A packed sequence holds all first elements, then all second ones; its sizes are on the
    CPU."""
    sizes = x.batch_sizes
    count = int(sizes[0])
    lengths = (sizes > torch.arange(count).unsqueeze(-1)).sum(-1)
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    sample = torch.repeat_interleave(lengths)
    time = torch.arange(len(sample)) - offsets[sample]
    places = (sizes.cumsum(0) - sizes)[time] + sample
    return Packed(x.data.index_select(0, places.to(x.data.device)), offsets, 0)


def _repack_sequence(like: PackedSequence, values: Tensor, offsets: Tensor) -> PackedSequence:
    lengths = offsets.diff()  # falling, as those of the sequence: more elements, more windows
    if int(lengths.min()) == 0:
        shortest = int((like.batch_sizes > len(lengths) - 1).sum())
        raise ValueError(
            f"a sequence of {shortest} elements gives no window, and a PackedSequence holds no "
            f"empty sequence; use more padding, or lengths= or offsets= instead"
        )
    sizes = (lengths > torch.arange(int(lengths.max())).unsqueeze(-1)).sum(-1)
    time = torch.repeat_interleave(sizes)
    sample = torch.arange(len(time)) - (sizes.cumsum(0) - sizes)[time]
    places = offsets[sample] + time
    data = values.index_select(0, places.to(values.device))
    return PackedSequence(data, sizes, like.sorted_indices, like.unsorted_indices)
