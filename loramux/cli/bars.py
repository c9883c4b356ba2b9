"""Bars on a terminal, and nothing elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rich.progress import Progress, ProgressColumn

from loramux.cli import shell


class Bars:
    """Shows bars while it is entered, where standard error is a terminal."""

    def __init__(self, *columns: ProgressColumn, **options: Any) -> None:
        """Take what rich's ``Progress`` takes."""
        self._bars = Progress(*columns, console=shell.err, **options) if shell.err.is_terminal else None

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()
