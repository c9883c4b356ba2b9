"""Executes a batch: tensors here, no policy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from inference_service.backends.base import StepLora
from inference_service.core.sequence import Batch, Sequence, Token
from inference_service.engine.pooling import Vectors, pool
from inference_service.engine.rows import Rows, lay_out
from inference_service.engine.sampler import sample
from inference_service.engine.step import Pending
from inference_service.engine.transfer import score_prompt, to_device
from inference_service.lora.segments import Segment
from inference_service.models.decoder import Decoder
from inference_service.models.step import CacheSize

Blocks = tuple[int, ...]
"""Blocks of each group of layers that see equally far."""


class Runner:
    """Runs batches through a model and its cache, operation by operation."""

    def __init__(
        self, model: Decoder, lora: StepLora, num_blocks: int | Blocks, block_size: int, slots: int = 0
    ) -> None:
        """Make a cache: blocks of every group of layers, one number for all of them, and slots of states."""
        windows = len(model.config.windows)
        blocks = (num_blocks,) * windows if isinstance(num_blocks, int) else num_blocks
        self.depth = 1 if model.device.type == "cuda" else 0
        self._model = model
        self._lora = lora
        self._block_size = block_size
        self._cache = model.new_cache(CacheSize(tuple([number * block_size for number in blocks]), slots))
        self._drawn: dict[Sequence, int] = {}
        self._ids = torch.empty(0, dtype=torch.int64, device=model.device)

    def capture(self) -> None:
        """Record steps, where they can be recorded: here they cannot."""

    def record_one(self) -> None:
        """Record one more of the largest decode steps, where steps can be recorded, to see what that takes."""

    def run(self, batch: Batch) -> list[tuple[Sequence, Token]]:
        """Compute a batch; return the new token of every sequence whose last row was in it."""
        return self.submit(batch).tokens()

    @torch.inference_mode()
    def submit(self, batch: Batch) -> Pending:
        """Begin a step."""
        for copies in batch.copies:
            slots = to_device([*copies.values(), *copies], self._model.device)
            self._cache.copy_states(slots[: len(copies)], slots[len(copies) :])
        rows = lay_out(batch, self._drawn)
        pending = self._step(rows)
        self._drawn = {seq: place for place, seq in enumerate(rows.sampled)}
        return pending

    def _step(self, rows: Rows) -> Pending:
        """Begin a step; its tokens are drawn on the host, once those before are known there."""
        logits, vectors = self._forward(rows)
        tokens: list[Token] = []

        def finish() -> None:
            if rows.sampled and not tokens:
                with torch.inference_mode():
                    tokens.extend(sample(logits, rows.sampled, rows.ahead, self._model.draw))
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
        others = [*rows.scored.values(), *[each.rows for each in rows.pooled]]
        needed = [*rows.last_rows, *chain.from_iterable(others)]
        inputs = [rows.tokens, rows.sources, rows.positions, needed]
        packed = to_device(list(chain.from_iterable(inputs)), model.device)
        tokens, sources, positions, last_rows = torch.split(packed, [len(each) for each in inputs])
        if rows.in_flight:
            tokens = torch.where(sources >= 0, self._ids[sources.clamp(min=0)], tokens)
        own = self._lora.vocabularies.of(rows.arrangement.segments, rows.drawing)
        embedded = model.embed(tokens, own)
        cache = self._cache
        hidden = model.hidden(tokens, embedded, positions, last_rows, attention, cache, lora, recurrence)
        last, *states = torch.split(hidden, [len(rows.last_rows), *map(len, others)])
        for seq, scored in zip(rows.scored, states, strict=False):
            score_prompt(seq, scored, partial(self._logits_of, seq))()
        vectors = pool(rows.pooled, states[len(rows.scored) :]) if rows.pooled else list
        return model.logits(last, own), vectors

    def _logits_of(self, seq: Sequence, hidden: Tensor) -> Tensor:
        """Return the logits of rows [N, hidden] of one sequence."""
        every = [Segment(seq.slot, 0, len(hidden))] if isinstance(seq.slot, int) else []
        return self._model.logits(hidden, self._lora.vocabularies.of(every, lambda: every))
