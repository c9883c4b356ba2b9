"""The arrangement of a step's rows: base first, then adapters and blends, each one's rows side by side."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from inference_service.core.adapter import ScaledSlots
from inference_service.core.sequence import Batch, Chunk
from inference_service.engine.kernels.experts import ByExpert

# Rows of one adapter from which on two matrix products of its own cost less than a share of the packed one.
LONG_SEGMENT = 16


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of one adapter, or a part of a mixture's rows."""

    slot: int
    start: int
    end: int
    scale: float = 1.0
    """Scale of the adapter's part."""

    @property
    def length(self) -> int:
        """Rows."""
        return self.end - self.start


@dataclass(frozen=True)
class Arrangement:
    """The chunks of a step in the order of their rows, and the segments of the rows that have an adapter.

    Rows before the first segment are the base's. Short segments come before long ones, then those of mixtures:
    one for each part, side by side, over the same rows.
    """

    chunks: tuple[Chunk, ...]
    plain: tuple[Segment, ...]
    """Segments of one unscaled adapter: no two have a row in common."""
    mixed: tuple[Segment, ...] = ()
    """Segments of blends: those of the same rows follow one another, in the order of their parts."""

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All of them."""
        return self.plain + self.mixed if self.mixed else self.plain

    @property
    def most_parts(self) -> int:
        """Adapters that a row has at most."""
        return max((len(group) for group in sharing(self.mixed)), default=1)

    @property
    def short(self) -> tuple[Segment, ...]:
        """Segments that are computed together."""
        return tuple(segment for segment in self.plain if segment.length < LONG_SEGMENT)

    @property
    def long(self) -> tuple[Segment, ...]:
        """Segments that are computed each on its own."""
        return tuple(segment for segment in self.plain if segment.length >= LONG_SEGMENT)


def arrange(batch: Batch) -> Arrangement:
    """Order the chunks of a batch by adapter, those of mixtures last."""
    groups: dict[int | ScaledSlots, list[Chunk]] = {-1: []}
    for chunk in batch.chunks:
        groups.setdefault(chunk.seq.slot, []).append(chunk)
    chunks = groups.pop(-1)
    start = sum([chunk.length for chunk in chunks])
    plain: list[tuple[bool, int, int]] = []
    mixtures: list[tuple[ScaledSlots, int]] = []
    for slot, group in groups.items():
        rows = sum([chunk.length for chunk in group])
        if isinstance(slot, int):
            plain.append((rows >= LONG_SEGMENT, slot, rows))
        else:
            mixtures.append((slot, rows))
    segments, mixed = [], []
    for _, slot, rows in sorted(plain):
        segments.append(Segment(slot, start, start + rows))
        start += rows
        chunks += groups[slot]
    for slots, rows in mixtures:
        mixed += [Segment(slot, start, start + rows, scale) for slot, scale in slots]
        start += rows
        chunks += groups[slots]
    return Arrangement(tuple(chunks), tuple(segments), tuple(mixed))


def sharing(segments: Sequence[Segment]) -> Iterator[Sequence[Segment]]:
    """Yield the segments of the same rows together: those of a mixture, or one."""
    return (tuple(group) for _, group in itertools.groupby(segments, key=lambda segment: segment.start))


class Entries(NamedTuple):
    """Pairs of a row and an adapter [n], as the kernels for GPUs take them."""

    rows: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int64]
    scales: npt.NDArray[np.float64]


def entries_of(segments: Sequence[Segment]) -> Entries:
    """Return every row of every segment; of a row with several, in the order of the segments."""
    lengths = [segment.length for segment in segments]
    firsts = np.array([segment.start for segment in segments])
    behind = np.cumsum(lengths)
    rows = np.arange(behind[-1]) + np.repeat(firsts - (behind - lengths), lengths)
    slots = np.repeat([segment.slot for segment in segments], lengths)
    return Entries(rows, slots, np.repeat([segment.scale for segment in segments], lengths))


def runs_by_expert(segments: Sequence[Segment], pairs: ByExpert) -> npt.NDArray[np.int64]:
    """Return runs of places [n, 4] that have one expert and one adapter: segment, expert, first place, places.

    Of places that have several adapters the runs follow one another, in the order of their segments.
    """
    tokens, experts = pairs.tokens.numpy(), pairs.experts.numpy()
    firsts = np.full(max(segments[-1].end, int(tokens.max()) + 1), -1)
    counts = np.ones(len(segments), dtype=np.int64)
    index = 0
    for group in sharing(segments):
        firsts[group[0].start : group[0].end] = index
        counts[index] = len(group)
        index += len(group)
    owners = firsts[tokens]
    new = np.ones(len(owners), dtype=bool)
    new[1:] = (np.diff(owners) != 0) | (np.diff(experts) != 0)
    begins = np.flatnonzero(new)
    lengths = np.diff(begins, append=len(owners))
    runs = np.stack([owners[begins], experts[begins], begins, lengths], axis=1)
    runs = runs[runs[:, 0] >= 0]
    parts = counts[runs[:, 0]]
    if len(runs) and parts.max() > 1:
        runs = np.repeat(runs, parts, axis=0)
        runs[:, 0] += np.arange(len(runs)) - np.repeat(np.cumsum(parts) - parts, parts)
    return runs
