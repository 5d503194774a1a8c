"""Pooling as naive float64 loops. Knows nothing of the library under test."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

Taps = list[list[int]]


def regular(
    size: int, kernel: int, stride: int, before: int, after: int, dilation: int, ceil: bool
) -> Taps:
    """Positions of every window of one axis; those outside [0, size) are padding."""
    reach = dilation * (kernel - 1) + 1
    windows = []
    start = -before
    while True:
        fits = start + reach <= size + after
        begins_inside = start < size
        if not (fits or (ceil and begins_inside and start + reach - stride < size + after)):
            break
        windows.append([start + j * dilation for j in range(kernel)])
        start += stride
    return windows


def adaptive(size: int, out: int) -> Taps:
    """Positions of every adaptive window of one axis."""
    return [list(range(o * size // out, math.ceil((o + 1) * size / out))) for o in range(out)]


def _mean(x: np.ndarray, w: np.ndarray, p: float) -> float:
    return float((w * x).sum() / w.sum())


def _lp(x: np.ndarray, w: np.ndarray, p: float) -> float:
    top = np.abs(x).max()
    if top == 0 or math.isinf(p) or math.isinf(top):
        return float(top)
    return float(top * (w * (np.abs(x) / top) ** p).sum() ** (1 / p))


def _power_mean(x: np.ndarray, w: np.ndarray, p: float) -> float:
    x = np.maximum(x, 1e-6)
    if math.isinf(p):
        return float(x.max() if p > 0 else x.min())
    if p == 0:
        return float(np.exp((w * np.log(x)).sum() / w.sum()))
    scale = x.max() if p > 0 else x.min()
    if math.isinf(scale):
        return float(scale)
    return float(scale * ((w * (x / scale) ** p).sum() / w.sum()) ** (1 / p))


def _log_mean_exp(x: np.ndarray, w: np.ndarray, p: float) -> float:
    top = (x if p > 0 else -x).max() * (1 if p > 0 else -1)
    return float(top + np.log((w * np.exp(p * (x - top))).sum() / w.sum()) / p)


def _softmax_mean(x: np.ndarray, w: np.ndarray, p: float) -> float:
    top = (x if p >= 0 else -x).max() * (1 if p >= 0 else -1)
    e = w * np.exp(p * (x - top))
    return float((e * x).sum() / e.sum())


def _var(x: np.ndarray, w: np.ndarray, p: float) -> float:
    centre = (w * x).sum() / w.sum()
    return float((w * (x - centre) ** 2).sum() / (w.sum() - p))


FORMULAS: dict[str, Callable[[np.ndarray, np.ndarray, float], float]] = {
    "Sum": lambda x, w, p: float((w * x).sum()),
    "Mean": _mean,
    "Lp": _lp,
    "PowerMean": _power_mean,
    "LogMeanExp": _log_mean_exp,
    "SoftmaxMean": _softmax_mean,
    "Var": _var,
    "Std": lambda x, w, p: math.sqrt(_var(x, w, p)),
}


def pool(
    x: np.ndarray,
    axes: Sequence[Taps],
    name: str,
    p: float | np.ndarray = 0.0,
    mask: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    fill: float = 0.0,
    better: Callable[[float, float], bool] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Values and flat positions of the winners (-1 without one) of every window.

    Args:
        x: (N, C, *S).
        axes: the windows along each pooled axis.
        name: "Max", "Min" or a key of FORMULAS.
        p: the parameter, or one per channel.
        better: when a later candidate beats the best so far; by default the ordering of Max and
            Min.
    """
    outs = [len(taps) for taps in axes]
    values = np.empty((*x.shape[:2], *outs))
    indices = np.full(values.shape, -1, dtype=np.int64)
    sizes = x.shape[2:]
    for o in itertools.product(*map(range, outs)):
        taps = itertools.product(*(axis[i] for axis, i in zip(axes, o, strict=True)))
        real = [q for q in taps if all(0 <= i < size for i, size in zip(q, sizes, strict=True))]
        for n, c in itertools.product(*map(range, x.shape[:2])):
            exponent = float(np.asarray(p).reshape(-1)[c if np.size(p) > 1 else 0])
            inside = [
                q
                for q in real
                if (mask is None or mask[(n, c, *q)])
                and (weights is None or weights[(n, c, *q)] != 0)
            ]
            values[(n, c, *o)], indices[(n, c, *o)] = _window(
                x[n, c], inside, name, exponent, weights, (n, c), fill, better
            )
    return values, indices


def _window(x, inside, name, p, weights, plane, fill, better):  # type: ignore[no-untyped-def]
    if not inside:
        return fill, -1
    if name in ("Max", "Min"):
        if better is None:
            better = (lambda v, b: v > b) if name == "Max" else (lambda v, b: v < b)
        best = inside[0]
        for position in inside[1:]:
            v = x[position]
            if better(v, x[best]) or v != v:
                best = position
        return x[best], int(np.ravel_multi_index(best, x.shape))
    numbers = np.array([x[position] for position in inside], dtype=np.float64)
    w = (
        np.ones(len(inside))
        if weights is None
        else np.array([weights[(*plane, *q)] for q in inside], dtype=np.float64)
    )
    if name in ("Var", "Std") and w.sum() <= p:
        return fill, -1
    with np.errstate(all="ignore"):
        return FORMULAS[name](numbers, w, p), -1
