"""The view of a build: bars on a terminal, else lines or JSON; at the end a table, sums of many adapters."""

import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Self

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from loramux.cli import shell
from loramux.cli.documents import emit_line
from loramux.cli.tables import kind
from loramux.records import AdapterInfo, DeploymentInfo, DeploymentState, Stage
from loramux_shared.faults import Finding
from loramux_shared.wording import listed

WORK = (Stage.FETCHING, Stage.VALIDATING, Stage.PROVING, Stage.CONVERTING, Stage.PUBLISHING)
ENDED = (Stage.DONE, Stage.REFUSED)
STYLES = {Stage.WAITING: "dim", Stage.DONE: "green", Stage.REFUSED: "bold red"}
RIGHT = frozenset({"tensors", "bytes"})
FEW = 8
"""The largest number of adapters that have a line each, where there is no terminal; more are counted."""
COUNTS_S = 2.0
ROWS = 20
NAMES = 5


class BuildView:
    """Shows the states of one build, in the order in which they arrive.

    Bars are for a terminal, from the first adapter that is under way to the end of the block, and stay. A build
    that is over when it is first seen is reported in lines there too.
    """

    def __init__(self, counts_s: float = COUNTS_S, console: Console = shell.err) -> None:
        """Print the counts of many adapters every counts_s seconds, where there is no terminal."""
        columns = (
            TextColumn("{task.description}"),
            TextColumn("{task.fields[stage]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[bytes]}", justify="right"),
        )
        self._console = console
        self._bars = Progress(*columns, console=console, expand=True) if console.is_terminal else None
        self._counts_s = counts_s
        self._printed_at = -counts_s
        self._last_counts = ""
        self._printed: set[str] = set()
        self._rows: list[TaskID] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars and self._rows:
            self._bars.stop()

    def update(self, info: DeploymentInfo) -> None:
        """Show a state."""
        ended = info.state is not DeploymentState.BUILDING
        if self._bars and (self._rows or (info.adapters and not ended)):
            self._draw(self._bars, info.adapters)
        elif len(info.adapters) <= FEW:
            self._tell_each(info.adapters)
        else:
            self._tell_counts(info)

    def _draw(self, bars: Progress, adapters: Sequence[AdapterInfo]) -> None:
        """Keep to the screen's height: of more adapters than lines, a sum and those that are worked on."""
        bars.start()
        room = max(self._console.height - 2, 2)
        if len(adapters) <= room:
            lines = [*map(_line, adapters)]
        else:
            at_work = (each for each in adapters if each.stage in (*WORK, Stage.REFUSED))
            lines = [_sum(adapters), *map(_line, islice(at_work, room - 1))]
        # Rows are reused for other adapters, as adding a row draws all rows again.
        while len(self._rows) < len(lines):
            self._rows.append(bars.add_task("", total=1.0, stage="", bytes=""))
        for row, (name, stage, done, size) in zip(self._rows, lines, strict=False):
            bars.update(row, description=name, stage=stage, completed=done, bytes=size, visible=True)
        for row in self._rows[len(lines) :]:
            bars.update(row, visible=False)

    def _tell_each(self, adapters: Sequence[AdapterInfo]) -> None:
        for adapter in adapters:
            if adapter.stage in ENDED and adapter.name not in self._printed:
                shell.say(f"{adapter.name}: {_stage(adapter)}")
                self._printed.add(adapter.name)

    def _tell_counts(self, info: DeploymentInfo) -> None:
        now = time.monotonic()
        ended = info.state is not DeploymentState.BUILDING
        if ended or now >= self._printed_at + self._counts_s:
            self._printed_at = now
            counts = f"{len(info.adapters)} adapters: {_counts(info.adapters)}"
            if counts != self._last_counts:
                shell.say(counts)
            self._last_counts = counts


def fraction_done(adapter: AdapterInfo) -> float:
    """Return how much of an adapter's work is done, each stage counting alike; never falls."""
    if adapter.stage is Stage.DONE:
        return 1.0
    if adapter.stage not in WORK:
        return 0.0
    within = min(adapter.bytes_done / adapter.bytes_total, 1.0) if adapter.bytes_total else 0.0
    return (WORK.index(adapter.stage) + within) / len(WORK)


def _line(adapter: AdapterInfo) -> tuple[str, str, float, str]:
    """Return the name, the stage, the part that is done and the bytes of an adapter's bar."""
    style = STYLES.get(adapter.stage, "cyan")
    stage = f"[{style}]{_stage(adapter)}[/]"
    return escape(shell.printable(adapter.name)), stage, fraction_done(adapter), _bytes(adapter)


def _sum(adapters: Sequence[AdapterInfo]) -> tuple[str, str, float, str]:
    done = sum(map(fraction_done, adapters)) / len(adapters)
    size = decimal(sum(adapter.bundle_bytes for adapter in adapters))
    return f"{len(adapters)} adapters", _counts(adapters), done, size


