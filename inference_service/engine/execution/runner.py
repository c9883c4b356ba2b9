"""A step: a batch laid out as rows, run through the model operation by operation, and pending."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence as Seq
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, chain, groupby
from typing import Final, NamedTuple, Protocol, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from inference_service.core.sequence import Batch, Chunk, Sequence, Token, Vector
from inference_service.engine.backends.base import StepLora
from inference_service.engine.execution.sampler import SCORED_ROWS, Score, sample, tokens_of
from inference_service.engine.kernels.attention import Context
from inference_service.engine.lora.segments import Arrangement, Segment, arrange
from inference_service.engine.models.blocks import Cache, CacheSize
from inference_service.engine.models.decoder import Decoder
from inference_service.engine.scheduling.lookup import verified
from loramux_shared.runtime import Pooling

KNOWN = -1
"""The source of a row whose token is known on the host."""


class PooledRows(NamedTuple):
    """Rows of a sequence whose hidden states go into its vector."""

    seq: Sequence
    rows: range
    ends: bool
    """True if they are the last of them."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a step, base first, then adapter by adapter."""

    arrangement: Arrangement
    drafts: Mapping[Sequence, list[int]]
    """Drafts to verify."""
    tokens: list[int] = field(default_factory=list)
    """[T]; 0 where the token is in flight."""
    sources: list[int] = field(default_factory=list)
    """[T]: which of the tokens that the step before drew the row takes, or `KNOWN`."""
    positions: list[int] = field(default_factory=list)
    """[T]"""
    contexts: list[Context] = field(default_factory=list)
    """One per chunk."""
    sampled: list[Sequence] = field(default_factory=list)
    """Those for which a token is drawn; one that has a draft once more for each of its tokens."""
    ahead: list[int] = field(default_factory=list)
    """Number of tokens of its draft before each draw."""
    last_rows: list[int] = field(default_factory=list)
    """The row that each of them is drawn from."""
    scored: dict[Sequence, range] = field(default_factory=dict)
    """Those whose prompt is scored, with the rows behind which stands a token of it that has no score yet."""
    pooled: list[PooledRows] = field(default_factory=list)
    """Rows that become vectors: no token is drawn for them."""

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

    @property
    def others(self) -> list[range]:
        """The rows whose hidden states are read beside `last_rows`: first of `scored`, then of `pooled`."""
        return [*self.scored.values(), *[each.rows for each in self.pooled]]


def lay_out(batch: Batch, drawn: Mapping[Sequence, int]) -> Rows:
    """Lay a batch out; drawn gives each sequence's place among those that the step before drew a token for."""
    rows = Rows(arrange(batch), batch.drafts)
    for chunk in rows.arrangement.chunks:
        seq, row, length, drafted = chunk.seq, len(rows.tokens), chunk.length, chunk.drafted
        progress = seq.progress
        tokens, start = progress.tokens, progress.num_computed
        end = start + length
        state = progress.state_slot
        rows.contexts.append(Context(row, length, progress.blocks, end, progress.tables, state, seq.second))
        rows.positions.extend(range(start, end))
        if start == len(tokens):
            rows.tokens.append(0)
            rows.sources.append(drawn[seq])
        else:
            rows.tokens.extend(tokens[start:end])
            if drafted:
                rows.tokens.extend(batch.drafts[seq])
            rows.sources.extend([KNOWN] * length)
        if seq.pooling is not None:
            rows.pooled.extend(_pooled(chunk, row, seq.pooling))
        elif end - drafted == progress.length:  # as Chunk.samples
            for ahead in range(drafted + 1):
                rows.sampled.append(seq)
                rows.ahead.append(ahead)
                rows.last_rows.append(row + length - 1 - drafted + ahead)
        if seq.scores_prompt:
            rows.scored[seq] = _scored(chunk, row)
    return rows


def _pooled(chunk: Chunk, row: int, pooling: Pooling) -> list[PooledRows]:
    """Return the rows of a chunk, which begins at row, that go into a vector and have not yet."""
    seq, end = chunk.seq, row + chunk.length
    first = end - 1
    if pooling in (Pooling.CLS, Pooling.ALL, Pooling.SPARSE):  # of encoders alone, whose chunks are whole
        return [PooledRows(seq, range(row, row + (1 if pooling is Pooling.CLS else chunk.length)), ends=True)]
    if pooling is Pooling.MEAN:
        first = row + seq.progress.num_pooled - chunk.start
    elif not chunk.samples:
        return []
    return [PooledRows(seq, range(first, end), chunk.samples)] if first < end else []


