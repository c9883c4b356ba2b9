"""The results of requests: counts, rates, percentiles."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """One request; times are seconds from the start of the run."""

    model: str
    begin: float
    """When it was to be sent: waiting for a busy client counts as waiting."""
    first: float | None
    """When its first token came; None when none did."""
    last: float
    """When its last token came, or its failure."""
    end: float
    tokens: int
    first_tokens: int
    """Tokens that came together with the first."""
    prompt_tokens: int
    cached_tokens: int
    error: str = ""
    """The reason of its failure; empty when it was answered."""
    message: str = ""
    """Message of the failure."""

    @property
    def first_token_s(self) -> float | None:
        """Seconds to the first token."""
        return None if self.first is None else self.first - self.begin

    @property
    def per_token_s(self) -> float | None:
        """Seconds per token after those that came first; None where there are none."""
        after = self.tokens - self.first_tokens
        return (self.last - self.first) / after if self.first is not None and after > 0 else None

    @property
    def latency_s(self) -> float:
        """Seconds to the end."""
        return self.end - self.begin


@dataclass(frozen=True)
class Percentiles:
    """The percentiles of a quantity, in seconds; None where nothing was measured."""

    p50: float | None
    p90: float | None
    p99: float | None


@dataclass(frozen=True)
class FailureCount:
    """Failed requests of one reason."""

    count: int
    message: str
    """Message of the first failure."""


@dataclass(frozen=True)
class Figures:
    """The figures of one model, or of all."""

    model: str
    requests: int
    """Those that were answered."""
    errors: Mapping[str, FailureCount]
    """Failures by reason."""
    tokens: int
    prompt_tokens: int
    cached_tokens: int
    tokens_per_s: float
    requests_per_s: float
    first_token_s: Percentiles
    per_token_s: Percentiles
    latency_s: Percentiles


@dataclass(frozen=True)
class Report:
    """A whole run."""

    seconds: float
    """Seconds from the first request to the end of the last."""
    models: tuple[Figures, ...]
    all: Figures


def report(outcomes: Sequence[Outcome], models: Sequence[str]) -> Report:
    """Return the figures of a run, per model and together."""
    begin = min((each.begin for each in outcomes), default=0.0)
    seconds = max((each.end for each in outcomes), default=0.0) - begin
    per_model = [figures(name, [each for each in outcomes if each.model == name], seconds) for name in models]
    return Report(seconds, tuple(per_model), figures("all", outcomes, seconds))


def figures(model: str, outcomes: Sequence[Outcome], seconds: float) -> Figures:
    """Return the figures of some requests; seconds is the length of the run."""
    answered = [each for each in outcomes if not each.error]
    tokens = sum(each.tokens for each in answered)
    return Figures(
        model=model,
        requests=len(answered),
        errors=_failures([each for each in outcomes if each.error]),
        tokens=tokens,
        prompt_tokens=sum(each.prompt_tokens for each in answered),
        cached_tokens=sum(each.cached_tokens for each in answered),
        tokens_per_s=tokens / seconds if seconds else 0.0,
        requests_per_s=len(answered) / seconds if seconds else 0.0,
        first_token_s=_percentiles(answered, lambda each: each.first_token_s),
        per_token_s=_percentiles(answered, lambda each: each.per_token_s),
        latency_s=_percentiles(answered, lambda each: each.latency_s),
    )


def _failures(failed: Sequence[Outcome]) -> dict[str, FailureCount]:
    counts = Counter(each.error for each in failed)
    first = {each.error: each.message for each in reversed(failed)}
    return {reason: FailureCount(count, first[reason]) for reason, count in sorted(counts.items())}


def _percentiles(outcomes: Sequence[Outcome], value: Callable[[Outcome], float | None]) -> Percentiles:
    found = [number for each in outcomes if (number := value(each)) is not None]
    return Percentiles(*(percentile(found, part) for part in (0.5, 0.9, 0.99)))


def percentile(values: Sequence[float], part: float) -> float | None:
    """Return the smallest of the values that at least this part of them does not exceed; None of none."""
    return sorted(values)[max(math.ceil(part * len(values)), 1) - 1] if values else None
