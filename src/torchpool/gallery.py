"""What each pooling makes of a picture: a labelled gallery as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchpool import functional as tp
from torchpool.reductions import (
    LogMeanExp,
    Lp,
    Max,
    Mean,
    Min,
    PowerMean,
    Reduction,
    SoftmaxMean,
    Std,
)
from torchpool.windows import Window

REDUCTIONS: dict[str, tuple[str, Reduction]] = {
    "max": ("Max", Max()),
    "min": ("Min", Min()),
    "mean": ("Mean", Mean()),
    "lp": ("Lp, p = 3, scaled", Lp(3.0)),
    "powermean": ("PowerMean, p = 3", PowerMean(3.0)),
    "logmeanexp": ("LogMeanExp, beta = 10", LogMeanExp(10.0)),
    "softmaxmean": ("SoftmaxMean, beta = 10", SoftmaxMean(10.0)),
    "std": ("Std, scaled", Std()),
}
"""Reductions that a gallery can show, by the name that `--reductions` takes. Pixels lie in [0,
1]; what leaves that is scaled to its largest value."""
COLUMNS = 3


@dataclass(frozen=True)
class Gallery:
    """What was drawn: sizes (height, width) in pixels."""

    shape: tuple[int, int]
    pooled: tuple[int, int]
    path: Path


def load(picture: Path | None) -> Tensor:
    """A picture as (1, 3, H, W) in [0, 1]; by default a photograph that ships with scikit-learn.

    Raises:
        ValueError: there is no such file, or it is no readable image.
    """
    if picture is None:
        from sklearn.datasets import load_sample_image

        pixels = load_sample_image("china.jpg").astype(np.float32)
    else:
        from PIL import Image

        if not picture.is_file():
            raise ValueError(
                f"{picture} is {'a folder' if picture.is_dir() else 'missing'}; give the path of "
                "an image"
            )
        try:
            with Image.open(picture) as image:
                pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
        except Exception as error:  # image formats have exceptions of their own
            raise ValueError(
                f"{picture} is not a readable image ({error}); try a PNG or a JPEG"
            ) from None
    return torch.from_numpy(pixels / 255).permute(2, 0, 1).unsqueeze(0).contiguous()


def draw(
    picture: Path | None,
    names: Sequence[str],
    kernel: int,
    stride: int | None,
    padding: int,
    out: Path,
) -> Gallery:
    """Draws the picture and what each reduction makes of it, every pixel as a square of its own.

    Raises:
        ValueError: an unknown reduction, a window that does not fit, a file that cannot be read or
        written.
    """
    for name in names:
        if name not in REDUCTIONS:
            raise ValueError(
                f"--reductions {name}: there is no such one; choose from {', '.join(REDUCTIONS)}"
            )
    if not names:
        raise ValueError(f"--reductions names nothing; choose from {', '.join(REDUCTIONS)}")
    x = load(picture)
    _check_window(x, kernel, padding)
    window = Window(kernel, stride, padding)
    pooled = {name: tp.pool(x, REDUCTIONS[name][1], window) for name in names}
    height, width = x.shape[-2:]
    small = next(iter(pooled.values())).shape[-2:]
    panels = [(f"original, {width} x {height}", x)]
    panels += [
        (f"{REDUCTIONS[n][0]}, {small[1]} x {small[0]}", _visible(n, y)) for n, y in pooled.items()
    ]
    figure = _draw(
        panels,
        (height, width),
        f"{window.kernel} x {window.kernel} windows, stride {stride or kernel}",
    )
    try:
        figure.savefig(_png(out), format="png", dpi=200, facecolor="white")
    except OSError as error:
        raise ValueError(
            f"--out {out} cannot be written: {error.strerror}; name a file in a folder that exists"
        ) from None
    return Gallery((height, width), (small[0], small[1]), out)


def _check_window(x: Tensor, kernel: int, padding: int) -> None:
    height, width = x.shape[-2:]
    if kernel > min(height, width) + 2 * padding:
        raise ValueError(
            f"--kernel {kernel} does not fit a picture of {width} x {height} pixels with "
            f"--padding {padding}; use a smaller kernel"
        )
    if padding >= kernel:
        raise ValueError(
            f"--padding {padding} makes windows that see no pixel; use less than the kernel, "
            f"{kernel}"
        )


def _png(out: Path) -> Path:
    if out.is_dir() or out.suffix.lower() not in ("", ".png"):
        raise ValueError(f"--out {out} must be a PNG file, as gallery.png")
    return out


def _visible(name: str, y: Tensor) -> Tensor:
    """Spreads and norms leave [0, 1]: scaled to their largest value."""
    return y / y.max().clamp(min=1e-12) if name in ("std", "lp") else y


def _draw(panels: Sequence[tuple[str, Tensor]], size: tuple[int, int], title: str) -> Any:
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    cell = 3.3
    figure = Figure(
        figsize=(cell * columns, (cell * size[0] / size[1] + 0.3) * lines + 0.5),
        layout="constrained",
    )
    figure.suptitle(title, fontsize=11, color="#5b6675")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, (label, image) in zip(grid, panels, strict=False):
        pixels = image[0].permute(1, 2, 0).clamp(0, 1).numpy()
        axes.imshow(pixels, interpolation="nearest")
        axes.set_title(label, fontsize=9, color="#1d2430", loc="left")
    for axes in grid:
        axes.set_axis_off()
    return figure
