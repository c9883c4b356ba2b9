"""What becomes of requests while an operator lets the engine stand still."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from inference_service.core.sequence import Sequence


class PauseMode(StrEnum):
    """What happens to requests that are under way; new ones wait in each case until the engine goes on."""

    KEEP = "keep"
    """They stand still between two steps, and go on where they were."""
    ABORT = "abort"
    """They end with REPLICA_PAUSED."""
    WAIT = "wait"
    """They run to their end first."""


ENDED: Final = (
    "an operator paused the replica and ended what was under way. Retry, here or with another replica."
)
LOOK_S: Final = 0.02
"""Between two looks at whether those that were under way have ended."""


class Held:
    """First sequences of requests that came while those before them run to their ends."""

    def __init__(self) -> None:
        self.seqs: list[Sequence] = []

    def late(self, now_s: float) -> list[Sequence]:
        """Take out those whose deadline has passed."""
        late = [seq for seq in self.seqs if seq.deadline_s is not None and seq.deadline_s <= now_s]
        self.seqs = [seq for seq in self.seqs if seq not in late]
        return late
