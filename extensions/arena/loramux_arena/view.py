"""The view of an arena: a bar while it runs, tables at the end."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from rich.progress import BarColumn, Progress, TextColumn

from loramux.cli import shell
from loramux.cli.shell import Later
from loramux_arena.contest import Found
from loramux_arena.standings import Comparison, Score, Standing, Standings

FAILURES: Final = 20
"""Most failures that are listed one by one."""
NUMBERS: Final = frozenset(
    {"mean", "difference", "95 %", "won/tied/lost", "p", "p (Holm)", "answers", "failed", "tokens", "first, ms"}
    | {"per token, ms", "cost"}
)


class ArenaView:
    """Shows on a terminal how far a contest is."""

    def __init__(self) -> None:
        self._bars: Progress | None = None
        self._ended = self._failed = self._tokens = 0
        self._began = 0.0

    @contextmanager
    def stage(self, name: str, total: int, found: Found) -> Iterator[None]:
        """Draw a bar for a kind of requests, some of which are kept already, during a block."""
        self._ended = self._failed = self._tokens = 0
        self._began = time.monotonic()
        self._name, self._total, self._again, self._found = name, total, found.again, found
        if not shell.err.is_terminal:
            yield
            return
        columns = (TextColumn("{task.description}"), BarColumn())
        self._bars = Progress(*columns, console=shell.err, transient=True)
        self._task = self._bars.add_task(name, total=total)
        try:
            with Later(self._bars):
                yield
        finally:
            self._bars = None

    def update(self, tokens: int, failed: int) -> None:
        """Count a request that ended."""
        self._ended += 1
        self._failed += failed
        self._tokens += tokens
        if self._bars is None:
            return
        done = self._ended + self._found.again - self._again
        line = f"{self._name}: {done} of {self._total}"
        line += f", {self._failed} failed" if self._failed else ""
        if self._tokens:
            line += f", {self._tokens / max(time.monotonic() - self._began, 1e-9):.0f} tokens/s"
        self._bars.update(self._task, completed=done, description=line)


def show_standings(report: Standings) -> None:
    """Print a table of the versions, one of each score, what failed, and what has to be known."""
    if not any(row.answers for row in report.standings) and not report.scores:
        shell.say("stopped before the first answer was whole")
    headers = ("version", "digest", "answers", "failed", "tokens", "first, ms", "per token, ms", "cost")
    shell.table(headers, [_standing(row, report) for row in report.standings], NUMBERS)
    speed = (
        "" if report.tokens_per_s is None else f"{report.tokens_per_s:.1f} tokens/s, all versions together; "
    )
    again = f"; {report.again} rows were kept from before" if report.again else ""
    shell.show(f"{speed}cost is tokens computed, in those of {report.baseline}; times are medians{again}")
    for score in report.scores:
        shell.show()
        _show_score(score, report.baseline)
    _show_failures(report)
    for note in report.notes:
        shell.say(f"note: {note}", "dim")


def _standing(row: Standing, report: Standings) -> tuple[str, ...]:
    name = row.model if row.name == row.model or "+" in row.model else f"{row.model} = {row.name}"
    return (
        name + (" (baseline)" if row.model == report.baseline else ""),
        shell.digest(row.digest),
        str(row.answers),
        str(row.failed),
        str(row.tokens),
        _ms(row.first_s, 0),
        _ms(row.per_token_s, 1),
        "-" if row.cost is None else f"{row.cost:.2f}",
    )


def _show_score(score: Score, baseline: str) -> None:
    mean = "nothing is scored" if score.baseline is None else f"{baseline} {score.baseline:.3f}"
    shell.show(f"{score.name}: {mean} over {score.questions} question{'s' * (score.questions != 1)}", "bold")
    if score.comparisons:
        headers = ("version", "mean", "difference", "95 %", "won/tied/lost", "p", "p (Holm)")
        shell.table(headers, [_comparison(each) for each in score.comparisons], NUMBERS)


def _comparison(each: Comparison) -> tuple[str, ...]:
    paired = each.paired
    return (
        each.model,
        f"{each.mean:.3f}",
        f"{paired.difference:+.3f}",
        f"{paired.interval.low:+.3f} to {paired.interval.high:+.3f}",
        f"{paired.wins}/{paired.ties}/{paired.losses}",
        _chance(paired.p),
        _chance(each.p_adjusted),
    )


def _show_failures(report: Standings) -> None:
    """Print rows that failed, and of many how many more there are, by reason."""
    for row in report.failures[:FAILURES]:
        place = f"{row.model}, {row.question}" + (f", sample {row.sample}" if report.samples > 1 else "")
        shell.show(f"failed: {row.what} of {place}: {row.reason}: {row.message}", "red")
    more = Counter(row.reason for row in report.failures[FAILURES:])
    for reason, count in sorted(more.items()):
        shell.show(f"failed: {count} more: {reason}", "red")


def _ms(seconds: float | None, digits: int) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.{digits}f}"


def _chance(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"
