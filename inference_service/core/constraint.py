"""Constraints of an answer's text, and the port to the grammars that enforce them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

Kind = Literal["json_object", "json_schema", "regex", "lark", "gbnf"]


@dataclass(frozen=True)
class Constraint:
    """A language that the answer belongs to."""

    kind: Kind
    text: str = ""
    """The schema, expression or grammar; empty for ``json_object``. A ``gbnf`` may as well be in Lark."""
    where: str = field(default="response_format", compare=False)
    """The field that asks for it, by which it is refused."""
    around: str = ""
    """Grammar around such a text, or in its place: Lark, in which the text is ``@answer``."""
    composed: bool = field(default=False, compare=False)
    """True if its text is ours, made from the client's: no other API reads it."""
    optional: bool = field(default=False, compare=False)
    """True if an answer continues without it where it cannot be followed."""


@dataclass(frozen=True)
class ByEnding:
    """Constraints of the answers to a prompt by how that ends once it is rendered."""

    cases: tuple[tuple[str, Constraint | None], ...]
    """Ends without space behind them, each with its constraint; the first that fits counts, the last is any."""

    def behind(self, prompt: str) -> Constraint | None:
        """Return the constraint of the answers to a prompt."""
        end = prompt.rstrip()
        return next(constraint for case, constraint in self.cases if end.endswith(case))


class Grammar(Protocol):
    """Follows one answer through a constraint; used on the engine's thread."""

    @property
    def complete(self) -> bool:
        """True when the answer cannot continue: it is a whole text of the language and nothing may follow."""
        ...

    @property
    def failure(self) -> str:
        """Why the answer cannot be followed any further; empty while it can."""
        ...

    def mask(self, ahead: int = 0) -> bytes:
        """Return the tokens that may come next: bit i % 8 of byte i // 8, lowest first, is token i.

        With ahead, those that may come behind so many tokens of what was drafted last.
        """
        ...

    def forced(self) -> list[int]:
        """Return tokens that must come next, as far as that is known; none where there is a choice."""
        ...

    def draft(self, tokens: Sequence[int]) -> int:
        """Return how many of these may come with others behind them; `mask` knows them until `accept`."""
        ...

    def accept(self, token: int) -> None:
        """Take the token that was chosen."""
        ...


def packed(allowed: npt.NDArray[np.bool_]) -> bytes:
    """Return the mask, as `Grammar.mask` says it, that lets these tokens [vocab] pass."""
    return np.packbits(allowed, bitorder="little").tobytes()


def unpacked(mask: bytes, vocab: int) -> npt.NDArray[np.bool_]:
    """Return which tokens [vocab] a mask lets pass."""
    return np.unpackbits(np.frombuffer(mask, np.uint8), None, vocab, "little").view(np.bool_)


def common(mask: bytes, other: bytes) -> bytes:
    """Return the mask that lets pass what both let pass."""
    both = int.from_bytes(mask, "little") & int.from_bytes(other, "little")
    return both.to_bytes(len(mask), "little")
