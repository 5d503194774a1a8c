"""Draws the last run of `gpu.py` for the README: share of a copy's speed by direction, dtype and
layout, medians over the shapes of real models.

    python benchmarks/gpu_chart.py benchmarks/results/gpu-NVIDIA-H200.json docs/pictures/gpu.svg
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from torchpool.plot import GRID, INK, OURS, SOFT, THEIRS, Chart

GROUPS = (("forward", "values"), ("training", "training step"))
DTYPES = ("fp32", "fp16", "bf16")
LAYOUTS = ("contiguous", "channels_last")


def shares(rows: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Of a copy's speed, medians: torchpool's and torch's, by what was measured. Rows whose peer is
    wrong have no speed of the peer."""
    found: dict[str, tuple[float, float]] = {}
    for group, words in GROUPS:
        for dtype in DTYPES:
            for layout in LAYOUTS:
                some = [
                    row
                    for row in rows
                    if row["correct"]
                    and (row["group"], row["dtype"], row["layout"]) == (group, dtype, layout)
                ]
                if some:
                    theirs = [r["copy_us"] / r["eager_us"] for r in some if r["eager_correct"]]
                    name = f"{words}, {dtype}, {layout} ({len(some)})"
                    ours = statistics.median(r["of_copy"] for r in some)
                    found[name] = ours, statistics.median(theirs)
    return found


def chart(found: dict[str, Any]) -> Chart:
    """Two bars for each kind of row."""
    bars = shares(found["rows"])
    figure = Figure(figsize=(8.6, 0.42 * len(bars) + 1.1), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(SOFT)
    axes.tick_params(colors=INK, length=0, labelsize=9.5)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.set_ylim(len(bars) - 0.4, -0.6)
    for y, pair in enumerate(bars.values()):
        for shift, value, colour in zip((-0.19, 0.19), pair, (OURS, THEIRS), strict=True):
            axes.barh(y + shift, value, height=0.36, color=colour)
            axes.text(value + 0.01, y + shift, f"{value:.0%}", va="center", fontsize=8.5, color=INK)
    axes.set_xlim(0, 1.08)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    label = f"share of a copy's speed, median, {found['versions']['gpu']}"
    axes.set_xlabel(label, fontsize=9.5, color=INK)
    for colour, name in ((OURS, "torchpool"), (THEIRS, f"torch {found['versions']['torch']}")):
        axes.bar(0, 0, color=colour, label=name)
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.4, 1.08), ncols=2, frameon=False, fontsize=9.5
    )
    return Chart(figure, label)


def main() -> None:
    source, picture = map(Path, sys.argv[1:3])
    picture.write_text(chart(json.loads(source.read_text())).svg + "\n")


if __name__ == "__main__":
    main()
