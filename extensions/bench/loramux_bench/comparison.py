"""Comparison of two runs: changes of means, with bootstrap intervals over stretches of time."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from loramux_bench.figures import has_limits, is_good, tokens_over_time
from loramux_bench.records import Run
from loramux_bench.workload import Plan

RESAMPLES: Final = 2000
LEVEL: Final = 0.95
MAX_BLOCKS: Final = 20
MIN_ANSWERS: Final = 20
"""Fewer have too few blocks for an interval."""


@dataclass(frozen=True)
class Comparison:
    """One metric of a run beside that of a baseline."""

    metric: str
    baseline: float
    value: float
    change: float
    """Part of the baseline by which the value is more."""
    low: float
    high: float
    """Bounds of the change at `LEVEL`."""
    verdict: str
    """``better`` or ``worse`` where the interval is on one side of 0, else ``no difference shown``."""


Blocks = Sequence[tuple[float, float]]
"""Stretches of a run, each with a total and a weight: the metric is the sum of totals by that of weights."""


def compare(run: Run, baseline: Run) -> list[Comparison]:
    """Return the comparison of each metric, under the limits of the run; none where answers are too few.

    Requests of a run wait for each other, so a resample draws stretches of a run, and not requests: Kuensch,
    The Jackknife and the Bootstrap for General Stationary Observations (1989). Of two runs of independent
    answers that differ in nothing, 4 to 7 % were called different (60 to 1,000 answers); of 60 answers that
    depend on each other (correlation 0.7), 28 %.
    """
    new, old = _metrics(run, run.plan), _metrics(baseline, run.plan)
    return [_comparison(name, new[name], old[name]) for name in new if name in old and _ratio(old[name]) > 0]


def _metrics(run: Run, limits: Plan) -> dict[str, Blocks]:
    answered = sorted((each for each in run.records if not each.error), key=lambda each: each.due_s)
    if len(answered) < MIN_ANSWERS:
        return {}
    blocks = min(MAX_BLOCKS, len(answered) // 2)
    begin, end = answered[0].due_s, max(each.end_s for each in answered)
    width = (end - begin) / blocks
    found: dict[str, Blocks] = {
        "TTFT, ms": _means([each.ttft_ms for each in answered], blocks),
        "TPOT, ms": _means([each.tpot_ms for each in answered], blocks),
        "E2EL, ms": _means([each.e2el_ms for each in answered], blocks),
        "output tokens/s": [(tokens, width) for tokens in tokens_over_time(answered, begin, end, blocks)],
    }
    if has_limits(limits):
        good = Counter(int((each.end_s - begin) / width) for each in answered if is_good(each, limits))
        good[blocks - 1] += good.pop(blocks, 0)
        found["goodput, requests/s"] = [(good[number], width) for number in range(blocks)]
    return {name: each for name, each in found.items() if each}


def _means(values: Sequence[float | None], blocks: int) -> Blocks:
    found = [value for value in values if value is not None]
    if len(found) < MIN_ANSWERS:
        return []
    edges = [round(number * len(found) / blocks) for number in range(blocks + 1)]
    return [(math.fsum(found[low:high]), high - low) for low, high in pairwise(edges)]


def _ratio(blocks: Blocks) -> float:
    return math.fsum(total for total, _ in blocks) / math.fsum(weight for _, weight in blocks)


def _comparison(metric: str, new: Blocks, old: Blocks, seed: int = 0) -> Comparison:
    draw = random.Random(seed)  # noqa: S311 - statistics, not keys
    value, baseline = _ratio(new), _ratio(old)
    changes = sorted(
        (_ratio(draw.choices(new, k=len(new))) - _ratio(draw.choices(old, k=len(old)))) / baseline
        for _ in range(RESAMPLES)
    )
    tail = (1 - LEVEL) / 2
    low = max(changes[math.floor(tail * RESAMPLES)], -1.0)  # no metric is below 0
    high = changes[math.ceil((1 - tail) * RESAMPLES) - 1]
    verdict = "better" if (low > 0) == metric.endswith("/s") else "worse"
    conclusion = verdict if low > 0 or high < 0 else "no difference shown"
    return Comparison(metric, baseline, value, value / baseline - 1, low, high, conclusion)
