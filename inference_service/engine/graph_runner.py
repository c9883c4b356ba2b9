"""Executes decode steps by replaying graphs."""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from inference_service.backends.base import LoraBackend
from inference_service.backends.triton import TritonAttention
from inference_service.core.batch import Batch
from inference_service.core.sequence import Sequence
from inference_service.engine.buffers import StepBuffers, StepCapacity, StepMemory, device_params
from inference_service.engine.graphs import Graph, Recorder
from inference_service.engine.rows import Rows, lay_out
from inference_service.engine.runner import Runner
from inference_service.engine.scheduler import SchedulerLimits
from inference_service.engine.shaping import Shaper
from inference_service.engine.step import Pending
from inference_service.engine.transfer import Reading
from inference_service.kernels.sampling import pack_rows, sample
from inference_service.kernels.sgmv import Segments
from inference_service.models.decoder import Decoder
from loramux_shared.bases.memory import buckets


class SegmentedLora(LoraBackend, Protocol):
    """A LoRA backend whose work depends on a step by its segments alone."""

    @property
    def num_slots(self) -> int:
        """Adapters that are loaded."""
        ...

    def use(self, segments: Segments) -> None:
        """Compute what follows with these segments, which their owner fills."""
        ...


class GraphRunner(Runner):
    """Replays a graph for a step that decodes and does nothing else; runs others as `Runner` does.

    There is a graph for each bucket of rows, with adapters and without; rows of a bucket that a step does not
    need are padding. Tokens are drawn on the device: within the graph, and behind it where logits are shaped.
    """

    def __init__(
        self,
        model: Decoder,
        lora: SegmentedLora,
        num_blocks: int,
        block_size: int,
        limits: SchedulerLimits,
        recorder: Recorder,
    ) -> None:
        super().__init__(model, lora, num_blocks, block_size)
        self.depth = 1
        self._segmented = lora
        self._limits = limits
        self._recorder = recorder
        self._memory = StepMemory(self._capacity(limits.max_seqs), model.config.dims.vocab, model.device)
        self._ids = self._memory.drawn
        self._shaper = Shaper(limits.max_seqs, model.config.dims.vocab, model.device)
        self._every = torch.arange(limits.max_seqs, device=model.device)
        self._buffers: dict[int, StepBuffers] = {}
        self._graphs: dict[tuple[int, bool], Graph] = {}
        shape = limits.max_seqs, model.config.dims.vocab
        self._logits = torch.empty(shape, dtype=model.dtype, device=model.device)

    @torch.inference_mode()
    def capture(self) -> None:
        """Record all graphs, the largest first, for its memory serves the others; again after adapters came.

        What is recorded is a step of padding, which touches neither the cache nor the drawn tokens.
        """
        padding = lay_out(Batch(()), {})
        self._graphs.clear()
        self._buffers.clear()
        for rows in sorted(buckets(self._limits.max_seqs), reverse=True):
            buffers = StepBuffers(self._capacity(rows), self._memory)
            self._buffers[rows] = buffers
            buffers.load(padding)
            for segments in [None] if buffers.segments is None else [buffers.segments, None]:
                work = partial(self._decode, buffers, segments)
                self._graphs[rows, segments is not None] = self._recorder.capture(work)
        self._shaper.warm_up(self._logits, self._ids)

    def _step(self, rows: Rows) -> Pending:
        key = self._graph_of(rows)
        if key is None:
            logits = self._forward(rows)
            self._draw(logits, rows.sampled)
        else:
            self._buffers[key[0]].load(rows)
            self._graphs[key].replay()
            logits = self._logits[: len(rows.tokens)]
        reading = Reading(logits, self._ids, rows.sampled, self._shaper)
        return Pending(tuple(rows.sampled), reading.wait, reading.finish)

    def _graph_of(self, rows: Rows) -> tuple[int, bool] | None:
        """Return the key of the graph for a step; None when there is none."""
        num = len(rows.tokens)
        decodes = num == len(rows.contexts) == len(rows.sampled) and not rows.scored
        bucket = min((size for size in self._buffers if size >= num), default=None)
        return (bucket, bool(rows.arrangement.segments)) if decodes and bucket else None

    def _decode(self, buffers: StepBuffers, segments: Segments | None) -> None:
        """Run a step from its static buffers to the drawn tokens: what graphs hold."""
        rows = buffers.capacity.rows
        if segments is not None:
            self._segmented.use(segments)
        hidden = self._model.hidden(
            buffers.tokens(),
            buffers.positions,
            self._every[:rows],
            TritonAttention(buffers.attention),
            self._cache,
            self._lora if segments is not None else None,
        )
        logits = self._logits[:rows].copy_(self._model.logits(hidden))
        sample(logits, buffers.sampling, self._ids[:rows])

    def _draw(self, logits: Tensor, seqs: list[Sequence]) -> None:
        """Draw the tokens of a step that has no graph."""
        if not seqs:
            return
        host = torch.empty_like(self._memory.sampling.rows, device="cpu", pin_memory=logits.is_cuda)
        pack_rows(len(host), [device_params(seq) for seq in seqs], out=host.numpy())
        self._memory.sampling.load(host)
        sample(logits, self._memory.sampling, self._ids[: len(seqs)])

    def _capacity(self, rows: int) -> StepCapacity:
        return StepCapacity(
            rows=rows,
            max_seqs=self._limits.max_seqs,
            blocks_per_seq=-(-self._limits.max_seq_len // self._block_size),
            block_size=self._block_size,
            slots=self._segmented.num_slots,
        )
