"""A run on a terminal: a bar while it goes, figures per model at the end."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from rich.progress import BarColumn, Progress, TextColumn

from loramux.cli import shell
from loramux_bench.comparison import LEVEL, MIN_ANSWERS, Comparison
from loramux_bench.figures import Figures, Report, Summary, has_limits
from loramux_bench.records import Record, Run
from loramux_bench.workload import CONCURRENCY, Plan
from loramux_shared.wording import counted

HEADERS = (
    *("model", "done", "failed", "tok/s", "TTFT p50/90/99 ms", "first use ms"),
    *("TPOT p50/90/99 ms", "ITL p99 ms", "E2EL p50/90/99 s"),
)
RIGHT = frozenset(HEADERS[1:])
MAX_ROWS = 20
"""Models that a terminal shows, those with most requests; reports and JSON have all."""


class BenchView:
    """Shows on a terminal how far a run is."""

    def __init__(self, plan: Plan) -> None:
        columns = (TextColumn("{task.description}"), BarColumn())
        self._bars = Progress(*columns, console=shell.err, transient=True) if shell.err.is_terminal else None
        self._plan = plan
        self._begin = time.monotonic()
        self._count = self._tokens = self._failed = 0
        if self._bars:
            self._task = self._bars.add_task("sending", total=1.0)

    def display(self) -> AbstractContextManager[object]:
        """Draw the bar during a block that takes a while."""
        return shell.Later(self._bars) if self._bars else nullcontext()

    def update(self, record: Record) -> None:
        """Count a record."""
        if not self._bars:
            return
        self._count += 1
        self._failed += bool(record.error)
        self._tokens += record.tokens
        took = time.monotonic() - self._begin
        failed = f", {self._failed} failed" if self._failed else ""
        summary = f"{self._count} requests{failed}, {self._tokens / max(took, 1e-9):.0f} tokens/s"
        self._bars.update(self._task, completed=self._part(took), description=summary)

    def _part(self, took: float) -> float:
        """Return how much of the run is over: by requests or by time, whichever ends it first."""
        by_requests = self._count / self._plan.num_prompts if self._plan.num_prompts else 0.0
        by_time = took / self._plan.duration_s if self._plan.duration_s else 0.0
        return min(max(by_requests, by_time), 1.0)


def load_of(plan: Plan) -> str:
    """Return a load in a sentence."""
    loop = f"closed loop of {plan.max_concurrency or CONCURRENCY}"
    if plan.request_rate is not None:
        loop = f"open loop of {plan.request_rate:g} requests/s, burstiness {plan.burstiness:g}"
    models = f"{counted(len(plan.models), 'model')}, {plan.lora_distribution}"
    prompts = f"prompts of {plan.dataset_path or f'{plan.input_len} tokens'}"
    answers = f"answers of {'' if plan.ignore_eos else 'up to '}{plan.output_len}"
    return f"{loop}; {models}; {prompts}, {answers}; seed {plan.seed}"


def show_report(report: Report) -> None:
    """Print a line per model, what is true of all, and what failed."""
    if not (report.all.completed or report.all.errors):
        shell.say("stopped before the first answer was whole; nothing was measured")
        return
    for warning in report.warnings:
        shell.say(f"warning: {warning}", "yellow")
    busiest = sorted(report.models, key=lambda each: -each.completed)[:MAX_ROWS]
    lines = [each for each in report.models if each in busiest]
    together = [report.all] if len(lines) > 1 else []
    shell.table(HEADERS, [row(each) for each in (*lines, *together)], RIGHT)
    for line in summaries(report):
        shell.show(line)
    if left := len(report.models) - len(busiest):
        shell.say(f"{left} models with fewer requests: see --json or --html", "dim")
    for line in report.notes:
        shell.say(line, "dim")
    for line in report.failures:
        shell.show(line, "red")


def summaries(report: Report) -> list[str]:
    """Return what is true of all models together, in lines."""
    each, count = report.all, max(report.all.completed, 1)
    rates = f"{each.request_throughput:.2f} requests/s, {each.output_throughput:.1f} output tokens/s"
    sizes = f"{each.input_tokens / count:.0f} tokens in, {each.output_tokens / count:.0f} out"
    lines = [f"{report.seconds:.1f} s, {rates}; on average {sizes}"]
    if each.request_goodput is not None:
        share = each.request_goodput / each.request_throughput if each.completed else 0.0
        lines.append(
            f"goodput: {each.request_goodput:.2f} requests/s within the limits, {share:.0%} of answers"
        )
    if fair := report.fairness:
        lines.append(
            f"fairness of {fair.models} models: Jain's index {fair.jain_index:.3f}; mean TTFT from "
            f"{fair.fastest_ttft_ms:.0f} ms ({fair.fastest}) to {fair.slowest_ttft_ms:.0f} ms ({fair.slowest})"
        )
    first, later = each.first_use_ttft_ms.p50, each.later_ttft_ms.p50
    if first is not None and later is not None:
        lines.append(f"first use of a model: TTFT {first:.0f} ms (p50), later {later:.0f} ms")
    return lines


def row(each: Figures) -> tuple[str, ...]:
    """Return the cells of a model."""
    return (
        each.model,
        str(each.completed),
        str(sum(each.errors.values()) or "-"),
        f"{each.output_throughput:.1f}",
        cell(each.ttft_ms, 1.0, 0),
        _number(each.first_use_ttft_ms.p50, 0),
        cell(each.tpot_ms, 1.0, 1),
        _number(each.itl_ms.p99, 1),
        cell(each.e2el_ms, 1e-3, 2),
    )


def cell(values: Summary, scale: float, digits: int) -> str:
    """Return three percentiles."""
    found = (values.p50, values.p90, values.p99)
    return "/".join(_number(None if value is None else scale * value, digits) for value in found)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


COMPARED = ("metric", "baseline", "this run", "change", f"{LEVEL:.0%} interval", "verdict")
CAUTION = "An interval covers what varies within a run, not between runs: repeat both."


def show_comparison(run: Run, baseline: Run, comparisons: Sequence[Comparison]) -> None:
    """Print how a run differs from its baseline."""
    shell.show()
    for line in cautions(run, baseline, comparisons):
        shell.say(line, "yellow")
    if comparisons:
        shell.table(COMPARED, comparison_rows(comparisons), frozenset(COMPARED[1:4]))
        shell.say(CAUTION, "dim")


def cautions(run: Run, baseline: Run, comparisons: Sequence[Comparison]) -> list[str]:
    """Return why a comparison may say little."""
    lines = []
    if not comparisons:
        lines.append(f"not compared: both runs need {MIN_ANSWERS} answers or more")
    if has_limits(run.plan) and comparisons and "goodput" not in comparisons[-1].metric:
        lines.append("goodput is not compared: the baseline has none within these limits")
    if load_of(run.plan) != load_of(baseline.plan) or run.plan.models != baseline.plan.models:
        lines.append(f"the baseline had another load: {load_of(baseline.plan)}")
    if baseline.ended_by or (baseline.client and baseline.client.limits):
        lines.append("the baseline ended early, or its client was the limit")
    return lines


def comparison_rows(comparisons: Sequence[Comparison]) -> list[tuple[str, ...]]:
    """Return the cells of a comparison."""
    return [
        (
            each.metric,
            f"{each.baseline:.1f}",
            f"{each.value:.1f}",
            f"{each.change:+.1%}",
            f"{each.low:+.1%} to {each.high:+.1%}",
            each.verdict,
        )
        for each in comparisons
    ]
