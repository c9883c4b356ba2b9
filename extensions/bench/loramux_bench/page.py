"""The report of a run as one page: no script, and nothing is loaded from elsewhere."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files

from loramux_bench.comparison import Comparison
from loramux_bench.figures import Report, tokens_over_time
from loramux_bench.records import Record, Run
from loramux_bench.svg import Axis, Chart, Point, distribution
from loramux_bench.text import (
    CAUTION,
    COMPARED,
    HEADERS,
    cautions,
    cell,
    comparison_rows,
    load_of,
    row,
    summaries,
)

MAX_LINES = 40
"""Models with a line of their own in a chart, those with most answers."""
MIN_ANSWERS = 10
"""Fewer make no line."""
BINS = 60
ROW_PIXELS, MAX_NAME = 20, 20
SECONDS = "seconds since the start"
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>{style}</style></head><body><h1>{title}</h1>"""


def html_page(run: Run, report: Report, baseline: Run | None, comparisons: Sequence[Comparison]) -> str:
    """Return the page of a run, beside a baseline where there is one."""
    style = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    warnings = (f'<section class="warning">{escape(each)}</section>' for each in report.warnings)
    tiles = zip(HEADERS[1:], row(report.all)[1:], strict=True)
    parts = [
        HEAD.format(title=escape(f"Load on {run.plan.url}"), style=style),
        _lines([f"{load_of(run.plan)}; {run.started}"], "muted"),
        *warnings,
        '<div class="tiles">',
        *(f"<section><b>{value}</b>{name}</section>" for name, value in tiles),
        "</div>",
        _comparison(run, baseline, comparisons) if baseline else "",
        '<div class="charts">',
        _distributions("Time to first token", run, baseline, run.plan.ttft_limit_ms, lambda each: each.ttft_ms),
        _distributions(
            "Time per output token", run, baseline, run.plan.tpot_limit_ms, lambda each: each.tpot_ms
        ),
        _waits(run),
        _speeds(run, baseline),
        "</div>",
        _models(report),
        f"<section><h2>Figures</h2>{_lines(summaries(report))}",
        _lines(report.failures, "worse"),
        _table(HEADERS, [*(("", row(each)) for each in report.models), ("all", row(report.all))]),
        _lines(report.notes, "muted"),
        "</section></body></html>\n",
    ]
    return "\n".join(filter(None, parts))


def _lines(lines: Iterable[str], kind: str = "") -> str:
    return "".join(f'<p class="{kind}">{escape(each)}</p>' for each in lines)


