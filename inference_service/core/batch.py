"""What one step computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from inference_service.core.sequence import Sequence


class Chunk(NamedTuple):
    """Consecutive tokens of one sequence, from ``num_computed`` on."""

    seq: Sequence
    length: int
    drafted: int = 0
    """Of its tokens, those at the end that are expected and not known; each is verified by a draw behind it."""

    @property
    def start(self) -> int:
        """Position of the first token."""
        return self.seq.num_computed

    @property
    def end(self) -> int:
        """Position behind the last token: the length of the context that the chunk attends to."""
        return self.seq.num_computed + self.length

    @property
    def samples(self) -> bool:
        """True when the chunk reaches the sequence's end, so that a token is drawn from the row there."""
        return self.length - self.drafted == self.seq.num_pending


@dataclass(frozen=True)
class Batch:
    """The chunks of one step."""

    chunks: tuple[Chunk, ...]
    drafts: Mapping[Sequence, list[int]] = field(default_factory=dict)
    """The tokens that are expected behind those that are known, of the chunks that have some."""
    copies: tuple[Mapping[int, int], ...] = ()
    """What is copied among the slots of states before the step: those that are written, with those that are
    read. All of a mapping are read before any is written, and mappings follow one another."""

    @property
    def num_tokens(self) -> int:
        """Rows of the forward pass."""
        return sum(chunk.length for chunk in self.chunks)
