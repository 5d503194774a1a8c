"""Charts of what a study and a benchmark return, as SVG text and as PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INK, SOFT, GRID = "#1d2430", "#5b6675", "#e6eaef"
OURS, THEIRS, BETTER, WORSE = "#1f6feb", "#b3bcc8", "#1a7f4b", "#c2410c"


@dataclass(frozen=True)
class Chart:
    """A drawing and what it shows."""

    figure: Any
    caption: str

    @property
    def svg(self) -> str:
        """The drawing as an <svg> element with its text as text."""
        import matplotlib

        buffer = io.StringIO()
        style: Any = {
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "svg.hashsalt": "torchpool",
        }
        with matplotlib.rc_context(style):
            self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        text = buffer.getvalue()
        return text[text.index("<svg") :]

    def save(self, path: Path) -> None:
        """Writes the drawing as PNG on white."""
        self.figure.savefig(path, format="png", dpi=160, facecolor="white")


def _panels(names: Sequence[str], count: int, row: float) -> tuple[Any, list[Any]]:
    """A figure of panels side by side over the same rows, which are named once at the left."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, row * len(names) + 1.0), layout="constrained")
    panels = list(figure.subplots(1, count, sharey=True, squeeze=False)[0])
    for axes in panels:
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(SOFT)
        axes.tick_params(colors=INK, length=0, labelsize=9.5)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    return figure, panels


def _interval(values: Sequence[float]) -> float:
    """Half the 95 % confidence interval of a mean; NaN for one value."""
    from scipy import stats

    n = len(values)
    if n < 2:
        return math.nan
    centre = sum(values) / n
    spread = math.sqrt(sum((v - centre) ** 2 for v in values) / (n - 1) / n)
    return float(stats.t.ppf(0.975, n - 1)) * spread


def _seeds(axes: Any, arms: Sequence[dict[str, Any]], key: str, label: str) -> None:
    """Mean with its interval, every seed as a dot, in percent."""
    for y, arm in enumerate(arms):
        values = [100 * v for v in arm[key]]
        centre = sum(values) / len(values)
        axes.plot(values, [y] * len(values), "o", color=THEIRS, markersize=4)
        reach = _interval(values)
        inside = [[min(reach, centre)], [min(reach, 100 - centre)]]  # a share ends at 0 and 100
        axes.errorbar(centre, y, xerr=inside, fmt="o", color=OURS, markersize=5, capsize=3)
    axes.set_xlabel(label, fontsize=9.5, color=INK)


def _differences(
    axes: Any, arms: Sequence[dict[str, Any]], compared: Sequence[Any], reference: str
) -> None:
    """Paired difference of each arm to the reference with its interval; grey is noise."""
    found = {c.arm: c for c in compared}
    axes.axvline(0, color=SOFT, linewidth=1)
    for y, arm in enumerate(arms):
        c = found.get(arm["arm"])
        if c is None:
            if arm["arm"] == reference:
                axes.plot(0, y, "|", color=SOFT, markersize=12)
            continue
        colour = THEIRS if not c.is_significant else BETTER if c.difference > 0 else WORSE
        reach = 100 * (c.high - c.difference) if math.isfinite(c.high) else math.nan
        axes.errorbar(
            100 * c.difference, y, xerr=reach, fmt="o", color=colour, markersize=5, capsize=3
        )
    name = next((arm["title"] for arm in arms if arm["arm"] == reference), reference)
    axes.set_xlabel(f"difference to {name}, points", fontsize=9.5, color=INK)


def summary(
    arms: Sequence[dict[str, Any]], compared: Sequence[Any], reference: str, words: Any
) -> Chart:
    """Accuracy, its paired difference to the reference, and consistency of every arm."""
    figure, panels = _panels([arm["title"] for arm in arms], 3 if compared else 2, 0.4)
    _seeds(panels[0], arms, "accuracies", f"accuracy on held-out {words.examples}, %")
    _seeds(panels[-1], arms, "consistencies", f"{words.consistency}, %")
    caption = "Blue: mean over the seeds and its 95 % interval. Grey dots: single seeds."
    if compared:
        _differences(panels[1], arms, compared, reference)
        caption += (
            " Middle: the difference in accuracy, seed by seed, with its 95 % interval; green and "
            "orange are more than noise after correction for the number of comparisons, grey is "
            "not."
        )
    return Chart(figure, caption)


