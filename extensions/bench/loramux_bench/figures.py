"""The figures of a run, under the names of the field: TTFT, TPOT, ITL, E2EL, goodput; per model and for all."""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Final

from loramux_bench.records import Record, Run, percentile
from loramux_bench.workload import Plan
from loramux_shared.wording import counted

MANY_PER_CHUNK = 1.05
MIN_FAIR_ANSWERS = 3
"""Answers that a model needs before its mean is compared with that of others."""


@dataclass(frozen=True)
class Summary:
    """A distribution; all None where there are no values."""

    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None


@dataclass(frozen=True)
class Figures:
    """The figures of one model, or of all; rates are per second."""

    model: str
    completed: int
    errors: Mapping[str, int]
    """Failures by kind."""
    input_tokens: int
    output_tokens: int
    request_throughput: float
    output_throughput: float
    request_goodput: float | None
    """Answers within the limits; None without limits."""
    ttft_ms: Summary
    tpot_ms: Summary
    itl_ms: Summary
    """Times between chunks."""
    e2el_ms: Summary
    first_use_ttft_ms: Summary
    """TTFT of the first answer of each model that no warm-up had asked."""
    later_ttft_ms: Summary
    """TTFT of those models' requests that were due after the first token of the first."""


@dataclass(frozen=True)
class Fairness:
    """The spread of the mean TTFT of models with a few answers or more."""

    models: int
    jain_index: float
    """1 where all waited alike, 1/models where one alone waited."""
    fastest: str
    fastest_ttft_ms: float
    slowest: str
    slowest_ttft_ms: float


@dataclass(frozen=True)
class Report:
    """The figures of a whole run."""

    seconds: float
    """Seconds from the first request to the end of the last."""
    models: tuple[Figures, ...]
    all: Figures
    fairness: Fairness | None
    failures: tuple[str, ...]
    """A line for each kind of failure, with its first message."""
    notes: tuple[str, ...]
    """Facts that a reader needs beside the figures."""
    warnings: tuple[str, ...]
    """Why the figures may be wrong."""


def report(run: Run) -> Report:
    """Return the figures of a run."""
    begin = min((each.due_s for each in run.records), default=0.0)
    seconds = max((each.end_s for each in run.records), default=begin) - begin
    records = run.by_model()
    models = [_figures(name, {name: each}, seconds, run) for name, each in records.items()]
    kinds = Counter(each.error for each in run.records if each.error)
    first = {each.error: each.message for each in reversed(run.records)}
    return Report(
        seconds,
        tuple(models),
        _figures("all", records, seconds, run),
        fairness(models),
        tuple(f"failed: {count} times {kind}: {first[kind]}" for kind, count in sorted(kinds.items())),
        tuple(_notes(run, [each for each in run.records if not each.error])),
        tuple(_warnings(run)),
    )


def _figures(model: str, records: Mapping[str, Sequence[Record]], seconds: float, run: Run) -> Figures:
    everything = [*chain.from_iterable(records.values())]
    answered = [each for each in everything if not each.error]
    first, later = _uses([each for name, each in records.items() if name not in run.warmed])
    tokens, span = sum(each.tokens for each in answered), seconds or 1.0
    good = sum(is_good(each, run.plan) for each in answered)
    return Figures(
        model=model,
        completed=len(answered),
        errors=Counter(each.error for each in everything if each.error),
        input_tokens=sum(each.prompt_tokens for each in answered),
        output_tokens=tokens,
        request_throughput=len(answered) / span,
        output_throughput=tokens / span,
        request_goodput=good / span if has_limits(run.plan) else None,
        ttft_ms=_summary(map(_TTFT, answered)),
        tpot_ms=_summary(map(attrgetter("tpot_ms"), answered)),
        itl_ms=_summary(chain.from_iterable(map(attrgetter("itl_ms"), answered))),
        e2el_ms=_summary(map(attrgetter("e2el_ms"), answered)),
        first_use_ttft_ms=_summary(map(_TTFT, first)),
        later_ttft_ms=_summary(map(_TTFT, later)),
    )


_TTFT: Final = attrgetter("ttft_ms")


