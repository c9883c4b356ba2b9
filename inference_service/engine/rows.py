"""A batch as rows: what a forward pass is given, still on the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from inference_service.core.batch import Batch, Chunk
from inference_service.core.sequence import Sequence
from inference_service.kernels.attention import Context
from inference_service.lora.segments import Arrangement, arrange

Ints = npt.NDArray[np.int32]

KNOWN = -1
"""The source of a row whose token is known on the host."""


@dataclass(frozen=True)
class Rows:
    """The rows of a step, base first, then adapter by adapter."""

    arrangement: Arrangement
    tokens: Ints
    """[T]; 0 where the token is in flight."""
    sources: Ints
    """[T]: which of the tokens that the step before drew the row takes, or `KNOWN`."""
    positions: Ints
    """[T]"""
    contexts: list[Context]
    """One per chunk."""
    sampled: list[Sequence]
    """Those for which a token is drawn."""
    last_rows: Ints
    """The row that each of them is drawn from."""
    scored: dict[Sequence, range]
    """Those whose prompt is scored, with the rows behind which stands a token of it that has no score yet."""
    in_flight: bool
    """True when a row takes a token from the step before."""


def lay_out(batch: Batch, drawn: Mapping[Sequence, int]) -> Rows:
    """Lay a batch out; drawn gives each sequence's place among those that the step before drew a token for."""
    arrangement = arrange(batch)
    tokens: list[int] = []
    positions: list[int] = []
    contexts: list[Context] = []
    sampled: list[Sequence] = []
    last_rows: list[int] = []
    scored: dict[Sequence, range] = {}
    taken: dict[int, int] = {}
    for chunk in arrangement.chunks:
        seq, row, start, length = chunk.seq, len(tokens), chunk.start, chunk.length
        end = start + length
        contexts.append(Context(row, length, seq.blocks, end))
        positions += range(start, end)
        if start == len(seq.tokens):
            taken[row] = drawn[seq]
            tokens.append(0)
        else:
            tokens += seq.tokens[start:end]
        if end == seq.length:
            sampled.append(seq)
            last_rows.append(row + length - 1)
        if seq.scores_prompt:
            scored[seq] = _scored(chunk, row)
    sources = np.full(len(tokens), KNOWN, dtype=np.int32)
    if taken:
        sources[list(taken)] = list(taken.values())
    return Rows(
        arrangement,
        tokens=np.array(tokens, dtype=np.int32),
        sources=sources,
        positions=np.array(positions, dtype=np.int32),
        contexts=contexts,
        sampled=sampled,
        last_rows=np.array(last_rows, dtype=np.int32),
        scored=scored,
        in_flight=bool(taken),
    )


def _scored(chunk: Chunk, row: int) -> range:
    """Return the rows of a chunk, which begins at row, that score tokens of the prompt."""
    seq = chunk.seq
    start = max(chunk.start, len(seq.prompt_scores) - 1)
    stop = min(chunk.end, seq.num_prompt - 1)
    return range(row + start - chunk.start, row + stop - chunk.start)
