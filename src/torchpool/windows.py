"""Where a pooling layer looks: windows along each pooled axis, as integers.

Nothing here knows tensors. `Windows.axes(in_sizes)` resolves a description against the sizes of an
input and gives one
`Axis` per pooled axis; everything else (kernels, gradients, divisors, masks) reads only those.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Union, cast

Size = Union[int, Sequence[int]]
Padding = Union[int, str, Sequence[Union[int, Sequence[int]]]]
NAMED_PADDINGS = ("valid", "same", "same_lower", "causal")


class Axis(NamedTuple):
    """The windows along one pooled axis of a known size.

    Regular windows: output `o` reads the positions `o * stride - before + j * dilation` for `j <
    kernel`.
    Adaptive windows have `stride == 0`: output `o` reads `floor(o * I / O)` up to `ceil((o + 1) * I
    / O) - 1`, and `kernel` is at
    least the longest such run. Positions outside `[0, in_size)` are padding.
    """

    in_size: int
    out_size: int
    kernel: int
    stride: int
    dilation: int
    before: int
    after: int

    @property
    def is_adaptive(self) -> bool:
        """Whether the windows follow the input's size instead of a stride."""
        return self.stride == 0

    def starts(self) -> tuple[int, ...]:
        """First position of each window; negative where it begins in the padding."""
        return _starts(self)

    def lengths(self) -> tuple[int, ...]:
        """Number of taps of each window, padding included."""
        return _lengths(self)

    def taps(self) -> tuple[tuple[int, int], ...]:
        """Per output the range `(first, end)` of taps that lie inside the input; `first == end`
        where none does."""
        return _taps(self)

    def counts(self, include_pad: bool = False) -> tuple[int, ...]:
        """Number of elements of each window: inside the input, or inside the padded extent
        `[-before, in_size + after)`."""
        return _counts(self, include_pad)


class Span(NamedTuple):
    """Windows of inputs of some lengths, as numbers or as tensors of numbers.

    A window reads the positions `start + j * dilation` for `j < taps` that lie inside `[0,
    length)`; the padded input is `[low, high)`.
    """

    start: Any
    taps: Any
    dilation: int
    low: Any
    high: Any


