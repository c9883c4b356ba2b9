"""A batch as rows: what a forward pass is given, still on the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import NamedTuple

from inference_service.core.sequence import Batch, Chunk, Sequence
from inference_service.kernels.attention import Context
from inference_service.lora.segments import Arrangement, Segment, arrange
from loramux_shared.runtime import Pooling

KNOWN = -1
"""The source of a row whose token is known on the host."""


class PooledRows(NamedTuple):
    """Rows of a sequence whose hidden states go into its vector."""

    seq: Sequence
    rows: range
    ends: bool
    """True if they are the last of them."""


@dataclass(frozen=True)
class Rows:
    """The rows of a step, base first, then adapter by adapter."""

    arrangement: Arrangement
    tokens: list[int]
    """[T]; 0 where the token is in flight."""
    sources: list[int]
    """[T]: which of the tokens that the step before drew the row takes, or `KNOWN`."""
    positions: list[int]
    """[T]"""
    contexts: list[Context]
    """One per chunk."""
    sampled: list[Sequence]
    """Those for which a token is drawn; one that has a draft once more for each of its tokens."""
    ahead: list[int]
    """Number of tokens of its draft before each draw."""
    last_rows: list[int]
    """The row that each of them is drawn from."""
    drafts: Mapping[Sequence, list[int]]
    """Drafts to verify."""
    scored: dict[Sequence, range]
    """Those whose prompt is scored, with the rows behind which stands a token of it that has no score yet."""
    pooled: list[PooledRows]
    """Rows that become vectors: no token is drawn for them."""

    @property
    def in_full(self) -> bool:
        """True when hidden states of more than last rows are wanted."""
        return bool(self.scored) or any(each.seq.pooling is not Pooling.LAST for each in self.pooled)

    @property
    def ends(self) -> list[int]:
        """The rows that tokens are drawn from, then the last one of each that becomes a vector."""
        return self.last_rows + [each.rows[-1] for each in self.pooled] if self.pooled else self.last_rows

    def drawing(self) -> list[Segment]:
        """The segments of those among ``sampled`` that have an adapter, and one alone."""
        runs = [(slot, len(list(same))) for slot, same in groupby(seq.slot for seq in self.sampled)]
        ends = accumulate(length for _, length in runs)
        return [
            Segment(slot, end - length, end)
            for (slot, length), end in zip(runs, ends, strict=True)
            if isinstance(slot, int) and slot >= 0
        ]

    @property
    def in_flight(self) -> bool:
        """True when a row takes a token from the step before."""
        return any(source != KNOWN for source in self.sources)


def lay_out(batch: Batch, drawn: Mapping[Sequence, int]) -> Rows:
    """Lay a batch out; drawn gives each sequence's place among those that the step before drew a token for."""
    rows = Rows(arrange(batch), [], [], [], [], [], [], [], batch.drafts, {}, [])
    for chunk in rows.arrangement.chunks:
        seq, row, start, length = chunk.seq, len(rows.tokens), chunk.start, chunk.length
        end = start + length
        progress = seq.progress
        tokens = progress.tokens
        rows.contexts.append(Context(row, length, progress.blocks, end, progress.tables, progress.state_slot))
        rows.positions.extend(range(start, end))
        if start == len(tokens):
            rows.tokens.append(0)
            rows.sources.append(drawn[seq])
        else:
            rows.tokens.extend(tokens[start:end])
            if chunk.drafted:
                rows.tokens.extend(batch.drafts[seq])
            rows.sources.extend([KNOWN] * length)
        if seq.pooling is not None:
            rows.pooled.extend(_pooled(chunk, row, seq.pooling))
        elif chunk.samples:
            for ahead in range(chunk.drafted + 1):
                rows.sampled.append(seq)
                rows.ahead.append(ahead)
                rows.last_rows.append(row + length - 1 - chunk.drafted + ahead)
        if seq.scores_prompt:
            rows.scored[seq] = _scored(chunk, row)
    return rows


def _pooled(chunk: Chunk, row: int, pooling: Pooling) -> list[PooledRows]:
    """Return the rows of a chunk, which begins at row, that go into a vector and have not yet."""
    seq, end = chunk.seq, row + chunk.length
    first = end - 1
    if pooling is Pooling.MEAN:
        first = row + max(0, seq.progress.num_pooled - chunk.start)
    elif not chunk.samples:
        return []
    return [PooledRows(seq, range(first, end), chunk.samples)] if first < end else []


def _scored(chunk: Chunk, row: int) -> range:
    """Return the rows of a chunk, which begins at row, that score tokens of the prompt."""
    seq = chunk.seq
    start = max(chunk.start, seq.progress.num_scored - 1)
    stop = min(chunk.end, seq.num_prompt - 1)
    return range(row + start - chunk.start, row + stop - chunk.start)
