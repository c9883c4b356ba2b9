"""The tracing interface for servers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

Value = str | int


class CallSpan(Protocol):
    """The span of one call."""

    def note(self, name: str, value: Value) -> None:
        """Set an attribute."""
        ...

    def fail(self, reason: str) -> None:
        """Say that the call failed, and by which reason."""
        ...


class DoorSpans(Protocol):
    """A factory of the spans of a server's calls."""

    def call(
        self, name: str, headers: Mapping[str, str], attributes: Mapping[str, Value]
    ) -> AbstractContextManager[CallSpan]:
        """Open the span of a call, below the one that its headers name (``traceparent``).

        Inside the block it is the current one, and ends with it.
        """
        ...
