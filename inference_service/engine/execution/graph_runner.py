"""Executes steps on a device that runs recorded work: one layout for all, filled and replayed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch

from inference_service.core.sequence import Batch, Token
from inference_service.engine.backends.base import Recurrence, no_recurrence
from inference_service.engine.backends.triton import TritonAttention
from inference_service.engine.backends.triton_lora import TritonLora
from inference_service.engine.execution.buffers import StepBuffers, StepCapacity, StepMemory
from inference_service.engine.execution.graphs import Graph, Recorder
from inference_service.engine.execution.runner import (
    Blocks,
    Pending,
    Rows,
    Runner,
    Vectors,
    lay_out,
    pool,
    score_prompt,
)
from inference_service.engine.execution.shaping import Reading, Shaper
from inference_service.engine.execution.trace import TraceRecorder
from inference_service.engine.kernels.attention import cut_of
from inference_service.engine.kernels.delta import delta_tile, gated_delta
from inference_service.engine.kernels.sampling import sample
from inference_service.engine.kernels.sgmv import Segments, pack_segments
from inference_service.engine.lora.vocabulary import StepVocabulary
from inference_service.engine.models.decoder import Decoder
from inference_service.engine.scheduling.queues import SchedulerLimits
from loramux_shared.bases.memory import RECORDED_ROWS, blend_buckets, buckets, mixed_buckets

ROOM: Final = 256
"""Columns of logits for tokens that adapters have and the base does not."""
MOST_TRACES: Final = 128
"""Traces that are held: each takes about a megabyte of the host's memory."""


@dataclass(frozen=True)
class RecordedStep:
    """A kind of step that was recorded."""

    rows: int
    """Rows, of which a step may leave some unused."""
    adapters: int
    """Adapters that a row has at most."""
    experts: bool
    """True if these adapters touch experts."""


@dataclass(frozen=True)
class RecordedSteps:
    """The kinds of steps that a runner has recorded, each in the order of the recording."""

    graphs: tuple[RecordedStep, ...]
    traces: tuple[RecordedStep, ...]
    """A kind is here once for each number of adapters that a step had."""


