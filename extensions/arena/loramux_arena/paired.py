"""Comparison of two versions: intervals and p-values of paired differences, in plain Python.

A pair is a question: answers of both versions to it share what makes it hard, which their difference no longer
has. Several samples of a question are one difference, their mean: they are not independent.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

RESAMPLES: Final = 2000
"""Efron and Tibshirani, An Introduction to the Bootstrap (1993), have 1,000 and more for such intervals."""
LEVEL: Final = 0.95
FEW: Final = 20
"""Below, an interval of percentiles is narrower than it says."""


@dataclass(frozen=True)
class Interval:
    """An interval of a mean difference, in the score's units."""

    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """The statistics of the differences of some questions."""

    questions: int
    difference: float
    """Their mean."""
    interval: Interval
    """At `LEVEL`."""
    wins: int
    """Questions at which the version scored more than the baseline."""
    losses: int
    p: float
    """Result of `sign_test`."""

    @property
    def ties(self) -> int:
        """Questions at which both scored the same."""
        return self.questions - self.wins - self.losses


def compare(differences: Sequence[float], seed: int = 0) -> Paired:
    """Return what the differences of at least one question say."""
    wins = sum(each > 0 for each in differences)
    losses = sum(each < 0 for each in differences)
    return Paired(
        len(differences),
        math.fsum(differences) / len(differences),
        bootstrap(differences, seed),
        wins,
        losses,
        sign_test(wins, losses),
    )


def bootstrap(differences: Sequence[float], seed: int, resamples: int = RESAMPLES) -> Interval:
    """Return the interval of percentiles of the mean of paired differences.

    Questions are drawn with replacement, and each brings both scores: Efron and Tibshirani (1993), chapter 13;
    for systems that answer the same questions Koehn, Statistical Significance Tests for Machine Translation
    Evaluation (EMNLP 2004). The seed makes it repeatable.
    """
    draw = random.Random(seed)  # noqa: S311 - statistics, not keys
    count = len(differences)
    means = sorted(math.fsum(draw.choices(differences, k=count)) / count for _ in range(resamples))
    tail = (1 - LEVEL) / 2
    return Interval(means[math.floor(tail * resamples)], means[math.ceil((1 - tail) * resamples) - 1])


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided exact p-value of wins and losses, were both as likely; ties are left out.

    Of scores that are 0 or 1 this is McNemar's test in its exact form: McNemar, Note on the sampling error of
    the difference between correlated proportions or percentages (Psychometrika 12, 1947). Of other scores it is
    the sign test: Dixon and Mood, The Statistical Sign Test (JASA 41, 1946).
    """
    count, fewer = wins + losses, min(wins, losses)
    term = total = 1
    for index in range(fewer):
        term = term * (count - index) // (index + 1)
        total += term
    return min(1.0, total / (1 << count) * 2)


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values that are adjusted for their number, in the same order.

    The chance of one or more false discoveries among all is then at most the level that they are compared with:
    Holm, A Simple Sequentially Rejective Multiple Test Procedure (Scandinavian Journal of Statistics 6, 1979).
    """
    adjusted = [1.0] * len(values)
    least = 0.0
    for place, index in enumerate(sorted(range(len(values)), key=lambda index: values[index])):
        least = max(least, min(1.0, (len(values) - place) * values[index]))
        adjusted[index] = least
    return adjusted