def _uses(models: Iterable[Sequence[Record]]) -> tuple[Sequence[Record], Sequence[Record]]:
    """Return the first answered request of each model, and those that found their model there."""
    first: list[Record] = []
    later: list[Record] = []
    for records in models:
        answered = sorted((x for x in records if x.first_s is not None and not x.error), key=lambda x: x.due_s)
        first += answered[:1]
        later += [each for each in answered if each.due_s >= (answered[0].first_s or 0.0)]
    return first, later


def has_limits(plan: Plan) -> bool:
    """Return True if a plan has a limit of goodput."""
    return plan.ttft_limit_ms is not None or plan.tpot_limit_ms is not None


def is_good(record: Record, limits: Plan) -> bool:
    """Return True if an answer kept the limits; one without a second token has no TPOT to keep."""
    if record.error or record.ttft_ms is None:
        return False
    within_ttft = limits.ttft_limit_ms is None or record.ttft_ms <= limits.ttft_limit_ms
    return within_ttft and (limits.tpot_limit_ms is None or (record.tpot_ms or 0.0) <= limits.tpot_limit_ms)


def tokens_over_time(records: Sequence[Record], begin: float, end: float, bins: int) -> list[float]:
    """Return the tokens of each of so many stretches, those of an answer spread evenly from first to last."""
    width = (end - begin) / bins or 1.0
    heights = [0.0] * bins
    for each in records:
        if each.first_s is None:
            continue
        first, last = ((at_s - begin) / width for at_s in (each.first_s, each.last_s))
        for index in range(int(first), min(int(last), bins - 1) + 1):
            part = (min(last, index + 1) - max(first, index)) / (last - first) if last > first else 1.0
            heights[index] += each.tokens * part
    return heights


def _summary(values: Iterable[float | None]) -> Summary:
    found = sorted(value for value in values if value is not None)
    mean = statistics.fmean(found) if found else None
    return Summary(mean, *(percentile(found, part) for part in (0.5, 0.9, 0.99)))


def fairness(models: Sequence[Figures]) -> Fairness | None:
    """Return how alike models waited, with Jain's index; None where fewer than two have enough answers."""
    means = {x.model: x.ttft_ms.mean or 0.0 for x in models if x.completed >= MIN_FAIR_ANSWERS}
    if len(means) < 2:
        return None
    squares = sum(mean**2 for mean in means.values())
    index = sum(means.values()) ** 2 / (len(means) * squares) if squares else 1.0
    fastest, slowest = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    return Fairness(len(means), index, fastest, means[fastest], slowest, means[slowest])


def _notes(run: Run, answered: Sequence[Record]) -> Iterable[str]:
    if run.num_warmups:
        count, names = counted(run.num_warmups, "earlier request"), ", ".join(run.warmed)
        yield f"not counted: {count} to {names}, for warm-up"
    with_usage = [each for each in answered if each.has_usage]
    if len(with_usage) < len(answered):
        without = counted(len(answered) - len(with_usage), "answer")
        yield f"tokens: {without} had no usage, where a chunk counts as a token"
    elif answered:
        yield "tokens: as the server's usage says"
    per_chunk = sum(each.tokens for each in with_usage) / max(sum(each.chunks for each in with_usage), 1)
    if per_chunk > MANY_PER_CHUNK:
        yield f"chunks had {per_chunk:.1f} tokens on average: ITL is between chunks, TPOT per token"
    if cached := sum(each.cached_tokens for each in answered):
        share = cached / max(sum(each.prompt_tokens for each in answered), 1)
        yield f"{share:.0%} of the prompt tokens came from a cache of the server"
    if load := run.client:
        busy = f"the client took {load.cpu:.0%} of a core; its event loop was {load.lag_ms:.1f} ms late (p99)"
        yield f"times begin when a request was due; {busy}"


def _warnings(run: Run) -> Iterable[str]:
    if run.ended_by:
        yield f"ended early: {run.ended_by}"
    if run.client and run.client.limits:
        limits = ", ".join(run.client.limits)
        yield f"the client was the limit: {limits}. Lower the load, or use several clients"
