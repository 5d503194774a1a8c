"""Is the difference more than noise? Paired tests over seeds, corrected for the number of
comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.05
"""Share of studies without any true difference that may claim one."""


@dataclass(frozen=True)
class Comparison:
    """An arm against the reference arm, over the seeds that both have run."""

    arm: str
    reference: str
    seeds: int
    difference: float
    """Mean of the paired differences (arm minus reference)."""
    low: float
    high: float
    """95 % confidence interval of the difference (Student's t, not corrected)."""
    p: float
    """Two-sided p-value of the paired t-test."""
    p_holm: float
    """The same, corrected by Holm's method for the number of comparisons."""

    @property
    def is_significant(self) -> bool:
        """Whether the difference is more than noise."""
        return self.p_holm < LEVEL


def paired(
    arm: Sequence[float], reference: Sequence[float], step: float = 0.0
) -> tuple[float, float, float, float]:
    """Mean difference, its 95 % confidence interval and the p-value of the paired t-test.

    Fewer than two pairs say nothing: the interval is infinite and p is 1.

    Args:
        step: what the scores are multiples of (a share of n images: 1 / n). Differences that
            happen to be equal are not taken for free of noise: their variance counts as at least
            that of two roundings to the step, step² / 6.
    """
    from scipy import stats

    differences = [a - b for a, b in zip(arm, reference, strict=True)]
    n = len(differences)
    mean = math.fsum(differences) / n
    if n < 2:
        return mean, -math.inf, math.inf, 1.0
    if not any(differences):
        return 0.0, 0.0, 0.0, 1.0
    variance = math.fsum((d - mean) ** 2 for d in differences) / (n - 1)
    spread = math.sqrt(max(variance, step * step / 6) / n)
    if spread == 0:
        return mean, mean, mean, 0.0
    reach = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * spread
    return mean, mean - reach, mean + reach, float(2 * stats.t.sf(abs(mean) / spread, n - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction of p-values (Holm 1979), in the given order."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected = [1.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def compare(
    scores: dict[str, dict[int, float]], reference: str, step: float = 0.0
) -> list[Comparison]:
    """Every other arm against the reference; scores[arm][seed], multiples of `step`."""
    rows = []
    for arm, by_seed in scores.items():
        shared = sorted(set(by_seed) & set(scores[reference]))
        if arm == reference or not shared:
            continue
        ours, theirs = ([scores[name][s] for s in shared] for name in (arm, reference))
        numbers = paired(ours, theirs, step)
        rows.append((arm, len(shared), numbers))
    corrected = holm([numbers[3] for *_, numbers in rows])
    return [
        Comparison(arm, reference, n, *numbers, p_holm)
        for (arm, n, numbers), p_holm in zip(rows, corrected, strict=True)
    ]