def _counts(adapters: Iterable[AdapterInfo]) -> str:
    """Return how many adapters are in each stage: ``12 waiting, 4 fetching``."""
    counts = Counter(adapter.stage for adapter in adapters)
    order = (Stage.WAITING, *WORK, Stage.REFUSED, Stage.DONE)
    return ", ".join(f"{counts[stage]} {stage.value}" for stage in order if counts[stage])


def _stage(adapter: AdapterInfo) -> str:
    if adapter.stage is not Stage.DONE:
        return adapter.stage.value
    if adapter.repaired:
        return "done, repaired in the store"
    if adapter.kept:
        return "done, unchanged"
    return "done, already in the store" if adapter.reused else adapter.stage.value


def _bytes(adapter: AdapterInfo) -> str:
    if adapter.stage is Stage.DONE:
        return decimal(adapter.bundle_bytes)
    if adapter.bytes_total:
        return f"{decimal(adapter.bytes_done)} of {decimal(adapter.bytes_total)}"
    return decimal(adapter.bytes_done) if adapter.bytes_done else ""


def show_built(info: DeploymentInfo) -> None:
    """Print the table of a deployment that was built, as far as it fits a screen, then its warnings by code."""
    headers = ("adapter", "kind", "rank", "modules", "tensors", "bytes", "digest", "warnings")
    rows = [
        (
            adapter.name,
            kind(adapter.kinds) or "-",
            shell.numbers(adapter.ranks),
            shell.modules(adapter.modules),
            str(adapter.tensors_used),
            decimal(adapter.bundle_bytes),
            shell.digest(adapter.digest),
            ", ".join(dict.fromkeys(warning.code for warning in adapter.warnings)) or "-",
        )
        for adapter in info.adapters[:ROWS]
    ]
    if rows:
        shell.table(headers, rows, RIGHT)
    if len(info.adapters) > ROWS:
        total = decimal(sum(adapter.bundle_bytes for adapter in info.adapters))
        shell.show(f"... and {len(info.adapters) - ROWS} more, {total} in all (all of them: --json)")
    show_warnings(info.adapters)
    if beside := [adapter.name for adapter in info.adapters if adapter.added]:
        shell.say(
            f"also served, since added or pushed: {listed(beside, ROWS)} (a build with --exact removes them)"
        )
    unchanged = ", unchanged" if info.unchanged else ""
    shell.show(f"deployment {info.name}: generation {info.generation} is published{unchanged}")


def show_warnings(adapters: Sequence[AdapterInfo]) -> None:
    """Print each code of warning as the first adapter has it, and which others do."""
    found: dict[str, dict[str, list[Finding]]] = {}
    for adapter in adapters:
        for warning in adapter.warnings:
            found.setdefault(warning.code, {}).setdefault(adapter.name, []).append(warning)
    if rounded := _rounded(found.pop("W_NARROWED", {})):
        shell.say(rounded, "dim")
    for by_adapter in found.values():
        # Reused adapters have warnings with a code only.
        first, *others = sorted(by_adapter, key=lambda name: not any(each.where for each in by_adapter[name]))
        for warning in by_adapter[first]:
            shell.say(f"warning: {warning.model_copy(update={'adapter': warning.adapter or first})}", "yellow")
        if others:
            shell.say(f"  and so {listed(others, NAMES)}", "yellow")


NARROWED = re.compile(r"stored as (\w+), largest relative error (\S+)")


def _rounded(by_adapter: Mapping[str, Sequence[Finding]]) -> str:
    """Return the line for adapters whose values are rounded, which most are; empty where there are none."""
    found = [
        match for each in by_adapter.values() for warning in each if (match := NARROWED.search(warning.found))
    ]
    if not by_adapter:
        return ""
    to = ", ".join(dict.fromkeys(match[1] for match in found))
    error = max((float(match[2]) for match in found), default=0.0)
    how = f" to {to}, by at most {error:.1e} of a value" if found else ""
    return f"rounded{how} (W_NARROWED): {listed([*by_adapter], NAMES)}"


class BuildLines:
    """Prints the states of one build: the first and the last whole, between them the adapters that changed."""

    def __init__(self) -> None:
        self._adapters: dict[str, AdapterInfo] = {}
        self._last: DeploymentInfo | None = None

    def tell(self, info: DeploymentInfo) -> None:
        """Print the changes in a state."""
        changed = tuple(each for each in info.adapters if each != self._adapters.get(each.name))
        rest = replace(info, adapters=())
        if rest == self._last and not changed:
            return
        self._last = rest
        self._adapters |= {adapter.name: adapter for adapter in changed}
        ended = info.state is not DeploymentState.BUILDING
        stages = Counter(adapter.stage.value for adapter in info.adapters)
        emit_line({"deployment": info if ended else replace(info, adapters=changed), "stages": stages})
