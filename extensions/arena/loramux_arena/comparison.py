"""Paired comparison of versions with a baseline: mean differences with bootstrap intervals, in plain Python.

A pair is an example: what makes it hard is in the scores of both versions, and not in their difference.
"""

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

RESAMPLES: Final = 2000
"""Draws of an interval: Efron and Tibshirani, An Introduction to the Bootstrap (1993), ask for 1,000."""
LEVEL: Final = 0.95
MIN_EXAMPLES: Final = 20
"""With fewer examples, an interval of percentiles is narrower than it says."""


@dataclass(frozen=True)
class Interval:
    """An interval of a mean difference, in the score's unit."""

    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A version beside the baseline, over the examples at which both have a score."""

    model: str
    examples: int
    mean: float
    baseline_mean: float
    difference: float
    """Mean of the differences."""
    interval: Interval
    """Interval of the difference at `LEVEL`."""

    @property
    def verdict(self) -> str:
        """``better`` or ``worse`` where the interval is on one side of 0, else ``no difference shown``."""
        if self.interval.low > 0:
            return "better"
        return "worse" if self.interval.high < 0 else "no difference shown"


def compare(model: str, scores: Mapping[str, float], baseline: Mapping[str, float]) -> Comparison | None:
    """Return the comparison of a version's scores, by example, with the baseline's; None without a pair."""
    pairs = [(scores[each], baseline[each]) for each in sorted(scores.keys() & baseline.keys())]
    if not pairs:
        return None
    differences = [score - other for score, other in pairs]
    return Comparison(
        model,
        len(pairs),
        statistics.fmean(score for score, _ in pairs),
        statistics.fmean(other for _, other in pairs),
        statistics.fmean(differences),
        bootstrap(differences),
    )


def bootstrap(differences: Sequence[float], seed: int = 0) -> Interval:
    """Return the interval of percentiles of the mean of paired differences.

    Examples are drawn with replacement, and each brings both scores: Efron and Tibshirani (1993), chapter 13;
    for systems that answer the same questions Koehn, Statistical Significance Tests for Machine Translation
    Evaluation (EMNLP 2004). The seed makes it repeatable.
    """
    draw = random.Random(seed)  # noqa: S311 - statistics, not keys
    count = len(differences)
    means = sorted(math.fsum(draw.choices(differences, k=count)) / count for _ in range(RESAMPLES))
    tail = (1 - LEVEL) / 2
    return Interval(means[math.floor(tail * RESAMPLES)], means[math.ceil((1 - tail) * RESAMPLES) - 1])
