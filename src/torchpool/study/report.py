"""What a study found, as sentences, a table, JSON and one self-contained HTML page."""

from __future__ import annotations

import json
import math
import platform
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

import torchpool
from torchpool import plot
from torchpool.study.experiment import Plan, Results
from torchpool.study.statistics import LEVEL, Comparison, compare
from torchpool.study.trial import DISTURBANCES


def title(label: str, plan: Plan) -> str:
    """An arm's label in words."""
    name, _, copy = label.partition("#")
    return plan.task.arms[name].title + (f" (again, {copy})" if copy else "")


def rows(results: Results) -> list[dict[str, Any]]:
    """One row per arm that has been scored, the best mean accuracy first."""
    made = []
    for arm in results.plan.arms:
        by_seed = results.scores.get(arm)
        if not by_seed:
            continue
        accuracies = [by_seed[seed].accuracy for seed in sorted(by_seed)]
        consistencies = [by_seed[seed].consistency for seed in sorted(by_seed)]
        cost = results.costs.get(arm)
        made.append(
            {
                "arm": arm,
                "title": title(arm, results.plan),
                "seeds": len(accuracies),
                "accuracies": accuracies,
                "accuracy": mean(accuracies),
                "accuracy_sd": stdev(accuracies) if len(accuracies) > 1 else math.nan,
                "consistencies": consistencies,
                "consistency": mean(consistencies),
                "consistency_sd": stdev(consistencies) if len(consistencies) > 1 else math.nan,
                "parameters": next(iter(by_seed.values())).parameters,
                "cost": asdict(cost) if cost else None,
            }
        )
    return sorted(made, key=lambda row: -row["accuracy"])


def comparisons(results: Results, measure: str = "accuracy") -> list[Comparison]:
    """Every arm against the plan's first, over the seeds they share."""
    scores = {
        arm: {seed: float(getattr(score, measure)) for seed, score in by_seed.items()}
        for arm, by_seed in results.scores.items()
    }
    reference = results.plan.arms[0]
    predictions = len(results.plan.task.test)
    if measure == "consistency":
        predictions *= len(DISTURBANCES)
    return compare(scores, reference, 1 / predictions) if reference in scores else []


def _points(share: float) -> str:
    return f"{100 * share:.1f} points"


def sentence(c: Comparison, of: str, plan: Plan) -> str:
    """A comparison in words."""
    arm, reference = title(c.arm, plan), title(c.reference, plan)
    interval = (
        f"95 % interval {100 * c.low:+.1f} to {100 * c.high:+.1f}, "
        f"p = {c.p_holm:.3g} after correction"
    )
    if not c.is_significant:
        return (
            f"{arm} and {reference}: no difference in {of} beyond noise "
            f"({100 * c.difference:+.1f} points; {interval})."
        )
    word = "more" if c.difference > 0 else "less"
    return f"{arm} has {_points(abs(c.difference))} {word} {of} than {reference} ({interval})."


def verdict(results: Results) -> list[str]:
    """What to choose and why, the most important first."""
    table, compared = rows(results), comparisons(results)
    if not table:
        return ["No trial has finished yet."]
    lines = [_choice(table, compared, results.plan)]
    steady = [c for c in comparisons(results, "consistency") if c.is_significant]
    best = max(steady, key=lambda c: c.difference, default=None)
    if best and best.difference > 0:
        lines.append(
            f"Steadiest: {sentence(best, results.plan.task.words.consistency, results.plan)}"
        )
    timed = [row for row in table if row["cost"]]
    if len(timed) > 1:
        cheapest = min(timed, key=lambda row: row["cost"]["step_ms"])
        lines.append(
            f"Cheapest training step: {cheapest['title']}, {cheapest['cost']['step_ms']:.1f} ms."
        )
    if compared and max(row["seeds"] for row in table) < 5:
        lines.append(
            "With fewer than five seeds only very large differences can be told from noise: run "
            "more with --seeds."
        )
    return lines


def _choice(table: list[dict[str, Any]], compared: list[Comparison], plan: Plan) -> str:
    """The advice that accuracy gives."""
    reference = title(plan.arms[0], plan)
    if not compared:
        return f"Only {table[0]['title']} has run: there is nothing to compare it with."
    better = [c for c in compared if c.is_significant and c.difference > 0]
    if better:
        best = max(better, key=lambda c: c.difference)
        return f"Choose {title(best.arm, plan)}: {sentence(best, 'accuracy', plan)}"
    if any(c.is_significant for c in compared):
        return (
            f"Stay with {reference}: no other pooling is more accurate beyond noise, and some are "
            f"less."
        )
    first = f"No pooling differs from {reference} in accuracy by more than noise here"
    leader = max(compared, key=lambda c: c.difference)
    if leader.difference > 0 and leader.p < LEVEL:
        first += (
            f" ({title(leader.arm, plan)} came out highest, {100 * leader.difference:+.1f} points, "
            f"p = {leader.p_holm:.2g} after correction)"
        )
    return f"{first}: choose by {plan.task.words.consistency} and by cost."


def as_json(results: Results) -> dict[str, Any]:
    """Everything that was found, with what it was found on."""
    task = results.plan.task
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "torchpool": torchpool.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "device": results.plan.device,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "plan": results.plan.as_json(),
        "data": {
            "name": task.data,
            "train": len(task.train),
            "test": len(task.test),
            "classes": list(task.classes),
            "skipped": list(task.skipped),
        },
        "complete": results.is_complete,
        "verdict": verdict(results),
        "arms": rows(results),
        "comparisons": [asdict(c) for c in comparisons(results)],
        "consistency": [asdict(c) for c in comparisons(results, "consistency")],
    }


def _finite(value: Any) -> Any:
    """Numbers that JSON cannot hold become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def write(results: Results, out: Path) -> Path:
    """Writes results.json, report.html and chart.png into `out`; returns the report's path."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    out.mkdir(parents=True, exist_ok=True)
    found = as_json(results)
    (out / "results.json").write_text(json.dumps(_finite(found), indent=2), encoding="utf-8")
    plan = results.plan
    charts = plot.study_charts(found["arms"], comparisons(results), plan.arms[0], plan.task.words)
    environment = Environment(
        loader=PackageLoader("torchpool.study", "templates"),
        autoescape=select_autoescape(default=True),
    )
    page = environment.get_template("report.html").render(
        found=found,
        charts=charts,
        compared={c.arm: c for c in comparisons(results)},
        reference=title(plan.arms[0], plan),
        repeats=len(plan.arms) - 1,
        words=plan.task.words,
    )
    if charts:
        charts[0].save(out / "chart.png")
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path
