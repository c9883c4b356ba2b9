"""How a build looks: a bar per adapter on a terminal, a line per stage elsewhere, and a table at the end."""

from __future__ import annotations

from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from loramux.cli import shell
from loramux.cli.bars import Bars
from loramux.records import AdapterInfo, DeploymentInfo, Stage
from shared.faults import Finding

WORK = (Stage.FETCHING, Stage.VALIDATING, Stage.PROVING, Stage.CONVERTING, Stage.PUBLISHING)
STYLES = {Stage.WAITING: "dim", Stage.DONE: "green", Stage.REFUSED: "bold red"}
RIGHT = frozenset({"tensors", "bytes"})


class BuildView(Bars):
    """Shows the states of one build, in the order in which they arrive."""

    def __init__(self) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            TextColumn("{task.fields[stage]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[bytes]}", justify="right"),
            expand=True,
        )
        self._stages: dict[str, Stage] = {}
        self._tasks: dict[str, TaskID] = {}

    def update(self, info: DeploymentInfo) -> None:
        """Show a state."""
        for adapter in info.adapters:
            if self._bars:
                self._bar(self._bars, adapter)
            elif self._stages.get(adapter.name, Stage.WAITING) is not adapter.stage:
                shell.say(f"{adapter.name}: {_stage(adapter)}")
            self._stages[adapter.name] = adapter.stage
        if self._bars:
            self._fit(self._bars, info.adapters)

    def _bar(self, bars: Progress, adapter: AdapterInfo) -> None:
        task = self._tasks.get(adapter.name)
        if task is None:
            name = escape(shell.printable(adapter.name))
            task = bars.add_task(name, total=len(WORK), stage="", bytes="")
            self._tasks[adapter.name] = task
        style = STYLES.get(adapter.stage, "cyan")
        bars.update(
            task,
            completed=fraction_done(adapter) * len(WORK),
            stage=f"[{style}]{_stage(adapter)}[/]",
            bytes=_bytes(adapter),
        )

    def _fit(self, bars: Progress, adapters: tuple[AdapterInfo, ...]) -> None:
        """Keep to the screen's height: of more adapters than lines, show those that are worked on."""
        room = max(shell.err.height - 2, 1)
        at_work = [each.name for each in adapters if each.stage in (*WORK, Stage.REFUSED)]
        shown = {each.name for each in adapters} if len(adapters) <= room else set(at_work[:room])
        for name, task in self._tasks.items():
            bars.update(task, visible=name in shown)


def fraction_done(adapter: AdapterInfo) -> float:
    """Return how much of an adapter's work is done, each stage counting alike; never falls."""
    if adapter.stage is Stage.DONE:
        return 1.0
    if adapter.stage not in WORK:
        return 0.0
    within = min(adapter.bytes_done / adapter.bytes_total, 1.0) if adapter.bytes_total else 0.0
    return (WORK.index(adapter.stage) + within) / len(WORK)


def _stage(adapter: AdapterInfo) -> str:
    if adapter.stage is not Stage.DONE:
        return adapter.stage.value
    if adapter.repaired:
        return "done, was damaged in the store"
    return "done, was in the store" if adapter.reused else adapter.stage.value


def _bytes(adapter: AdapterInfo) -> str:
    if adapter.stage is Stage.DONE:
        return decimal(adapter.bundle_bytes)
    if adapter.bytes_total:
        return f"{decimal(adapter.bytes_done)} of {decimal(adapter.bytes_total)}"
    return decimal(adapter.bytes_done) if adapter.bytes_done else ""


def show_built(info: DeploymentInfo) -> None:
    """Print the table of a deployment that was built, then its warnings."""
    headers = ("adapter", "rank", "modules", "tensors", "bytes", "digest", "warnings")
    rows = [
        (
            adapter.name,
            shell.numbers(adapter.ranks),
            shell.modules(adapter.modules),
            str(adapter.tensors_used),
            decimal(adapter.bundle_bytes),
            shell.digest(adapter.digest),
            ", ".join(dict.fromkeys(warning.code for warning in adapter.warnings)) or "-",
        )
        for adapter in info.adapters
    ]
    if rows:
        shell.table(headers, rows, RIGHT)
    for adapter in info.adapters:
        for warning in adapter.warnings:
            shell.say(f"warning: {_of(adapter, warning)}", "yellow")
    unchanged = ", unchanged" if info.unchanged else ""
    shell.show(f"deployment {info.name}: generation {info.generation} is published{unchanged}")


def _of(adapter: AdapterInfo, warning: Finding) -> Finding:
    return warning if warning.adapter else warning.model_copy(update={"adapter": adapter.name})
