"""How the rows of a step are arranged: base first, then the adapters, each adapter's rows side by side."""

from __future__ import annotations

from dataclasses import dataclass

from inference_service.core.batch import Batch, Chunk

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
    rows: dict[int, int] = {}
    for chunk in batch.chunks:
        rows[chunk.seq.slot] = rows.get(chunk.seq.slot, 0) + chunk.length
    base = rows.pop(-1, 0)
    order = sorted(rows, key=lambda slot: (rows[slot] >= LONG_SEGMENT, slot))
    rank = {-1: -1} | {slot: index for index, slot in enumerate(order)}
    segments, start = [], base
    for slot in order:
        segments.append(Segment(slot, start, start + rows[slot]))
        start += rows[slot]
    chunks = sorted(batch.chunks, key=lambda chunk: rank[chunk.seq.slot])
    return Arrangement(tuple(chunks), tuple(segments))
