"""The view of a check's report: findings, the bundle, and the adapter's origin."""

from __future__ import annotations

from collections.abc import Sequence

from rich.filesize import decimal

from loramux.cli import shell
from loramux.cli.tables import kind, task
from loramux.records import AdapterReport, RowReport
from loramux_shared.bundle.modules import NO_LAYER
from loramux_shared.deployment import Repository
from loramux_shared.faults import Finding

RIGHT = frozenset({"rows", "rank", "scale", "|A|", "|B|", "|BA| least", "|BA| most"})


def show_report(report: AdapterReport) -> None:
    """Print a report."""
    shell.show(f"adapter  {_name(report.adapter)}")
    shell.show(f"base     {_name(report.base)}")
    if report.base_model_name:
        shell.show(f"trained  on {report.base_model_name}, as the adapter says")
    if report.licence or report.base_licence:
        shell.show(f"licence  {report.licence or 'not said'}; the base's: {report.base_licence or 'not said'}")
    sizes = ", ".join(f"{name} {decimal(file.size)}" for name, file in sorted(report.files.items()))
    if sizes:
        shell.show(f"files    {sizes}")
    if report.kinds:
        shell.show(f"kind     {kind(report.kinds, report.replaced_rows, len(report.labels))}")
    if purpose := task(report.kinds, report.labels, report.problem_type):
        shell.show(f"task     {purpose}")
    if report.invocation_tokens:
        shell.show(f"acts     from the tokens {shell.numbers(report.invocation_tokens)} on")
    if report.kinds:
        shell.show(f"bundle   {decimal(report.bundle_bytes)} as {report.dtype}, {len(report.rows)} rows")
    if report.rows:
        shell.show()
        _show_rows(report.rows)
    for finding in report.findings:
        shell.show()
        _show_finding(finding)
    shell.show()
    errors = sum(not finding.code.startswith("W_") for finding in report.findings)
    warnings = len(report.findings) - errors
    summary = f"{_count(errors, 'error')}, {_count(warnings, 'warning')}"
    if report.accepted:
        shell.show(f"accepted: {summary}", "bold green")
    else:
        shell.show(f"refused: {summary}", "bold red")


def _show_rows(rows: Sequence[RowReport]) -> None:
    """Print a line per module and (rank, scale): the layers that share them, and norms over all of these."""
    kinds: dict[tuple[int, str, int, float, int | None], list[RowReport]] = {}
    for row in rows:
        key = (row.module_id, row.module, row.rank, row.scale, row.truncated_from)
        kinds.setdefault(key, []).append(row)
    headers = ("module", "layers", "rank", "scale", "|A|", "|B|", "|BA| least", "|BA| most")
    cells = [
        (
            module,
            layers([row.layer for row in same if row.layer != NO_LAYER]) or "none",
            f"{cut} -> {rank}" if cut else str(rank),
            f"{scale:.6g}",
            f"{_mean([row.norm_a for row in same]):.4g}",
            f"{_mean([row.norm_b for row in same]):.4g}",
            f"{min(row.norm_ba for row in same):.4g}",
            f"{max(row.norm_ba for row in same):.4g}",
        )
        for (_, module, rank, scale, cut), same in sorted(kinds.items(), key=lambda item: item[0][:4])
    ]
    shell.table(headers, cells, RIGHT)


def layers(numbers: Sequence[int]) -> str:
    """Return layers for a cell: ``0-3, 7``."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def _show_finding(finding: Finding) -> None:
    warning = finding.code.startswith("W_")
    shell.show(f"{finding.code}  {finding.where}".rstrip(), "yellow" if warning else "bold red")
    for name, value in (("expected", finding.expected), ("found", finding.found), ("fix", finding.fix)):
        if value:
            shell.show(f"  {name:<8} {value}")


def _name(repository: Repository) -> str:
    place = "/".join(part for part in (repository.label, repository.subfolder) if part)
    return f"{repository.source} {place}" + (f" @ {repository.revision}" if repository.revision else "")


def _count(number: int, word: str) -> str:
    return f"{number or 'no'} {word}{'s'[: number != 1]}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
