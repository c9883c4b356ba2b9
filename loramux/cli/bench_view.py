"""The view of a load: a bar while it runs, a table at the end."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext

from rich.progress import BarColumn, Progress, TextColumn

from loramux.bench.drive import ClientLoad, LoadPlan
from loramux.bench.figures import Figures, Outcome, Percentiles, Report
from loramux.cli import shell
from loramux.cli.later import Later

HEADERS = (
    *("model", "requests", "tokens/s"),
    *("first token p50/90/99 ms", "per token p50/90/99 ms", "whole p50/90/99 s"),
)
RIGHT = frozenset(HEADERS[1:])


class BenchView:
    """Shows on a terminal how far a run is."""

    def __init__(self, plan: LoadPlan) -> None:
        columns = (TextColumn("{task.description}"), BarColumn())
        self._bars = Progress(*columns, console=shell.err, transient=True) if shell.err.is_terminal else None
        self._plan = plan
        self._begin = time.monotonic()
        self.outcomes: list[Outcome] = []
        self._tokens = self._errors = 0
        if self._bars:
            self._task = self._bars.add_task("sending", total=1.0)

    def shown(self) -> AbstractContextManager[object]:
        """Draw the bar during a block that takes a while."""
        return Later(self._bars) if self._bars else nullcontext()

    def update(self, outcome: Outcome) -> None:
        """Count an outcome."""
        self.outcomes.append(outcome)
        self._errors += bool(outcome.error)
        self._tokens += outcome.tokens
        if self._bars:
            took = time.monotonic() - self._begin
            errors = f", {self._errors} failed" if self._errors else ""
            said = f"{len(self.outcomes)} requests{errors}, {self._tokens / max(took, 1e-9):.0f} tokens/s"
            self._bars.update(self._task, completed=self._part(took), description=said)

    def _part(self, took: float) -> float:
        """Return how much of the run is over: by requests or by time, whichever ends it first."""
        by_requests = len(self.outcomes) / self._plan.requests if self._plan.requests else 0.0
        by_time = took / self._plan.duration_s if self._plan.duration_s else 0.0
        return min(max(by_requests, by_time), 1.0)


def show_report(report: Report) -> None:
    """Print a line per model, and what failed."""
    if not (report.all.requests or report.all.errors):
        shell.say("stopped before the first answer was whole; nothing was measured")
        return
    lines = report.models if len(report.models) == 1 else (*report.models, report.all)
    shell.table(HEADERS, [_row(each) for each in lines], RIGHT)
    prompts = report.all.prompt_tokens / max(report.all.requests, 1)
    answers = report.all.tokens / max(report.all.requests, 1)
    shell.show(
        f"{report.seconds:.1f} s, {report.all.requests_per_s:.1f} requests/s; "
        f"on average {prompts:.0f} tokens asked, {answers:.0f} answered"
    )
    for each in report.models:
        for reason, failed in each.errors.items():
            shell.show(f"failed: {each.model}: {failed.count} times {reason}: {failed.message}", "red")


def show_load(load: ClientLoad) -> None:
    """Say on stderr how busy the client was."""
    late = f"{1e3 * (load.lag_s or 0.0):.0f} ms"
    said = f"the client took {load.cpu:.0%} of a core, and its event loop was {late} late (p90)"
    if load.is_bottleneck:
        shell.say(f"warning: {said}: it may have been the bottleneck; ask for less, or from several", "yellow")
    else:
        shell.say(said, "dim")


def _row(each: Figures) -> tuple[str, ...]:
    return (
        each.model,
        str(each.requests),
        f"{each.tokens_per_s:.1f}",
        _cell(each.first_token_s, 1e3, 0),
        _cell(each.per_token_s, 1e3, 1),
        _cell(each.latency_s, 1.0, 2),
    )


def _cell(values: Percentiles, scale: float, digits: int) -> str:
    numbers = (values.p50, values.p90, values.p99)
    return "/".join("-" if number is None else f"{scale * number:.{digits}f}" for number in numbers)
