"""The measurements of a benchmark: a record per request, and the load of the client; `--json` has all."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from loramux_bench.workload import Plan


@dataclass
class Record:
    """One request; times are seconds from the start of the run."""

    number: int
    model: str
    due_s: float
    """When it was to be sent: waiting for a busy client, or for `--max-concurrency`, counts as waiting."""
    late_s: float = 0.0
    """Seconds from then until the client began with it."""
    first_s: float | None = None
    """When its first token came; None when none did."""
    last_s: float = 0.0
    """When its last token came."""
    end_s: float = 0.0
    """When its stream ended, or failed."""
    chunks: int = 0
    """Chunks of the stream that brought tokens."""
    tokens: int = 0
    """Tokens of the answer: those of `usage`, else a token a chunk."""
    has_usage: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    itl_ms: list[float] = field(default_factory=list)
    """Milliseconds between chunks."""
    error: str = ""
    """Kind of its failure; empty when it was answered."""
    message: str = ""
    """Message of the failure."""

    def add_chunk(self, at_s: float) -> None:
        """Count a chunk with tokens."""
        if self.first_s is None:
            self.first_s = at_s
        else:
            self.itl_ms.append(round(1e3 * (at_s - self.last_s), 3))
        self.last_s = at_s
        self.chunks += 1

    @property
    def ttft_ms(self) -> float | None:
        """Time to first token."""
        return None if self.first_s is None else 1e3 * (self.first_s - self.due_s)

    @property
    def tpot_ms(self) -> float | None:
        """Time per output token after the first chunk, which has its share where chunks have several."""
        if self.first_s is None or self.chunks < 2:
            return None
        return 1e3 * (self.last_s - self.first_s) / (max(self.tokens, self.chunks) * (1 - 1 / self.chunks))

    @property
    def e2el_ms(self) -> float:
        """End-to-end latency."""
        return 1e3 * (self.end_s - self.due_s)


@dataclass(frozen=True)
class ClientLoad:
    """The load of the client's side."""

    cpu: float
    """Seconds of a core per second."""
    lag_ms: float
    """99th percentile of how late the event loop was."""
    late_starts: float
    """Part of the requests that began later than they were due, by more than a few milliseconds."""
    limits: tuple[str, ...]
    """Why the figures may be the client's and not the server's; empty where nothing says so."""


@dataclass
class Run:
    """Everything that a run measured."""

    plan: Plan
    started: str = ""
    """Time of its begin, in ISO 8601."""
    warmed: tuple[str, ...] = ()
    """Models that were asked before anything was measured."""
    num_warmups: int = 0
    records: list[Record] = field(default_factory=list)
    client: ClientLoad | None = None
    ended_by: str = ""
    """Why it ended before its time; empty: it did not."""

    def by_model(self) -> dict[str, list[Record]]:
        """Return the records of each model of the plan."""
        found: dict[str, list[Record]] = {name: [] for name in self.plan.models}
        for record in self.records:
            if record.model in found:
                found[record.model].append(record)
        return found


def percentile(values: Sequence[float], part: float) -> float | None:
    """Return the smallest of the values that at least this part of them does not exceed; None of none."""
    return sorted(values)[max(math.ceil(part * len(values)), 1) - 1] if values else None