def _table(headers: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    head = "".join(f"<th>{escape(each)}</th>" for each in headers)
    body = (
        f'<tr class="{kind}">{"".join(f"<td>{escape(each)}</td>" for each in cells)}</tr>'
        for kind, cells in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _comparison(run: Run, baseline: Run, comparisons: Sequence[Comparison]) -> str:
    kinds = [each.verdict.split()[0] for each in comparisons]
    cells = _table(COMPARED, zip(kinds, comparison_rows(comparisons), strict=True)) if comparisons else ""
    warnings = _lines(cautions(run, baseline, comparisons), "worse")
    origin = _lines([f"The baseline: {baseline.plan.url}, {baseline.started}. {CAUTION}"], "muted")
    return f"<section><h2>Against the baseline</h2>{warnings}{cells}{origin}</section>"


def _figure(title: str, chart: Chart, marks: Mapping[tuple[str, str], str], rows: Sequence[str] = ()) -> str:
    """Return a chart of marks, each under its colour and its name."""
    keys = "".join(
        f'<span><i class="{kind}"></i>{escape(name)}</span>' for (kind, name), mark in marks.items() if mark
    )
    drawing = chart.draw(marks.values(), title, rows)
    return f"<figure><h2>{title}</h2>{drawing}<figcaption>{keys}</figcaption></figure>"


def _distributions(
    title: str, run: Run, baseline: Run | None, limit: float | None, value: Callable[[Record], float | None]
) -> str:
    def points(records: Iterable[Record]) -> list[Point]:
        found = (value(each) for each in records if not each.error)
        return distribution([each for each in found if each is not None])

    everything, before = points(run.records), points(baseline.records if baseline else ())
    per_model = {name: points(records) for name, records in run.by_model().items()}
    longest = (
        sorted(per_model, key=lambda name: -len(per_model[name]))[:MAX_LINES] if len(per_model) > 1 else ()
    )
    ends = [x for x, _ in (*everything, *before)] + [limit or 0.0]
    chart = Chart(Axis.around(ends, "ms", may_log=True), Axis(0.0, 100.0))
    softly = (chart.line(per_model[x], "soft", x) for x in longest if len(per_model[x]) > 2 * MIN_ANSWERS)
    marks = {
        ("soft", f"one model with {MIN_ANSWERS} answers or more"): "".join(softly),
        ("muted", "baseline"): chart.line(before, "muted", "baseline") if before else "",
        ("all", "all models"): chart.line(everything, "all", "all models"),
        ("bad", "limit"): chart.line([(limit, 0.0), (limit, 100.0)], "bad", "limit") if limit else "",
    }
    return _figure(f"{title}: % of answers not above", chart, marks)


def _waits(run: Run) -> str:
    """Draw the TTFT of each request where it was due."""
    waits = sorted((x.due_s, x.ttft_ms, x.model) for x in run.records if x.ttft_ms is not None)
    firsts = {model: (due_s, wait) for due_s, wait, model in reversed(waits) if model not in run.warmed}
    chart = Chart(
        Axis.around([each.due_s for each in run.records], SECONDS),
        Axis.around([wait for _, wait, _ in waits], "", may_log=True),
    )
    marks = {
        ("soft", "request"): chart.dots([(due_s, wait) for due_s, wait, _ in waits], "soft", 2.2),
        ("warm", "first use of a model"): chart.dots(list(firsts.values()), "warm"),
        ("bad", "failed"): chart.dots([(x.due_s, chart.y.high) for x in run.records if x.error], "bad"),
    }
    return _figure("Time to first token over the run, ms", chart, marks)


def _speeds(run: Run, baseline: Run | None) -> str:
    now, before = _speed(run), _speed(baseline) if baseline else []
    points = [*now, *before]
    chart = Chart(Axis.around([x for x, _ in points], SECONDS), Axis.around([y for _, y in points], ""))
    marks = {
        ("muted", "baseline"): chart.line(before, "muted", "baseline") if before else "",
        ("all", "this run"): chart.line(now, "all", "this run"),
    }
    return _figure("Output tokens per second", chart, marks)


def _speed(run: Run) -> list[Point]:
    answered = [each for each in run.records if not each.error]
    end = max((each.end_s for each in answered), default=0.0) or 1.0
    width = end / BINS
    heights = tokens_over_time(answered, 0.0, end, BINS)
    return [((index + 0.5) * width, height / width) for index, height in enumerate(heights)]


def _models(report: Report) -> str:
    """Draw the range of each model's TTFT, the slowest on top."""
    busiest = sorted(report.models, key=lambda each: -each.completed)[:MAX_LINES]
    found = [(x.ttft_ms.p50, x.ttft_ms.p99, x) for x in busiest if x.ttft_ms.p50 and x.ttft_ms.p99]
    ranges = sorted(found, key=lambda each: each[0])
    if len(ranges) < 2:
        return ""
    firsts = [(x.first_use_ttft_ms.p50, y) for y, (_, _, x) in enumerate(ranges) if x.first_use_ttft_ms.p50]
    x_axis = Axis.around([high for _, high, _ in ranges] + [low for low, _, _ in ranges], "ms", may_log=True)
    height = ROW_PIXELS * len(ranges) + 52
    chart = Chart(x_axis, Axis(-0.5, len(ranges) - 0.5), width=1160, height=height, left=150)
    bars = (
        chart.line([(low, y), (high, y)], "range", f"{x.model}: {cell(x.ttft_ms, 1.0, 0)} ms")
        for y, (low, high, x) in enumerate(ranges)
    )
    names = [f"{x.model[:MAX_NAME]}…" if len(x.model) > MAX_NAME else x.model for _, _, x in ranges]
    marks = {
        ("soft", "to p99"): "".join(bars),
        ("all", "p50"): chart.dots([(low, y) for y, (low, _, _) in enumerate(ranges)], "all", 4.0),
        ("warm", "first use"): chart.dots(firsts, "warm"),
    }
    return _figure("Time to first token of models", chart, marks, names)
