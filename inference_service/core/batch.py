"""What one step computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from inference_service.core.sequence import Sequence


class Chunk(NamedTuple):
    """Consecutive tokens of one sequence, from ``num_computed`` on."""

    seq: Sequence
    length: int

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
        """True when the chunk reaches the sequence's end, so that a token is drawn from its last row."""
        return self.length == self.seq.num_pending


@dataclass(frozen=True)
class Batch:
    """The chunks of one step."""

    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        """Rows of the forward pass."""
        return sum(chunk.length for chunk in self.chunks)
