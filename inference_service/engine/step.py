"""The interface of runners for the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from inference_service.core.sequence import Batch, Sequence, Token, Vector
from inference_service.engine.lookup import verified


@dataclass(frozen=True)
class Pending:
    """A step that was submitted; the device may still be at work on it."""

    seqs: tuple[Sequence, ...]
    """Those for which it draws a token; one that has a draft once more for each of its tokens."""
    wait: Callable[[], list[Token]]
    """Waits for the tokens, one per sequence."""
    finish: Callable[[], object] = lambda: None
    """Draws what could not be drawn before the tokens of the step before were known here.

    Called once these are, before the next step is submitted; a second call does nothing.
    """

    drafts: Mapping[Sequence, list[int]] = field(default_factory=dict)
    """Drafts to verify."""
    vectors: Callable[[], list[tuple[Sequence, Vector]]] = list
    """Waits for those of the sequences whose hidden states are all there."""

    def tokens(self) -> list[tuple[Sequence, Token]]:
        """Wait for the step; return the new tokens of every sequence for which it draws some."""
        self.finish()
        drawn = zip(self.seqs, self.wait(), strict=True)
        return list(verified(drawn, self.drafts) if self.drafts else drawn)


class StepRunner(Protocol):
    """Executes batches, one after the other, in the order in which they are submitted."""

    @property
    def depth(self) -> int:
        """Steps that may be under way when the next one is submitted: 0, or 1 to keep a device busy."""
        ...

    def submit(self, batch: Batch) -> Pending:
        """Begin a step; a token that is in flight comes from the step before."""
        ...