@lru_cache(maxsize=1024)
def _starts(axis: Axis) -> tuple[int, ...]:
    if axis.is_adaptive:
        return tuple(o * axis.in_size // axis.out_size for o in range(axis.out_size))
    return tuple(o * axis.stride - axis.before for o in range(axis.out_size))


@lru_cache(maxsize=1024)
def _lengths(axis: Axis) -> tuple[int, ...]:
    if not axis.is_adaptive:
        return (axis.kernel,) * axis.out_size
    stops = (-(-(o + 1) * axis.in_size // axis.out_size) for o in range(axis.out_size))
    return tuple(stop - start for start, stop in zip(_starts(axis), stops, strict=True))


@lru_cache(maxsize=1024)
def _taps(axis: Axis) -> tuple[tuple[int, int], ...]:
    ranges = []
    for start, length in zip(_starts(axis), _lengths(axis), strict=True):
        end = min(length, max(0, -((start - axis.in_size) // axis.dilation)))
        first = min(end, max(0, -(start // axis.dilation)))
        ranges.append((first, end))
    return tuple(ranges)


@lru_cache(maxsize=1024)
def _counts(axis: Axis, include_pad: bool) -> tuple[int, ...]:
    if not include_pad:
        return tuple(end - first for first, end in _taps(axis))
    limit = axis.in_size + axis.after
    pairs = zip(_starts(axis), _lengths(axis), strict=True)
    return tuple(
        min(length, max(0, -((start - limit) // axis.dilation))) for start, length in pairs
    )


class Windows(ABC):
    """Where to look along each pooled axis. Subclasses are frozen values; an int in them stands for
    every pooled axis."""

    __slots__ = ()

    @property
    @abstractmethod
    def num_axes(self) -> int | None:
        """Number of pooled axes this description is bound to; None where it fits any number."""

    @abstractmethod
    def axes(self, in_sizes: Sequence[int]) -> tuple[Axis, ...]:
        """Resolves against the sizes of the pooled axes.

        Args:
            in_sizes: elements along each pooled axis.
        Raises:
            ValueError: the description does not fit these sizes.
        """

    def out_size(self, in_size: Size) -> Any:
        """Output size for an input size: an int for an int, a tuple for a sequence.

        >>> Window(3, stride=2, padding=1).out_size((112, 112))
        (56, 56)
        """
        if isinstance(in_size, Sequence):
            return tuple(axis.out_size for axis in self.axes(in_size))
        return self.axes((in_size,))[0].out_size

    def pool_lengths(self, lengths: Any) -> Any:
        """How many outputs samples of these lengths have: each as if it were pooled alone.

        A sample that is too short for a single window has 0 outputs (alone, it is refused); so has
        an empty one, except where the number of outputs is fixed (`Global`, `Adaptive`).

        Args:
            lengths: an int, or an integer tensor of any shape: elements of each sample
                along the one pooled axis.
        Raises:
            ValueError: windows over several axes, or windows that no length decides (`Fractional`).

        >>> Window(3, stride=2).pool_lengths(7), Adaptive(4).pool_lengths(7)
        (3, 4)
        """
        raise ValueError(f"{self} has no rule for samples of different lengths; pool each alone")

    def spans(self, lengths: Any, outputs: Any) -> Span:
        """The windows `outputs` of samples of these lengths; arguments broadcast.

        Args:
            lengths: as in `pool_lengths`.
            outputs: numbers of the windows, from 0; those a sample does not have give no defined
                result.
        Raises:
            ValueError: as `pool_lengths`.
        """
        raise ValueError(f"{self} has no rule for samples of different lengths; pool each alone")

    def most_taps(self, size: int) -> int:
        """The most elements that a window of a sample of at most `size` elements reads."""
        return size

    def pool_mask(self, mask: Any, dims: Sequence[int] | None = None) -> Any:
        """Which outputs saw at least one valid element.

        Args:
            mask: bool tensor, True where an element is valid.
            dims: the pooled axes; by default all after the first two.
        Shape:
            mask (N, C, *S) -> bool (N, C, *O)
        """
        pooled = range(2, mask.ndim) if dims is None else dims
        for dim, axis in zip(pooled, self.axes([mask.shape[d] for d in pooled]), strict=True):
            reach = [
                range(start, start + n * axis.dilation, axis.dilation)
                for start, n in zip(axis.starts(), axis.lengths(), strict=True)
            ]
            inside = [
                [0 <= p < axis.in_size for p in window]
                for window in _rectangular(reach, axis.kernel)
            ]
            clipped = [
                [min(max(p, 0), axis.in_size - 1) for p in window]
                for window in _rectangular(reach, axis.kernel)
            ]
            taken = mask.movedim(dim, -1)[..., clipped] & mask.new_tensor(inside)
            mask = taken.any(-1).movedim(-1, dim)
        return mask


def _rectangular(windows: Sequence[range], width: int) -> list[list[int]]:
    """Runs of positions filled up with -1, which is outside any input."""
    return [[*window, *([-1] * (width - len(window)))] for window in windows]


def _larger(a: Any, b: Any) -> Any:
    """The larger of two numbers, or of each pair of a tensor's."""
    return max(a, b) if isinstance(a, int) or not hasattr(a, "clamp") else a.clamp(min=b)


def _smaller(a: Any, b: Any) -> Any:
    """The smaller of two numbers, or of each pair of a tensor's."""
    return min(a, b) if isinstance(a, int) or not hasattr(a, "clamp") else a.clamp(max=b)


def _is_int(value: Any) -> bool:
    """True for int and for torch's symbolic integers, False for bool and float."""
    return not isinstance(value, (bool, float, str)) and hasattr(value, "__index__")


def _spread(value: Any, count: int, name: str) -> tuple[int, ...]:
    if _is_int(value):
        return (value,) * count
    values = tuple(value)
    if len(values) == 1:
        return values * count
    if len(values) != count:
        raise ValueError(
            f"{name}={value!r} has {len(values)} entries, but {count} "
            f"axes are pooled; give an int or {count} ints"
        )
    return values


def _check_ints(value: Any, name: str, least: int) -> None:
    if type(value) is int and value >= least:  # asking for sequences takes longer than pooling
        return
    entries = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    if len(entries) == 0:
        raise ValueError(f"{name} is empty; give an int or one int per pooled axis")
    for entry in entries:
        if not _is_int(entry):
            raise TypeError(
                f"{name}={value!r} must be an int or a sequence of ints, not {type(entry).__name__}"
            )
        if entry < least:
            raise ValueError(f"{name}={value!r} must be at least {least}")


def _length(*values: Any) -> int | None:
    """Number of axes that the sequences among the values speak of."""
    for value in values:
        if isinstance(value, (int, str)) or value is None:
            continue
        if isinstance(value, Sequence) and len(value) > 1:
            return len(value)
    return None


def _freeze(instance: Any, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(instance, name, tuple(value) if isinstance(value, list) else value)


@dataclass(frozen=True)
class Window(Windows):
    """Windows of one size at a regular stride.

    Args:
        kernel: elements per window along each pooled axis, >= 1.
        stride: step between windows; by default the kernel.
        padding: an int, one int per axis, one `(before, after)` pair per axis, or one of
            "valid" (none), "same" (ceil(size / stride) outputs, the odd element after),
            "same_lower" (the odd element before),
            "causal" (all before: output t sees nothing after t * stride). Any size, also more than
            half the kernel.
        dilation: step between the elements of a window, >= 1.
        ceil_mode: also windows that end beyond the padded input, if they begin inside the input or
            the padding before it.
    Raises:
        TypeError, ValueError: naming the argument, its value and what it must be.

    >>> Window(2).out_size(5), Window(2, ceil_mode=True).out_size(5)
    (2, 3)
    >>> Window(3, padding="same").out_size(5)
    2
    """

    kernel: Size
    stride: Size | None = None
    padding: Padding = 0
    dilation: Size = 1
    ceil_mode: bool = False

    def __post_init__(self) -> None:
        _freeze(
            self,
            kernel=self.kernel,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
        )
        _check_ints(self.kernel, "kernel", 1)
        if self.stride is not None:
            _check_ints(self.stride, "stride", 1)
        _check_ints(self.dilation, "dilation", 1)
        _check_padding(self.padding)

    @property
    def num_axes(self) -> int | None:
        return _length(self.kernel, self.stride, self.dilation, self.padding)

    def axes(self, in_sizes: Sequence[int]) -> tuple[Axis, ...]:
        count = len(in_sizes)
        kernel = _spread(self.kernel, count, "kernel")
        stride = kernel if self.stride is None else _spread(self.stride, count, "stride")
        dilation = _spread(self.dilation, count, "dilation")
        padding = _pairs(self.padding, in_sizes, kernel, stride, dilation)
        return tuple(
            self._axis(*numbers)
            for numbers in zip(in_sizes, kernel, stride, dilation, padding, strict=True)
        )

    def _axis(
        self, in_size: int, kernel: int, stride: int, dilation: int, padding: tuple[int, int]
    ) -> Axis:
        before, after = padding
        reach = dilation * (kernel - 1) + 1
        out = self._outputs(in_size, reach, stride, before, after)
        if out < 1:
            raise ValueError(
                f"{self} does not fit an input of size {in_size}: a window spans "
                f"{reach} elements, the input with its padding has "
                f"{in_size + before + after}; use a smaller kernel or dilation, or more padding"
            )
        return Axis(in_size, out, kernel, stride, dilation, before, after)

    def _outputs(self, in_size: Any, reach: int, stride: int, before: Any, after: Any) -> Any:
        """Number of windows; less than 1 where none fits."""
        room = in_size + before + after - reach
        if self.padding in ("same", "same_lower"):
            return (in_size + stride - 1) // stride
        if self.ceil_mode:
            begun = _smaller((room + stride - 1) // stride, (in_size + before - 1) // stride)
            return _larger(room // stride, begun) + 1
        return room // stride + 1

    def single(self) -> tuple[int, int, int]:
        """Kernel, stride and dilation of windows over one axis.

        Raises:
            ValueError: they speak of several axes.
        """
        if self.num_axes not in (None, 1):
            raise ValueError(f"{self} describes {self.num_axes} axes; lengths speak of one")
        (kernel,) = _spread(self.kernel, 1, "kernel")
        stride = kernel if self.stride is None else _spread(self.stride, 1, "stride")[0]
        return kernel, stride, _spread(self.dilation, 1, "dilation")[0]

    def pool_lengths(self, lengths: Any) -> Any:
        kernel, stride, dilation = self.single()
        ((before, after),) = _pairs(self.padding, (lengths,), (kernel,), (stride,), (dilation,))
        reach = dilation * (kernel - 1) + 1
        return _larger(self._outputs(lengths, reach, stride, before, after), 0) * (lengths > 0)

    def spans(self, lengths: Any, outputs: Any) -> Span:
        kernel, stride, dilation = self.single()
        ((before, after),) = _pairs(self.padding, (lengths,), (kernel,), (stride,), (dilation,))
        start = outputs * stride - before
        return Span(start, kernel, dilation, -before, lengths + after)

    def most_taps(self, size: int) -> int:
        return self.single()[0]


def _check_padding(padding: Any) -> None:
    if isinstance(padding, str):
        if padding not in NAMED_PADDINGS:
            raise ValueError(
                f"padding={padding!r} is not known; use an int, ints, (before, "
                f"after) pairs or one of {', '.join(NAMED_PADDINGS)}"
            )
        return
    for entry in padding if isinstance(padding, Sequence) else (padding,):
        _check_ints(entry, "padding", 0)
        if isinstance(entry, Sequence) and len(entry) != 2:
            raise ValueError(
                f"padding={padding!r}: the entry {entry!r} must be an int or a pair (before, after)"
            )


def _pairs(
    padding: Any, in_sizes: Any, kernel: Any, stride: Any, dilation: Any
) -> list[tuple[int, int]]:
    if isinstance(padding, str):
        return [
            _named_pair(padding, *numbers)
            for numbers in zip(in_sizes, kernel, stride, dilation, strict=True)
        ]
    entries = (padding,) if _is_int(padding) else tuple(padding)
    if len(entries) not in (1, len(in_sizes)):
        raise ValueError(
            f"padding={padding!r} has {len(entries)} entries, but {len(in_sizes)} axes "
            f"are pooled; give an int, {len(in_sizes)} ints or pairs"
        )
    pairs = [
        (e, e) if _is_int(e) else (cast(Sequence[int], e)[0], cast(Sequence[int], e)[1])
        for e in entries
    ]
    return pairs * len(in_sizes) if len(pairs) == 1 else pairs


def _named_pair(
    padding: str, in_size: int, kernel: int, stride: int, dilation: int
) -> tuple[int, int]:
    reach = dilation * (kernel - 1)
    if padding == "valid":
        return (0, 0)
    if padding == "causal":
        return (reach, 0)
    total = _larger((in_size - 1) // stride * stride + reach + 1 - in_size, 0)
    small, large = total // 2, total - total // 2
    return (small, large) if padding == "same" else (large, small)


@dataclass(frozen=True)
class Adaptive(Windows):
    """As many windows as the output shall have; they follow the input's size and may overlap.

    Output `o` of `O` reads `floor(o * I / O)` up to `ceil((o + 1) * I / O) - 1`, as torch's
    adaptive pooling does.

    Args:
        output_size: outputs along each pooled axis, >= 1; None keeps the size of the input.

    >>> Adaptive((7, None)).out_size((224, 100))
    (7, 100)
    """

    output_size: int | Sequence[int | None] | None

    def __post_init__(self) -> None:
        _freeze(self, output_size=self.output_size)
        sizes = self.output_size if isinstance(self.output_size, Sequence) else (self.output_size,)
        _check_ints([1 if size is None else size for size in sizes], "output_size", 0)

    @property
    def num_axes(self) -> int | None:
        return _length(self.output_size)

    def axes(self, in_sizes: Sequence[int], symbolic: bool = False) -> tuple[Axis, ...]:
        """As `Windows.axes`; for symbolic sizes `kernel` is a bound without a case distinction."""
        sizes = (
            (None,) * len(in_sizes)
            if self.output_size is None
            else _spread(self.output_size, len(in_sizes), "output_size")
        )
        return tuple(
            _adaptive_axis(i, i if o is None else o, symbolic)
            for i, o in zip(in_sizes, sizes, strict=True)
        )

    def _single(self) -> int | None:
        if self.num_axes not in (None, 1):
            raise ValueError(f"{self} describes {self.num_axes} axes; lengths speak of one")
        return self.output_size[0] if isinstance(self.output_size, Sequence) else self.output_size

    def pool_lengths(self, lengths: Any) -> Any:
        size = self._single()
        return lengths if size is None else lengths * 0 + size

    def spans(self, lengths: Any, outputs: Any) -> Span:
        size: Any = self._single()
        if size is None:
            size = _larger(lengths, 1)
        start = outputs * lengths // size
        stop = ((outputs + 1) * lengths + size - 1) // size
        return Span(start, stop - start, 1, start, stop)

    def most_taps(self, size: int) -> int:
        outputs = self._single()
        return 1 if outputs is None else min(size, size // max(1, outputs) + 2)


def _adaptive_axis(in_size: int, out_size: int, symbolic: bool) -> Axis:
    if out_size == 0:
        return Axis(in_size, 0, 1, 0, 1, 0, 0)
    if not symbolic and in_size % out_size == 0:
        longest = in_size // out_size
    else:  # at most one too long; no gcd, which symbolic sizes do not have
        longest = (in_size + 2 * out_size - 2) // out_size
    return Axis(in_size, out_size, longest, 0, 1, 0, 0)


@dataclass(frozen=True)
class Global(Windows):
    """One window that is the whole input.

    >>> Global().out_size((7, 7))
    (1, 1)
    """

    @property
    def num_axes(self) -> int | None:
        return None

    def axes(self, in_sizes: Sequence[int]) -> tuple[Axis, ...]:
        return tuple(Axis(size, 1, size, size, 1, 0, 0) for size in in_sizes)

    def pool_lengths(self, lengths: Any) -> Any:
        return lengths * 0 + 1

    def spans(self, lengths: Any, outputs: Any) -> Span:
        return Span(outputs * 0, lengths, 1, 0, lengths)


@dataclass(frozen=True)
class Fractional(Windows):
    """Windows of one size at pseudo-random steps of mean `in / out`, drawn anew for each plane.

    Args:
        kernel: elements per window along each pooled axis.
        output_size: outputs along each pooled axis; or
        output_ratio: output size as a fraction of the input size, in (0, 1).
        samples: uniform random numbers in [0, 1), shape (N, C, pooled axes), in the order of the
            pooled axes; drawn if absent.
        generator: torch.Generator to draw them from.
    Raises:
        ValueError: both or none of output_size and output_ratio are given, or they do not fit the
        input.
    Source:
        Graham, Fractional max-pooling, 1412.6071.
    """

    kernel: Size
    output_size: Size | None = None
    output_ratio: float | Sequence[float] | None = None
    samples: Any = None
    generator: Any = None

    def __post_init__(self) -> None:
        _freeze(
            self, kernel=self.kernel, output_size=self.output_size, output_ratio=self.output_ratio
        )
        _check_ints(self.kernel, "kernel", 1)
        if (self.output_size is None) == (self.output_ratio is None):
            raise ValueError(
                f"give either output_size or output_ratio, not output_size={self.output_size!r} "
                f"and output_ratio={self.output_ratio!r}"
            )
        if self.output_size is not None:
            _check_ints(self.output_size, "output_size", 1)
        ratios = (
            self.output_ratio if isinstance(self.output_ratio, Sequence) else (self.output_ratio,)
        )
        if any(ratio is not None and not 0 < ratio < 1 for ratio in ratios):
            raise ValueError(
                f"output_ratio={self.output_ratio!r} must lie between 0 and 1, both excluded"
            )

    @property
    def num_axes(self) -> int | None:
        return _length(self.kernel, self.output_size, self.output_ratio)

    def axes(self, in_sizes: Sequence[int]) -> tuple[Axis, ...]:
        kernels = _spread(self.kernel, len(in_sizes), "kernel")
        outs = self._out_sizes(in_sizes)
        for size, kernel, out in zip(in_sizes, kernels, outs, strict=True):
            if out < 1 or out + kernel - 1 > size:
                raise ValueError(
                    f"{self} does not fit an input of size {size}: output {out} + kernel {kernel} "
                    f"- 1 must be at most {size}, and the output at least 1"
                )
        return tuple(
            Axis(size, out, kernel, 1, 1, 0, 0)
            for size, out, kernel in zip(in_sizes, outs, kernels, strict=True)
        )

    def _out_sizes(self, in_sizes: Sequence[int]) -> tuple[int, ...]:
        if self.output_size is not None:
            return _spread(self.output_size, len(in_sizes), "output_size")
        ratio = self.output_ratio
        ratios = (
            (ratio,) * len(in_sizes)
            if isinstance(ratio, (int, float))
            else tuple(cast(Sequence[float], ratio))
        )
        return tuple(int(size * r) for size, r in zip(in_sizes, ratios, strict=True))
