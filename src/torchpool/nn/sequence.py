"""Layers over time without attention: statistics, sound events, the k largest, segments, ranks, and
a Gaussian window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchpool.functional import pool
from torchpool.nn.over_time import (
    OverTime,
    Valid,
    all_valid,
    among,
    check_channels,
    check_count,
    cleaned,
    harmless,
    over_time,
    product_over_time,
    ranks,
)
from torchpool.ragged import is_readable
from torchpool.reductions import (
    Accumulation,
    Max,
    Mean,
    Reduction,
    Scalar,
    Scalars,
    SoftmaxMean,
    Std,
    where,
)
from torchpool.windows import Adaptive, Padding, Window

__all__ = [
    "AutoPool",
    "GaussianPool",
    "KMaxPool",
    "LinearSoftmax",
    "RankPool",
    "SegmentPool",
    "StatisticsPool",
    "TemporalPyramidPool",
]


class StatisticsPool(OverTime):
    """The mean and the standard deviation of each channel over time: x-vectors' pooling.

    The deviation is taken in two passes against the sample's mean. A sample of one element has the
    deviation 0, with gradient 0.

    Args:
        correction: subtracted from the number of elements in the divisor of the variance; a sample
            of that few elements has the deviation 0.
        layout, padding_side, fill: as in `OverTime`.
    Shape:
        x (N, C, T) -> (N, 2 C): the means, then the deviations
    Source:
        Snyder et al., X-vectors: robust DNN embeddings for speaker recognition, ICASSP 2018.

    >>> StatisticsPool()(torch.tensor([[[1.0, 3.0, 9.0]]]), lengths=torch.tensor([2]))
    tensor([[2., 1.]])
    """

    def __init__(self, *, correction: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.correction = correction

    def _pool(self, x: Tensor, valid: Valid | None) -> Tensor:
        mean = over_time(x, Mean(), valid)
        return torch.cat([mean, over_time(x, Std(self.correction), valid)], 1)

    def extra_repr(self) -> str:
        return self._described(correction=self.correction or None)


class AutoPool(OverTime):
    """The mean over time weighted by softmax(alpha x), with an alpha per class that is learned.

    alpha = 0 is the mean, 1 the softmax-weighted mean, +inf the maximum, -inf the minimum.

    Args:
        channels: classes, one alpha each.
        alpha: the start of every alpha.
        layout, padding_side, fill: as in `OverTime`.
    Shape:
        x (N, C, T) -> (N, C)
    Raises:
        ValueError: x has another number of channels.
    Source:
        McFee, Salamon and Bello, Adaptive pooling operators for weakly labeled sound event
        detection, 1804.10070.
    """

    def __init__(self, channels: int, *, alpha: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        check_count("channels", channels)
        self.channels = channels
        self.start = alpha
        self.alpha = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Puts every alpha back to its start."""
        nn.init.constant_(self.alpha, self.start)

    def _pool(self, x: Tensor, valid: Valid | None) -> Tensor:
        check_channels(self, self.channels, x)
        return over_time(x, SoftmaxMean(self.alpha), valid)

    def extra_repr(self) -> str:
        return self._described(self.channels, alpha=self.start)


@dataclass(frozen=True)
class _SelfWeightedMean(Accumulation):
    """Sum of x^2 over sum of x; 0 where the sum of x is 0."""

    num_sums: ClassVar[int] = 2

    @staticmethod
    def lift(x: Scalar, a: Scalar, p: Scalar) -> Scalars:
        return x, x * x

    @staticmethod
    def lift_dx(x: Scalar, a: Scalar, p: Scalar) -> Scalars:
        return 1.0, 2.0 * x

    @staticmethod
    def finish(s: Scalars, n: Scalar, a: Scalar, p: Scalar) -> Scalar:
        return where(s[0] == 0, 0.0 * s[1], s[1] / where(s[0] == 0, 1.0, s[0]))

    @staticmethod
    def finish_grad(s: Scalars, n: Scalar, a: Scalar, p: Scalar) -> tuple[Scalars, Scalar, Scalar]:
        total = where(s[0] == 0, 1.0, s[0])
        return (
            (
                where(s[0] == 0, 0.0, -s[1] / total / total),
                where(s[0] == 0, 0.0, 1.0 / total),
            ),
            0.0,
            0.0,
        )


