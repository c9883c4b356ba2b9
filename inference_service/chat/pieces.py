"""The pieces of a chat answer."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(slots=True)
class TextPiece:
    """Text for the user."""

    text: str


@dataclass(slots=True)
class Thought:
    """Reasoning, apart from the text for the user."""

    text: str


@dataclass(slots=True)
class CallBegun:
    """A call of a tool begins."""

    index: int
    """0 for the first call of the answer."""
    id: str
    name: str


@dataclass(slots=True)
class CallArguments:
    """More of the arguments of a call, as JSON text."""

    index: int
    text: str


Piece = TextPiece | Thought | CallBegun | CallArguments


class AnswerReader(Protocol):
    """Reads the text of one answer as it comes."""

    def push(self, text: str) -> list[Piece]:
        """Return what became certain with more text."""
        ...

    def finish(self) -> list[Piece]:
        """Return what is left when the answer has ended."""
        ...


class Plain:
    """An answer without tools: all of it is said."""

    def push(self, text: str) -> list[Piece]:
        """Return the text."""
        return [TextPiece(text)] if text else []

    def finish(self) -> list[Piece]:
        """Return nothing."""
        return []


def call_id() -> str:
    """Return an id for a new call."""
    return f"call_{secrets.token_hex(12)}"


class AnswerCalls:
    """The calls of one answer so far: numbered, with ids, and only of tools that were offered."""

    def __init__(self, offered: Mapping[str, Mapping[str, Any]], new_id: Callable[[], str] = call_id) -> None:
        """Count the calls of these tools, by name with the JSON schemas of their arguments."""
        self.offered = offered
        self._new_id = new_id
        self._count = 0

    def begin(self, name: str) -> CallBegun:
        """Begin a call."""
        self._count += 1
        return CallBegun(self._count - 1, self._new_id(), name)

    def more(self, text: str) -> CallArguments:
        """Return more of the arguments of the last call."""
        return CallArguments(self._count - 1, text)
