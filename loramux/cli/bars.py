"""Bars on a terminal, and nothing elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import Progress, ProgressColumn

from loramux.cli import shell


class Bars:
    """Shows bars while it is entered, where the console, standard error, is a terminal."""

    def __init__(self, *columns: ProgressColumn, console: Console = shell.err, **options: Any) -> None:
        """Take what rich's ``Progress`` takes."""
        self._console = console
        self._bars = Progress(*columns, console=console, **options) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()