def _bars(
    axes: Any, arms: Sequence[dict[str, Any]], keys: tuple[str, str], scale: float, label: str
) -> None:
    """Two bars per arm: torchpool and torch's own operators."""
    for y, arm in enumerate(arms):
        for shift, key, colour in zip((-0.19, 0.19), keys, (OURS, THEIRS), strict=True):
            value = arm["cost"][key] * scale
            axes.barh(y + shift, value, height=0.36, color=colour)
            axes.annotate(
                f"{value:,.1f}" if 0 < value < 100 else f"{value:,.0f}",
                (value, y + shift),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=INK,
            )
    axes.margins(x=0.14)
    axes.set_xlim(left=0)
    axes.set_xlabel(label, fontsize=9.5, color=INK)


def costs(arms: Sequence[dict[str, Any]], words: Any) -> Chart:
    """Time of a training step and bytes kept for the backward pass, of both engines."""
    from matplotlib.patches import Patch

    figure, panels = _panels([arm["title"] for arm in arms], 2, 0.48)
    _bars(panels[0], arms, ("step_ms", "torch_step_ms"), 1, "training step, ms")
    _bars(
        panels[1],
        arms,
        ("saved_bytes", "torch_saved_bytes"),
        1 / 1024,
        "kept for the backward pass, KiB",
    )
    figure.legend(
        handles=[
            Patch(color=OURS, label="torchpool"),
            Patch(color=THEIRS, label="torch's own operators"),
        ],
        loc="outside upper right",
        ncols=2,
        fontsize=9,
        frameon=False,
    )
    return Chart(
        figure,
        f"Shorter is better. Left: a training step of the whole network, batch of {words.batch}. "
        f"Right: what {words.pooling} keeps in memory for its backward pass.",
    )


def study_charts(
    arms: Sequence[dict[str, Any]], compared: Sequence[Any], reference: str, words: Any
) -> list[Chart]:
    """Every chart that the results allow, the summary first; `words` are those of the task."""
    if not arms:
        return []
    timed = [arm for arm in arms if arm["cost"]]
    return [
        summary(arms, compared, reference, words),
        *([costs(timed, words)] if timed else []),
    ]


def shares_of_copy(rows: Sequence[dict[str, Any]]) -> Chart:
    """Speed of torchpool and of the best of its peers as shares of a copy's, two bars per row.

    Args:
        rows: each with "title", the shares "ours" and "peer", and the "name" of that peer.
    Raises:
        ValueError: there is no row.
    """
    from matplotlib.patches import Patch

    if not rows:
        raise ValueError("nothing to draw: no row of the group forward was timed beside a peer")
    figure, (axes,) = _panels([row["title"] for row in rows], 1, 0.42)
    axes.axvline(100, color=SOFT, linewidth=1)
    for y, row in enumerate(rows):
        axes.barh(y - 0.19, 100 * row["ours"], height=0.36, color=OURS)
        axes.barh(y + 0.19, 100 * row["peer"], height=0.36, color=THEIRS)
        note = {"textcoords": "offset points", "va": "center", "fontsize": 7.5, "color": INK}
        axes.annotate(row["name"], (100 * row["peer"], y + 0.19), (3, 0), **note)
    axes.set_xlim(left=0)
    axes.margins(x=0.12)
    axes.set_xlabel("speed, % of a copy of as many bytes", fontsize=9)
    handles = [
        Patch(color=OURS, label="torchpool"),
        Patch(color=THEIRS, label="best other library"),
    ]
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=8, frameon=False
    )
    return Chart(figure, "Forward pass, contiguous float32: longer is better.")
