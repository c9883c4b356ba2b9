"""How the rows of a step are arranged: base first, then the adapters, each adapter's rows side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from inference_service.core.batch import Batch, Chunk
from inference_service.kernels.experts import ByExpert

# Rows of one adapter from which on two matrix products of its own cost less than a share of the packed one.
LONG_SEGMENT = 16


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of one adapter."""

    slot: int
    start: int
    end: int

    @property
    def length(self) -> int:
        """Rows."""
        return self.end - self.start


@dataclass(frozen=True)
class Arrangement:
    """The chunks of a step in the order of their rows, and the segments of the rows that have an adapter.

    Rows before the first segment are the base's. Short segments come before long ones.
    """

    chunks: tuple[Chunk, ...]
    segments: tuple[Segment, ...]

    @property
    def short(self) -> tuple[Segment, ...]:
        """Segments that are computed together."""
        return tuple(segment for segment in self.segments if segment.length < LONG_SEGMENT)

    @property
    def long(self) -> tuple[Segment, ...]:
        """Segments that are computed each on its own."""
        return tuple(segment for segment in self.segments if segment.length >= LONG_SEGMENT)


def arrange(batch: Batch) -> Arrangement:
    """Order the chunks of a batch by adapter."""
    groups: dict[int, list[Chunk]] = {-1: []}
    for chunk in batch.chunks:
        groups.setdefault(chunk.seq.slot, []).append(chunk)
    chunks = groups.pop(-1)
    start = sum([chunk.length for chunk in chunks])
    rows = {slot: sum([chunk.length for chunk in group]) for slot, group in groups.items()}
    segments = []
    for slot in sorted(rows, key=lambda slot: (rows[slot] >= LONG_SEGMENT, slot)):
        segments.append(Segment(slot, start, start + rows[slot]))
        start += rows[slot]
        chunks += groups[slot]
    return Arrangement(tuple(chunks), tuple(segments))


def runs_by_expert(segments: Sequence[Segment], pairs: ByExpert) -> npt.NDArray[np.int64]:
    """Return runs of places [n, 4] that have one expert and one adapter: slot, expert, first place, places."""
    tokens, experts = pairs.tokens.numpy(), pairs.experts.numpy()
    slots = np.full(max(segments[-1].end, int(tokens.max()) + 1), -1)
    for segment in segments:
        slots[segment.start : segment.end] = segment.slot
    owners = slots[tokens]
    new = np.ones(len(owners), dtype=bool)
    new[1:] = (np.diff(owners) != 0) | (np.diff(experts) != 0)
    firsts = np.flatnonzero(new)
    lengths = np.diff(firsts, append=len(owners))
    runs = np.stack([owners[firsts], experts[firsts], firsts, lengths], axis=1)
    return runs[runs[:, 0] >= 0]
