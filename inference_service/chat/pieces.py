"""What an answer of a chat consists of."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Said:
    """Text for the user."""

    text: str


@dataclass(frozen=True)
class Thought:
    """Reasoning, which is told apart from what is said."""

    text: str


@dataclass(frozen=True)
class CallBegun:
    """A call of a tool begins."""

    index: int
    """0 for the first call of the answer."""
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of the arguments of a call, as JSON text."""

    index: int
    text: str


Piece = Said | Thought | CallBegun | CallArguments


class Reading(Protocol):
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
        return [Said(text)] if text else []

    def finish(self) -> list[Piece]:
        """Return nothing."""
        return []


def call_id() -> str:
    """Return an id for a new call."""
    return f"call_{secrets.token_hex(12)}"
