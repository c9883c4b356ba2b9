"""Steps of an encoder on a CPU, some parts at a time, so that a shorter step need not wait for their end."""

import time
from collections.abc import Callable, Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from inference_service.core.sequence import Batch, Chunk, Sequence, Token
from inference_service.engine.backends.base import LoraBackend
from inference_service.engine.execution.runner import Blocks, Pending, Rows, Runner, Vectors, lay_out, pool
from inference_service.engine.kernels.attention import Context
from inference_service.engine.models.encoder import EVERY, Encoder, SequenceAttention


class Phase(NamedTuple):
    """Layers that a step computes of some rows."""

    rows: Rows
    layers: slice
    sources: list[int] | None = None
    """The row of the phase before that each of them continues; None in the first phase."""


class PartRunner(Runner):
    """Begins a step without computing it: its parts run when it goes on, whatever ran between two of them."""

    def __init__(
        self,
        model: Encoder,
        lora: LoraBackend,
        blocks: Blocks,
        block_size: int,
        part_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Run an encoder; a step pauses after part_s, at the end of a part of a layer. clock is in seconds."""
        super().__init__(model, lora, blocks, block_size, depth=0)
        self._encoder, self._bank, self._part_s, self._clock = model, lora, part_s, clock

    def _step(self, rows: Rows) -> Pending:
        """Begin a step."""
        model, phases = self._encoder, self._phases(rows)
        phase, x, left = phases[0], torch.empty(0), model.num_parts + len(phases) - 1

        def compute() -> Iterator[Tensor]:
            nonlocal phase
            done = None
            for phase in phases:
                begun, attention = self._begin(phase.rows)
                if done is None:
                    done = begun
                else:
                    yield (done := done[phase.sources])
                for done in model.parts(done, attention, self._tell(phase.rows), phase.layers):  # noqa: B020
                    yield done

        parts = compute()

        @torch.inference_mode()
        def go_on() -> bool:
            nonlocal x, left
            self._tell(phase.rows)  # another step may have run
            end_s = self._clock() + self._part_s
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

    def _begin(self, rows: Rows) -> tuple[Tensor, SequenceAttention]:
        """Return what the first layer reads of rows, and their attention."""
        model = self._encoder
        attention = model.attention(rows.contexts, self._block_size)
        assert isinstance(attention, SequenceAttention)  # noqa: S101 - it is an encoder's
        tokens, positions = torch.tensor(rows.tokens), torch.tensor(rows.positions)
        return model.begin(tokens, model.embed(tokens), positions, attention), attention

    def _tell(self, rows: Rows) -> LoraBackend | None:
        """Say whose rows come next; return None where all of them are the base's."""
        if not rows.arrangement.segments:
            return None
        self._bank.begin(rows.arrangement)
        return self._bank

    def _phases(self, rows: Rows) -> list[Phase]:
        """Part a step that has a text several times: layers below those that adapters of it add to run once."""
        chunks = rows.arrangement.chunks
        firsts = {chunk.seq: self._first_layer(chunk.seq) for chunk in chunks}
        shared: dict[object, list[Chunk]] = {}
        if len(chunks) > 1 and any(firsts.values()):
            for chunk in chunks:
                text = _text(chunk.seq) if firsts[chunk.seq] else chunk.seq
                shared.setdefault(text, []).append(chunk)
        several = [group for group in shared.values() if len(group) > 1]
        if not several:
            return [Phase(rows, EVERY)]
        below = min(firsts[chunk.seq] for chunk in chain.from_iterable(several))
        once = lay_out(Batch(tuple(group[0] for group in shared.values())), {})
        placed = zip(once.arrangement.chunks, once.contexts, strict=True)
        contexts = {chunk.seq: context for chunk, context in placed}
        places = {chunk.seq: contexts[group[0].seq] for group in shared.values() for chunk in group}
        sources = [row for chunk in chunks for row in _rows(places[chunk.seq])]
        return [Phase(once, slice(below)), Phase(rows, slice(below, None), sources)]

    def _first_layer(self, seq: Sequence) -> int:
        """Return the first layer that an adapter of a sequence adds to."""
        slots = [seq.slot] if isinstance(seq.slot, int) else [slot for slot, _ in seq.slot]
        last = self._encoder.config.dims.num_layers
        return min(last if slot < 0 else self._bank.first_layer(slot) for slot in slots)


def _text(seq: Sequence) -> object:
    """Return what two sequences have in common whose layers without adapters compute the same."""
    return seq.cache_salt, seq.second, tuple(seq.progress.tokens)


def _rows(context: Context) -> range:
    return range(context.row, context.row + context.length)