class LinearSoftmax(OverTime):
    """The mean over time weighted by the elements themselves: sum of x^2 over sum of x.

    For probabilities: frames of a high probability speak louder. A sample of zeros gives 0.

    Args:
        layout, padding_side, fill: as in `OverTime`.
    Shape:
        x (N, C, T), not negative -> (N, C)
    Source:
        Wang, Li and Metze, A comparison of five multiple instance learning pooling functions for
        sound event detection with weak labeling, 1810.09050.

    >>> LinearSoftmax()(torch.tensor([[[0.25, 0.75]]]))
    tensor([[0.6250]])
    """

    def _pool(self, x: Tensor, valid: Valid | None) -> Tensor:
        return over_time(x, _SelfWeightedMean(), valid)


class KMaxPool(OverTime):
    """The k largest elements of each channel, in the order in which they stand in time.

    Ties go to the earlier element. A sample with fewer than k elements is filled up with `fill`.
    Dynamic k: with a ratio, a sample of n elements keeps max(k, ceil(ratio n)) of them; layer l of
    L in the paper has the ratio (L - l) / L.

    Args:
        k: elements kept.
        ratio: share of the sample's own length that is kept at least, in [0, 1].
        layout, padding_side, fill: as in `OverTime`.
    Shape:
        x (N, C, T) -> (N, C, K) with K = max(k, ceil(ratio T)); `pool_lengths` tells how much of it
        belongs to each sample
    Raises:
        ValueError: k < 1 or ratio outside of [0, 1].
    Source:
        Kalchbrenner, Grefenstette and Blunsom, A convolutional neural network for modelling
        sentences, 1404.2188.

    >>> KMaxPool(2)(torch.tensor([[[5.0, 1.0, 7.0, 6.0]]]))
    tensor([[[7., 6.]]])
    """

    def __init__(self, k: int, *, ratio: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        check_count("k", k)
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio={ratio!r} must lie in [0, 1]")
        self.k = k
        self.ratio = ratio

    def _kept(self, length: Any) -> Any:
        """max(k, ceil(ratio length)) without rounding errors: of 2 / 3 and 9 it makes 6."""
        share = Fraction(self.ratio).limit_denominator(1 << 16)
        up = (length * share.numerator + share.denominator - 1) // share.denominator
        return up.clamp(min=self.k) if isinstance(up, Tensor) else max(self.k, up)

    def pool_lengths(self, lengths: Tensor) -> Tensor:
        """How many of the K outputs belong to each sample: (N,) -> (N,)."""
        kept: Tensor = self._kept(lengths)
        return torch.minimum(kept, lengths)

    def _pool(self, x: Tensor, valid: Valid | None) -> Tensor:
        t = x.shape[2]
        k = self._kept(t)
        valid = all_valid(x) if valid is None else valid
        counts = self.pool_lengths(valid.counts())[..., None]
        places = _largest(x.detach(), valid.mask[:, None], counts, min(k, t))
        y = x.gather(-1, places.clamp(max=t - 1)).masked_fill(places == t, self.fill)
        return F.pad(y, (0, k - y.shape[-1]), value=self.fill)

    def extra_repr(self) -> str:
        return self._described(self.k, ratio=self.ratio or None)


def _largest(x: Tensor, mask: Tensor, counts: Tensor, most: int) -> Tensor:
    """Where the `counts` (N, 1, 1) largest valid elements of x (N, C, T) stand, in order: (N, C,
    most), T for those that there are not. Of equals the earlier ones; NaN is the largest of all."""
    t = x.shape[-1]
    x = x.masked_fill(~mask, -torch.inf)
    best, places = x.topk(min(most + 1, t), dim=-1)
    taken = torch.arange(most, device=x.device) < counts
    places = places[..., :most].where(taken, t).sort(-1).values
    last, following = (
        best.gather(-1, at.clamp(0, best.shape[-1] - 1).expand(*x.shape[:2], 1))
        for at in (counts - 1, counts)
    )
    in_doubt = (last == following) | (last.isnan() & following.isnan())  # which of equals?
    in_doubt = in_doubt & (counts < t)
    if is_readable(x):
        rows = in_doubt.squeeze(-1).nonzero(as_tuple=True)
        if len(rows[0]):
            each = (x[rows], mask[rows[0], 0], counts[rows[0], 0])
            places[rows] = _earliest(*each, last[rows], most)
        return places
    return _earliest(x, mask, counts, last, most).where(in_doubt, places)


def _earliest(x: Tensor, mask: Tensor, counts: Tensor, last: Tensor, most: int) -> Tensor:
    """The same for rows whose last element, of value `last`, has equals."""
    above = (x > last) | (x.isnan() & ~last.isnan())
    level = ((x == last) | (x.isnan() & last.isnan())) & mask
    room = counts - above.sum(-1, keepdim=True)
    chosen = (above & mask) | (level & (level.cumsum(-1, dtype=torch.int32) <= room))
    t = x.shape[-1]
    places = torch.arange(t, device=x.device).where(chosen & (counts > 0), t)
    return places.topk(most, dim=-1, largest=False, sorted=True).values


def _segments(x: Tensor, valid: Valid | None, count: int, reduction: Reduction) -> Tensor:
    """Pools `count` equal parts of each sample's valid elements: (N, C, T) -> (N, C, count).

    Part o of a sample with n of them reads floor(o n / count) up to ceil((o + 1) n / count) - 1, as
    adaptive pooling does.
    """
    if valid is None or valid.lengths is not None:
        y: Tensor = pool(x, reduction, Adaptive(count), **among(valid))
        return y
    rank, n = ranks(valid), valid.counts()
    parts = []
    for o in range(count):
        start, stop = o * n // count, ((o + 1) * n + count - 1) // count
        part = valid.mask & (rank >= start) & (rank < stop)
        parts.append(over_time(x, reduction, Valid(valid.size, part)))
    return torch.stack(parts, -1)


class TemporalPyramidPool(OverTime):
    """Each sample cut into equal parts at several levels, every part pooled: a sample of any length
    becomes a sequence of one length that knows the order.

    Args:
        levels: parts at each level.
        reduction: what a part becomes.
        layout, padding_side, fill: as in `OverTime`.
    Shape:
        x (N, C, T) -> (N, C, K) with K = sum(levels); `.flatten(1)` makes a vector of it
    Raises:
        ValueError: levels is empty or holds a number < 1.
    Source:
        Wang et al., Temporal pyramid pooling based convolutional neural networks for action
        recognition, 1503.01224.

    >>> TemporalPyramidPool((1, 2))(torch.tensor([[[1.0, 5.0, 2.0, 3.0]]]))
    tensor([[[5., 5., 3.]]])
    """

    def __init__(
        self,
        levels: Sequence[int] = (1, 2, 4),
        *,
        reduction: Reduction | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.levels = tuple(levels)
        if not self.levels:
            raise ValueError("levels=() must name at least one level, as (1, 2, 4)")
        for level in self.levels:
            check_count("levels", level)
        self.reduction = Max() if reduction is None else reduction

    def _pool(self, x: Tensor, valid: Valid | None) -> Tensor:
        return torch.cat([_segments(x, valid, n, self.reduction) for n in self.levels], -1)

    def extra_repr(self) -> str:
        return self._described(self.levels, reduction=self.reduction)


class SegmentPool(OverTime):
    """Each sample cut into equal segments, every segment pooled, then perhaps all of them.

    Args:
        num_segments: segments of each sample.
        reduction: what a segment becomes.
        consensus: what the segments become together; by default they stay a sequence.
        layout, padding_side, fill: as in `OverTime`.
    Shape:
        x (N, C, T) -> (N, C, num_segments); with a consensus (N, C)
    Raises:
        ValueError: num_segments < 1.
    Source:
        Wang et al., Temporal segment networks, 1608.00859.

    >>> from torchpool import Max, Mean
    >>> x = torch.tensor([[[1.0, 5.0, 2.0, 3.0]]])
    >>> SegmentPool(2)(x), SegmentPool(2, reduction=Max(), consensus=Mean())(x)
    (tensor([[[3.0000, 2.5000]]]), tensor([[4.]]))
    """

    def __init__(
        self,
        num_segments: int,
        *,
        reduction: Reduction | None = None,
        consensus: Reduction | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_count("num_segments", num_segments)
        self.num_segments = num_segments
        self.reduction = Mean() if reduction is None else reduction
        self.consensus = consensus

    def _pool(self, x: Tensor, valid: Valid | None) -> Tensor:
        y = _segments(x, valid, self.num_segments, self.reduction)
        return y if self.consensus is None else over_time(y, self.consensus, None)

    def extra_repr(self) -> str:
        return self._described(
            self.num_segments, reduction=self.reduction, consensus=self.consensus
        )


class RankPool(OverTime):
    """The direction in which a sample evolves: the parameters of a function that ranks its elements
    by their time.

    v_t is the mean of the elements up to t (or the element itself). Without a ridge, the result is
    the mean of v_q - v_t over all pairs t < q: the first step towards a ranking machine, in closed
    form. With a ridge it is the u that minimises

        sum over t of (u . (v_t - mean v) - (t - mean t))^2 + ridge |u|^2

    Args:
        smooth: rank the means up to each time, as both papers do; False ranks the elements.
        ridge: fit by least squares with this penalty, > 0; by default the closed form.
        layout, padding_side, fill: as in `OverTime`.
    Shape:
        x (N, C, T) -> (N, C); a sample of one element gives zeros
    Raises:
        ValueError: ridge <= 0.
    Source:
        Fernando et al., Rank pooling for action recognition, 1512.01848; closed form: Bilen et al.,
        Action recognition with dynamic image networks, 1612.00738.

    >>> RankPool(smooth=False)(torch.tensor([[[0.0, 1.0, 2.0]]]))
    tensor([[1.3333]])
    """

    def __init__(self, *, smooth: bool = True, ridge: float | None = None, **options: Any) -> None:
        super().__init__(**options)
        if ridge is not None and not ridge > 0:
            raise ValueError(f"ridge={ridge!r} must be greater than 0, or None for the closed form")
        self.smooth = smooth
        self.ridge = ridge

    def _pool(self, x: Tensor, valid: Valid | None) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        counted = all_valid(x) if valid is None else valid
        if self.ridge is None:
            return self._closed_form(harmless(x, valid).to(wide), counted)
        return self._fit(cleaned(x, valid).to(wide), counted, self.ridge)

    def _closed_form(self, x: Tensor, valid: Valid) -> Tensor:
        """The sum of alpha_t x_t, in which alpha_t gathers all pairs of which x_t is a part."""
        time = ranks(valid).to(x.dtype) + 1
        n = valid.counts().to(x.dtype)
        alpha = 2 * time - n - 1
        if self.smooth:  # x_t is part of v_t, v_(t + 1), ...: the sum of alpha / t from t on
            alpha = (alpha / time.clamp(min=1)).masked_fill(~valid.mask, 0)
            alpha = alpha.flip(-1).cumsum(-1).flip(-1)
        pairs = (n * (n - 1) / 2).clamp(min=1)
        weights = (alpha / pairs).masked_fill(~valid.mask, 0).expand(x.shape[0], -1)
        return product_over_time(x, weights.unsqueeze(1)).squeeze(2)

    def _fit(self, x: Tensor, valid: Valid, ridge: float) -> Tensor:
        """Ridge regression of time on v, in the smaller of the spaces of channels and of times."""
        keep = valid.mask.to(x.dtype)
        time = ranks(valid).to(x.dtype) + 1
        n = keep.sum(-1, keepdim=True).clamp(min=1)
        v = x.cumsum(-1) / time.clamp(min=1)[:, None] if self.smooth else x
        v = v * keep[:, None]
        v = (v - (v.sum(-1) / n)[..., None]) * keep[:, None]
        target = ((time - (n + 1) / 2) * keep).unsqueeze(-1)
        c, t = v.shape[1:]
        eye = torch.eye(min(c, t), dtype=x.dtype, device=x.device) * ridge
        if c <= t:
            u: Tensor = torch.linalg.solve(v @ v.mT + eye, v @ target)
        else:
            u = v @ torch.linalg.solve(v.mT @ v + eye, target)
        return u.squeeze(-1)

    def extra_repr(self) -> str:
        return self._described(smooth=self.smooth, ridge=self.ridge)


class GaussianPool(OverTime):
    """A Gaussian window with a width per channel that is learned, and a stride: the low-pass of the
    LEAF audio frontend.

    Tap i of K weighs exp(-d^2 / 2) with d = (i - (K - 1) / 2) / (sigma (K - 1) / 2), and a window
    becomes the weighted mean of its valid elements. sigma is kept in [2 / K, 0.5].

    Args:
        channels: one sigma each.
        kernel: taps of the window, >= 2.
        stride: step between windows; by default 1.
        padding: as in `Window`; by default (K - 1) // 2 before and K // 2 after, so that windows
            stand where they stand in the sample alone ("same" moves them with T). It takes no part
            in the mean.
        sigma: the start, as a share of half the window.
        normalise: divide by the sum of the weights. False is LEAF's plain sum, in which padding and
            what is not valid count as zeros.
        layout, padding_side, fill: as in `OverTime`; `fill` is also the value of a window without
            valid elements.
    Shape:
        x (N, C, T) -> (N, C, O) with O = windows.out_size(T), by default ceil(T / stride);
        `windows.pool_mask` tells which of them saw a valid element
    Raises:
        ValueError: kernel < 2, or x has another number of channels.
    Source:
        Zeghidour et al., LEAF: a learnable frontend for audio classification, 2101.08596.
    """

    def __init__(
        self,
        channels: int,
        kernel: int,
        stride: int = 1,
        *,
        padding: Padding | None = None,
        sigma: float = 0.4,
        normalise: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_count("channels", channels)
        check_count("kernel", kernel)
        if kernel < 2:
            raise ValueError(f"kernel={kernel!r} must be at least 2: one tap has no width")
        centred = (((kernel - 1) // 2, kernel // 2),)
        self.windows = Window(kernel, stride, centred if padding is None else padding)
        self.channels = channels
        self.kernel = kernel
        self.start = sigma
        self.normalise = normalise
        self.sigma = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Puts every sigma back to its start."""
        nn.init.constant_(self.sigma, self.start)

    def taps(self) -> Tensor:
        """The weights of the window, (C, K)."""
        half = (self.kernel - 1) / 2
        places = torch.arange(self.kernel, dtype=self.sigma.dtype, device=self.sigma.device)
        widths = self.sigma.clamp(2 / self.kernel, 0.5) * half
        return torch.exp(-0.5 * ((places - half) / widths[:, None]).square())

    def _pool(self, x: Tensor, valid: Valid | None) -> Tensor:
        check_channels(self, self.channels, x)
        (axis,) = self.windows.axes((x.shape[2],))
        room = (axis.before, axis.after)
        taps = self.taps().to(x.dtype).unsqueeze(1)
        padded = F.pad(cleaned(x, valid), room)
        y = F.conv1d(padded, taps, stride=axis.stride, groups=self.channels)
        y = y.to(x.dtype)  # autocast multiplies in its own type
        if self.normalise:
            inside = (all_valid(x) if valid is None else valid).mask[:, None].to(x.dtype)
            total = F.conv1d(F.pad(inside, room), taps, stride=axis.stride)
            return torch.where(total > 0, y / total.where(total > 0, 1).to(x.dtype), self.fill)
        if valid is None:
            return y
        return y.masked_fill(~self.windows.pool_mask(valid.mask[:, None]), self.fill)

    def extra_repr(self) -> str:
        window = self.windows
        return self._described(
            self.channels,
            self.kernel,
            window.stride,
            padding=window.padding,
            sigma=self.start,
            normalise=self.normalise,
        )
