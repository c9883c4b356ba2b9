"""Steps of an encoder on a CPU, some parts at a time, so that a shorter step need not wait for their end."""

import time
from collections.abc import Callable
from itertools import chain
from typing import Final

import torch

from inference_service.core.sequence import Token
from inference_service.engine.backends.base import StepLora
from inference_service.engine.execution.runner import Blocks, Pending, Rows, Runner, Vectors, pool
from inference_service.engine.models.encoder import Encoder, SequenceAttention

PART_S: Final = 0.004
"""Seconds after which a step pauses, at the end of a part of a layer."""


class PartRunner(Runner):
    """Begins a step without computing it: its parts run when it goes on, whatever ran between two of them."""

    def __init__(
        self,
        model: Encoder,
        lora: StepLora,
        blocks: Blocks,
        block_size: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Run an encoder; clock is in seconds."""
        super().__init__(model, lora, blocks, block_size, depth=0)
        self._encoder, self._clock = model, clock

    def _step(self, rows: Rows) -> Pending:
        """Begin a step."""
        model, lora = self._encoder, self._lora if rows.arrangement.segments else None
        attention = model.attention(rows.contexts, self._block_size)
        assert isinstance(attention, SequenceAttention)  # noqa: S101 - it is an encoder's
        tokens, positions = torch.tensor(rows.tokens), torch.tensor(rows.positions)
        x = model.begin(tokens, model.embed(tokens), positions, attention)
        parts, left = model.parts(x, attention, lora), model.num_parts

        def go_on() -> bool:
            nonlocal x, left
            if lora:  # another step may have run
                lora.begin(rows.arrangement)
            end_s = self._clock() + PART_S
            for each in parts:
                x, left = each, left - 1
                if self._clock() >= end_s:
                    break
            return left > 0

        @torch.inference_mode()
        def vectors() -> Vectors:
            hidden = model.end(x[list(chain.from_iterable(rows.others))])
            states = torch.split(hidden, [*map(len, rows.others)])
            return pool(rows.pooled, states, model.sparse)()

        return Pending((), list[Token], go_on=go_on, vectors=vectors)