class GraphRunner(Runner):
    """Fills the static tensors of a step's capacity, and does what was recorded for it.

    Capacities are those of `buckets` for steps that decode and do nothing else, and of `mixed_buckets` for the
    others; rows that a step does not need are padding. Each has a graph with adapters and one without, up to
    `RECORDED_ROWS`, and steps that decode one with mixtures of two. Of the others a trace is repeated, from the
    same tensors; the first step of a kind is the recording. Tokens are drawn on the device: within the graph or
    the trace, and behind it where logits are shaped.
    """

    def __init__(
        self,
        model: Decoder,
        lora: TritonLora,
        blocks: Blocks,
        block_size: int,
        limits: SchedulerLimits,
        recorder: Recorder,
        slots: int = 0,
        *,
        depth: int | None = None,
    ) -> None:
        super().__init__(model, lora, blocks, block_size, slots, depth=1 if depth is None else depth)
        self._segmented = lora
        self._limits = limits
        self._recorder = recorder
        vocab = model.config.dims.vocab + ROOM
        self._cuts = {each: cut_of(model.device, model.dtype, each) for each in model.config.heads}
        self._delta_tile = delta_tile(model.dtype) if model.config.state_bytes(1) else None
        largest = max(capacity.size for capacity in self._capacities())
        self._memory = StepMemory(limits.max_seqs, largest, vocab, model.device)
        self._ids = self._memory.drawn
        self._shaper = Shaper(limits.max_seqs, vocab, model.device)
        self._buffers: dict[StepCapacity, StepBuffers] = {}
        self._tried: list[Graph] = []
        self._graphs: dict[tuple[StepCapacity, int, bool], Graph] = {}
        """Graphs by the number of adapters that a row has at most, and whether these touch experts."""
        self._traces: dict[tuple[StepCapacity, int, int, bool], Graph] = {}
        """Traces by the same, and how many of these adapters the rows of the step have."""
        most, hidden = limits.max_seqs, model.config.dims.hidden
        rows = max(most, limits.max_tokens)
        self._embedded = torch.empty((rows, hidden), dtype=model.dtype, device=model.device)
        """Input of the layers: the embeddings of the step's rows; then the residual stream."""
        self._hidden = torch.empty_like(self._embedded)
        """The last hidden states of the step's rows."""
        self._logits = torch.full((most, vocab), -torch.inf, dtype=model.dtype, device=model.device)
        self._wide = False
        """True if the last step had added tokens."""

    def inspect(self) -> RecordedSteps:
        """Return what is recorded, for a person who looks for why a step is slow."""
        graphs = tuple(
            RecordedStep(capacity.rows, passes, experts) for capacity, passes, experts in self._graphs
        )
        traces = [RecordedStep(capacity.rows, passes, experts) for capacity, passes, _, experts in self._traces]
        return RecordedSteps(graphs, tuple(traces))

    @torch.inference_mode()
    def capture(self) -> None:
        """Record all graphs, the largest first, for its memory serves the others.

        Whatever adapters come and leave afterwards, they stay right.

        Of the steps that are too large for a graph the smallest and the largest are traced: those between
        them launch the same, with other grids. So whatever a step launches was launched before. Recorded steps
        are of padding, which touches neither the cache nor the drawn tokens.
        """
        padding = lay_out(Batch(()), {})
        self._graphs.clear()
        self._traces.clear()
        self._buffers.clear()
        capacities = sorted(self._capacities(), key=lambda each: each.rows, reverse=True)
        too_large = [each for each in capacities if each.mixed and each.rows > RECORDED_ROWS]
        for capacity in capacities:
            if capacity in too_large[1:-1]:
                continue
            buffers = self._buffers_of(capacity)
            buffers.load(padding)
            self._embed(buffers)
            for segments in (*reversed(buffers.segments), None):
                if segments is not None:
                    segments.load(torch.from_numpy(pack_segments(segments.capacity, [])))
                for experts in (True, False) if self._parts_experts(segments) else (True,):
                    if _is_recorded(capacity, segments):
                        work = partial(self._compute, buffers, segments, experts=experts)
                        self._graphs[capacity, _passes(segments), experts] = self._recorder.capture(work)
                    else:
                        self._repeat(buffers, segments, experts=experts)
        self._shaper.warm_up(self._logits, self._ids)

    @torch.inference_mode()
    def record_one(self) -> None:
        """Record one more of the largest decode steps; it is kept, and never replayed."""
        buffers = self._buffers_of(self._capacity(self._limits.max_seqs, mixed=False))
        buffers.load(lay_out(Batch(()), {}))
        self._embed(buffers)
        work = partial(self._compute, buffers, buffers.segments[0] if buffers.segments else None)
        self._tried.append(self._recorder.capture(work))

    def _step(self, rows: Rows) -> Pending:
        vectors, scores = self._launch(rows)
        logits = self._logits[: len(rows.sampled)]
        reading = Reading(logits, self._ids, rows.sampled, self._shaper, rows.ahead)

        def wait() -> list[Token]:
            for keep in scores:
                keep()
            return reading.wait()

        return Pending(tuple(rows.sampled), wait, reading.finish, rows.drafts, vectors)

    def _launch(self, rows: Rows) -> tuple[Callable[[], Vectors], list[Callable[[], None]]]:
        """Launch a step up to the drawn tokens; return what gives its vectors, and what its prompts' scores."""
        capacity = self._capacity_of(rows)
        buffers = self._buffers_of(capacity)
        buffers.load(rows)
        if self._wide:
            self._logits[:, self._model.config.dims.vocab :] = -torch.inf
            self._wide = False
        segments = buffers.segments_of(rows.arrangement)
        experts = True
        if self._parts_experts(segments):
            experts = self._segmented.touch_experts(each.slot for each in rows.arrangement.segments)
        own = self._lora.vocabularies.of(rows.arrangement.segments, rows.drawing)
        self._embed(buffers, own)
        self._repeat(buffers, segments, experts=experts)
        if own is not None:
            self._draw(buffers, own)
        scores = []
        for seq, scored in rows.scored.items():
            hidden = self._hidden[scored.start : scored.stop]
            scores.append(score_prompt(seq, hidden, partial(self._logits_of, seq), self._model.scores))
        states = [self._hidden[each.rows.start : each.rows.stop] for each in rows.pooled]
        return pool(rows.pooled, states), scores

    def _repeat(self, buffers: StepBuffers, segments: Segments | None, *, experts: bool) -> None:
        """Do a step by its graph or its trace, or record the trace."""
        capacity, passes = buffers.capacity, _passes(segments)
        repeated = self._graphs.get((capacity, passes, experts))
        key = capacity, passes, buffers.parts, experts
        repeated = repeated or self._traces.get(key)
        if repeated is not None:
            repeated.replay()
            return
        if len(self._traces) >= MOST_TRACES:
            self._traces.clear()
        work = partial(self._compute, buffers, segments, experts=experts)
        self._traces[key] = TraceRecorder().capture(work)

    def _embed(self, buffers: StepBuffers, own: StepVocabulary | None = None) -> None:
        """Begin a step: launched before its graph, for adapters may have embeddings of their own."""
        tokens = buffers.tokens()
        self._embedded[: len(tokens)].copy_(self._model.embed(tokens, own))

    def _parts_experts(self, segments: Segments | None) -> bool:
        """Return whether adapters that touch no expert have launches of their own."""
        return segments is not None and _passes(segments) == 1 and self._segmented.has_experts

    def _compute(self, buffers: StepBuffers, segments: Segments | None, *, experts: bool = True) -> None:
        """Go from static tensors to the tokens that the base's head draws: what graphs and traces hold."""
        if segments is not None:
            recorded = _is_recorded(buffers.capacity, segments)
            self._segmented.use(segments, None if recorded else buffers.parts, experts=experts)
        tables = {heads: buffers.attention[cut] for heads, cut in self._cuts.items()}
        rows = buffers.capacity.rows
        self._model.hidden(
            buffers.tokens(),
            self._embedded[:rows],
            buffers.positions,
            None,
            TritonAttention(tables, self._model.config.windows),
            self.cache,
            self._lora if segments is not None else None,
            no_recurrence if buffers.delta is None else Recurrence(partial(gated_delta, tables=buffers.delta)),
            self._hidden[:rows],
        )
        self._draw(buffers)

    def _draw(self, buffers: StepBuffers, own: StepVocabulary | None = None) -> None:
        seqs = buffers.capacity.seqs
        hidden = self._hidden.index_select(0, buffers.last_rows)
        logits = self._model.logits(hidden, own)
        self._wide |= logits.shape[1] > self._model.config.dims.vocab
        self._logits[:seqs, : logits.shape[1]].copy_(logits)
        sample(self._logits[:seqs], buffers.sampling, self._ids[:seqs])

    def _buffers_of(self, capacity: StepCapacity) -> StepBuffers:
        if capacity not in self._buffers:
            self._buffers[capacity] = StepBuffers(capacity, self._memory)
        return self._buffers[capacity]

    def _capacity_of(self, rows: Rows) -> StepCapacity:
        num = len(rows.tokens)
        decodes = num == len(rows.contexts)
        sizes = buckets(self._limits.max_seqs) if decodes else mixed_buckets(self._limits.max_tokens)
        if decodes and rows.arrangement.mixed:
            sizes = iter(blend_buckets(self._limits.max_seqs))
        return self._capacity(next(size for size in sizes if size >= num), mixed=not decodes)

    def _capacities(self) -> list[StepCapacity]:
        decodes = [self._capacity(rows, mixed=False) for rows in buckets(self._limits.max_seqs)]
        return decodes + [self._capacity(rows, mixed=True) for rows in mixed_buckets(self._limits.max_tokens)]

    def _capacity(self, rows: int, *, mixed: bool) -> StepCapacity:
        return StepCapacity(
            rows=rows,
            seqs=min(rows, self._limits.max_seqs),
            mixed=mixed,
            max_seqs=self._limits.max_seqs,
            blocks_per_seq=-(-self._limits.max_seq_len // self._block_size),
            block_size=self._block_size,
            cuts=tuple(dict.fromkeys(self._cuts.values())),
            groups=len(self._model.config.windows),
            delta_tile=self._delta_tile,
            slots=self._segmented.num_slots,
            active=self._limits.max_adapters,
        )


def _passes(segments: Segments | None) -> int:
    """Adapters that a row may have: none, one as it is, or several with scales."""
    return 0 if segments is None else segments.capacity.passes


def _is_recorded(capacity: StepCapacity, segments: Segments | None) -> bool:
    """Blends are rare: of their steps only those that decode have graphs, of few capacities."""
    return not capacity.mixed or (capacity.rows <= RECORDED_ROWS and _passes(segments) <= 1)