def _scored(chunk: Chunk, row: int) -> range:
    """Return the rows of a chunk, which begins at row, that score tokens of the prompt."""
    seq = chunk.seq
    start = max(chunk.start, seq.progress.num_scored - 1)
    stop = min(chunk.end, seq.num_prompt - 1)
    return range(row + start - chunk.start, row + stop - chunk.start)


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
    go_on: Callable[[], bool] = bool
    """Computes a part of what is left of it, between two of which another step may run; returns True while
    anything is left, False by default."""

    def tokens(self) -> Iterable[tuple[Sequence, Token]]:
        """Wait for the step; return the new tokens of every sequence for which it draws some."""
        while self.go_on():
            pass
        self.finish()
        drawn = zip(self.seqs, self.wait(), strict=True)
        return verified(drawn, self.drafts) if self.drafts else drawn


class StepRunner(Protocol):
    """Executes batches, one after the other, in the order in which they are submitted."""

    @property
    def depth(self) -> int:
        """Steps that may be under way when the next one is submitted: 0, or 1 to keep a device busy."""
        ...

    def submit(self, batch: Batch) -> Pending:
        """Begin a step; a token that is in flight comes from the step before."""
        ...


def to_device(values: Seq[int], device: torch.device) -> Tensor:
    """Return numbers as int64 on the device, by pinned memory, which is kept until they are there."""
    host = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """Return a copy in the host's memory; it is complete when the device has done what it was given so far."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)


def score_prompt(
    seq: Sequence, hidden: Tensor, head: Callable[[Tensor], Tensor], score: Score
) -> Callable[[], None]:
    """Begin to score the next N tokens of a prompt, each by the row before it; hidden is [N, hidden size].

    The result waits for the scores and gives them to the sequence.
    """
    progress, count = seq.progress, seq.sampling.prompt_logprobs or 0
    copies: list[list[Tensor]] = []
    for start in range(0, len(hidden), SCORED_ROWS):
        rows, first = hidden[start : start + SCORED_ROWS], progress.num_scored
        progress.num_scored += len(rows)
        ids = to_device(progress.tokens[first : progress.num_scored], hidden.device)
        copies.append([to_host(part) for part in score(head(rows), ids, count)])
    if not copies:
        return lambda: None
    done = mark(copies[-1][0], hidden.device)

    def keep() -> None:
        done()
        for parts in copies:
            progress.prompt_scores += tokens_of(parts)

    return keep


def mark(copy: Tensor, device: torch.device) -> Callable[[], Tensor]:
    """Return what waits until the device has done what it was given up to now, and returns the copy."""
    if device.type != "cuda":
        return lambda: copy
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    event.record()

    def wait() -> Tensor:
        event.synchronize()
        return copy

    return wait


Vectors: TypeAlias = list[tuple[Sequence, Vector]]
_sums: Final[WeakKeyDictionary[Sequence, Tensor]] = WeakKeyDictionary()
"""Sums of hidden states [hidden size], of the sequences whose mean is asked for; on the device."""


def pool(
    chunks: Iterable[PooledRows], hidden: Seq[Tensor], sparse: Callable[[Tensor], Tensor] | None = None
) -> Callable[[], Vectors]:
    """Take in the hidden states [n, hidden size] of each chunk; the result waits for the vectors that end.

    Sums are float64, so that neither the chunks of a prompt nor a preemption show in a mean.
    """
    seqs: list[Sequence] = []
    vectors: list[Tensor] = []
    for (seq, rows, ends), states in zip(chunks, hidden, strict=True):
        if seq.pooling is Pooling.MEAN:
            total, before = states.sum(0, dtype=torch.float64), _sums.get(seq)
            _sums[seq] = total = total if before is None else before + total
            seq.progress.num_pooled += len(rows)
            states = (total / seq.progress.num_pooled)[None]
        elif seq.pooling is Pooling.SPARSE and sparse is not None:
            states = sparse(states)[None]
        if ends:
            seqs.append(seq)
            vectors.append((states if seq.pooling is Pooling.ALL else states[-1]).float().flatten())
    if not seqs:
        return list
    copied, lengths = to_host(torch.cat(vectors)), [*map(len, vectors)]
    done = mark(copied, vectors[0].device)
    return lambda: [(seq, part.numpy()) for seq, part in zip(seqs, torch.split(done(), lengths), strict=True)]


Blocks: TypeAlias = int | Seq[int]
"""Blocks of each group of layers that see equally far, or one number for all of them."""


def new_cache(model: Decoder, blocks: Blocks, block_size: int, slots: int) -> Cache:
    """Return a cache of blocks, and of slots of states."""
    each = [blocks] * len(model.config.windows) if isinstance(blocks, int) else blocks
    return model.new_cache(CacheSize(tuple([number * block_size for number in each]), slots))


class Runner:
    """Runs batches through a model and its cache, operation by operation."""

    def __init__(
        self,
        model: Decoder,
        lora: StepLora,
        blocks: Blocks,
        block_size: int,
        slots: int = 0,
        *,
        depth: int | None = None,
    ) -> None:
        """Make a cache of blocks and of slots of states; depth is None for what the device needs."""
        self.depth = int(model.device.type == "cuda") if depth is None else depth
        self._model = model
        self._lora = lora
        self._block_size = block_size
        self.cache = new_cache(model, blocks, block_size, slots)
        self._drawn: dict[Sequence, int] = {}
        self._ids = torch.empty(0, dtype=torch.int64, device=model.device)

    def capture(self) -> None:
        """Record steps, where they can be recorded: here they cannot."""

    def record_one(self) -> None:
        """Record one more of the largest decode steps, where steps can be recorded, to see what that takes."""

    def run(self, batch: Batch) -> list[tuple[Sequence, Token]]:
        """Compute a batch; return the new token of every sequence whose last row was in it."""
        return list(self.submit(batch).tokens())

    @torch.inference_mode()
    def submit(self, batch: Batch) -> Pending:
        """Begin a step."""
        for copies in batch.copies:
            slots = to_device([*copies.values(), *copies], self._model.device)
            self.cache.copy_states(slots[: len(copies)], slots[len(copies) :])
        rows = lay_out(batch, self._drawn)
        pending = self._step(rows)
        self._drawn = {seq: place for place, seq in enumerate(rows.sampled)}
        return pending

    def _step(self, rows: Rows) -> Pending:
        """Begin a step; its tokens are drawn on the host, once those before are known there."""
        logits, vectors = self._forward(rows)
        model, tokens = self._model, list[Token]()

        def finish() -> None:
            if rows.sampled and not tokens:
                with torch.inference_mode():
                    tokens.extend(sample(logits, rows.sampled, rows.ahead, model.draw, model.scores))
                    ids = [token.id for token in tokens]
                    self._ids = torch.tensor(ids, dtype=torch.int64, device=logits.device)

        return Pending(tuple(rows.sampled), lambda: tokens, finish, rows.drafts, vectors)

    def _forward(self, rows: Rows) -> tuple[Tensor, Callable[[], Vectors]]:
        """Return the logits [N, vocab] of the last rows of those that are sampled, and what gives vectors."""
        model = self._model
        attention = model.attention(rows.contexts, self._block_size)
        recurrence = model.recurrence(rows.contexts)
        lora = self._lora if rows.arrangement.segments else None
        if lora:
            lora.begin(rows.arrangement)
        needed = [*rows.last_rows, *chain.from_iterable(rows.others)]
        inputs = [rows.tokens, rows.sources, rows.positions, needed]
        packed = to_device(list(chain.from_iterable(inputs)), model.device)
        tokens, sources, positions, last_rows = torch.split(packed, [len(each) for each in inputs])
        if rows.in_flight:
            tokens = torch.where(sources >= 0, self._ids[sources.clamp(min=0)], tokens)
        own = self._lora.vocabularies.of(rows.arrangement.segments, rows.drawing)
        embedded = model.embed(tokens, own)
        cache = self.cache
        hidden = model.hidden(tokens, embedded, positions, last_rows, attention, cache, lora, recurrence)
        last, *states = torch.split(hidden, [len(rows.last_rows), *map(len, rows.others)])
        for seq, scored in zip(rows.scored, states, strict=False):
            score_prompt(seq, scored, partial(self._logits_of, seq), model.scores)()
        vectors = pool(rows.pooled, states[len(rows.scored) :], model.sparse) if rows.pooled else list
        return model.logits(last, own), vectors

    def _logits_of(self, seq: Sequence, hidden: Tensor) -> Tensor:
        """Return the logits of rows [N, hidden] of one sequence."""
        every = [Segment(seq.slot, 0, len(hidden))] if isinstance(seq.slot, int) else []
        return self._model.logits(hidden, self._lora.vocabularies.of(every, lambda: every))
