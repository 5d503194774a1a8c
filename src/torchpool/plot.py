"""Charts of what a study and a benchmark return, as SVG text."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

INK, SOFT, GRID = "#1d2430", "#7b8794", "#e6eaef"
OURS, THEIRS, BETTER, WORSE = "#1f6feb", "#b3bcc8", "#1a7f4b", "#c2410c"


@dataclass(frozen=True)
class Chart:
    """A drawing and what it shows."""

    svg: str
    caption: str


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(SOFT)
    axes.tick_params(colors=INK, length=0, labelsize=9)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "torchpool"}
    ):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _interval(values: Sequence[float]) -> float:
    """Half the 95 % confidence interval of a mean."""
    from scipy import stats

    n = len(values)
    if n < 2:
        return math.nan
    centre = sum(values) / n
    spread = math.sqrt(sum((v - centre) ** 2 for v in values) / (n - 1) / n)
    return float(stats.t.ppf(0.975, n - 1)) * spread


def _rows(axes: Any, names: Sequence[str]) -> range:
    places = range(len(names))
    axes.set_yticks(list(places), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    return places


def accuracy(arms: Sequence[dict[str, Any]]) -> Chart:
    """Mean accuracy with its 95 % interval, every seed as a dot."""
    figure, axes = _figure(0.42 * len(arms) + 0.9)
    for y, arm in zip(_rows(axes, [arm["title"] for arm in arms]), arms, strict=True):
        values = [100 * v for v in arm["accuracies"]]
        axes.plot(values, [y] * len(values), "o", color=THEIRS, markersize=4)
        axes.errorbar(
            100 * arm["accuracy"], y, xerr=_interval(values), fmt="o", color=OURS, capsize=3
        )
    axes.set_xlabel("accuracy on held-out images, %", fontsize=9)
    return Chart(_svg(figure), "Accuracy: mean and 95 % interval in blue, each seed in grey.")


def differences(compared: Sequence[Any], names: dict[str, str], reference: str) -> Chart:
    """Paired difference of each arm to the reference with its 95 % interval."""
    ordered = sorted(compared, key=lambda c: -c.difference)
    figure, axes = _figure(0.42 * len(ordered) + 0.9)
    axes.axvline(0, color=SOFT, linewidth=1)
    for y, c in zip(_rows(axes, [names[c.arm] for c in ordered]), ordered, strict=True):
        colour = SOFT if not c.is_significant else BETTER if c.difference > 0 else WORSE
        finite = math.isfinite(c.low)
        reach = 100 * (c.high - c.difference) if finite else math.nan
        axes.errorbar(100 * c.difference, y, xerr=reach, fmt="o", color=colour, capsize=3)
    axes.set_xlabel(f"points of accuracy more than {names.get(reference, reference)}", fontsize=9)
    return Chart(
        _svg(figure),
        "Paired differences with 95 % intervals. Coloured: more "
        "than noise after correction; grey: not.",
    )


def consistency(arms: Sequence[dict[str, Any]]) -> Chart:
    """Shift consistency against accuracy."""
    figure, axes = _figure(3.6)
    axes.grid(axis="both", color=GRID, linewidth=0.8)
    for i, arm in enumerate(sorted(arms, key=lambda a: a["consistency"])):
        x, y = 100 * arm["accuracy"], 100 * arm["consistency"]
        axes.plot(x, y, "o", color=OURS, markersize=7)
        axes.annotate(
            arm["arm"],
            (x, y),
            (6, 6 if i % 2 else -11),
            textcoords="offset points",
            fontsize=8,
            color=INK,
        )
    axes.margins(0.14)
    axes.set_xlabel("accuracy, %", fontsize=9)
    axes.set_ylabel("shift consistency, %", fontsize=9)
    return Chart(
        _svg(figure), "Up and to the right is better: accurate, and unmoved by small shifts."
    )


def pairs(
    arms: Sequence[dict[str, Any]], ours: str, theirs: str, scale: float, unit: str, caption: str
) -> Chart:
    """Two bars per arm: torchpool and torch's own operators."""
    figure, axes = _figure(0.5 * len(arms) + 1.0)
    for y, arm in zip(_rows(axes, [arm["title"] for arm in arms]), arms, strict=True):
        for shift, key, colour in ((-0.19, ours, OURS), (0.19, theirs, THEIRS)):
            value = arm["cost"][key] * scale
            axes.barh(y + shift, value, height=0.36, color=colour)
            axes.annotate(
                f"{value:,.1f}" if value < 100 else f"{value:,.0f}",
                (value, y + shift),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
                color=INK,
            )
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel(unit, fontsize=9)
    axes.legend(handles=_handles(), loc="lower right", fontsize=8, frameon=False)
    return Chart(_svg(figure), caption)


def _handles() -> list[Any]:
    from matplotlib.patches import Patch

    return [
        Patch(color=OURS, label="torchpool"),
        Patch(color=THEIRS, label="torch's own operators"),
    ]


def study_charts(
    arms: Sequence[dict[str, Any]], compared: Sequence[Any], reference: str
) -> list[Chart]:
    """Every chart that the results allow."""
    if not arms:
        return []
    names = {arm["arm"]: arm["title"] for arm in arms}
    charts = [accuracy(arms)]
    if compared:
        charts.append(differences(compared, names, reference))
    if len(arms) > 1:
        charts.append(consistency(arms))
    timed = [arm for arm in arms if arm["cost"]]
    if timed:
        charts.append(
            pairs(
                timed,
                "step_ms",
                "torch_step_ms",
                1,
                "training step, ms",
                "A training step of the whole network, batch of 64: shorter is better.",
            )
        )
        charts.append(
            pairs(
                timed,
                "saved_bytes",
                "torch_saved_bytes",
                1 / 1024,
                "kept for the backward pass, KiB",
                "What the first pooling layer keeps in memory for its backward pass.",
            )
        )
    return charts


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
    figure, axes = _figure(0.42 * len(rows) + 1.0)
    axes.axvline(100, color=SOFT, linewidth=1)
    for y, row in zip(_rows(axes, [row["title"] for row in rows]), rows, strict=True):
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
    axes.legend(handles=handles, loc="lower right", fontsize=8, frameon=False)
    return Chart(_svg(figure), "Forward pass, contiguous float32: longer is better.")
