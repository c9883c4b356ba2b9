"""The work of all ranks together: a step as flat arrays; runner, packer and bank that involve the others."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference_service.backends.base import LoraBackend, StepLora
from inference_service.engine.runner import Blocks, Rows, Runner, Vectors
from inference_service.kernels.attention import Context
from inference_service.lora.packed import PackedAdapter
from inference_service.lora.segments import Arrangement, Segment
from inference_service.models.blocks import Cache
from inference_service.models.decoder import Decoder
from loramux_ranks.host import RankHost
from loramux_shared.bundle.reader import Bundle


def message_of(rows: Rows) -> list[Any]:
    """Return what another rank needs of a step: positions, contexts, and segments of adapters."""
    contexts = [
        [each.row, each.length, each.end, *(_bytes(table) for table in each.tables or (each.blocks,))]
        for each in rows.contexts
    ]
    segments = [
        [[each.slot, each.start, each.end, each.scale] for each in some]
        for some in (rows.arrangement.plain, rows.arrangement.mixed)
    ]
    return [_bytes(rows.positions), contexts, segments]


def _bytes(numbers: Any) -> bytes:
    return np.asarray(numbers, dtype=np.int32).tobytes()


@torch.inference_mode()
def compute(model: Decoder, lora: StepLora, cache: Cache, block_size: int, message: list[Any]) -> None:
    """Compute another rank's part of a step; hidden rows come from the first one."""
    packed, of_contexts, of_segments = message
    positions = torch.frombuffer(bytearray(packed), dtype=torch.int32).to(model.device, torch.int64)
    contexts = []
    for row, length, end, *tables in of_contexts:
        blocks = tuple([array("i", table) for table in tables])
        contexts.append(Context(row, length, blocks[0], end, blocks))
    plain, mixed = (tuple([Segment(*each) for each in some]) for some in of_segments)
    arrangement = Arrangement((), plain, mixed)
    if arrangement.segments:
        lora.begin(arrangement)
    hidden = torch.empty(len(positions), model.config.dims.hidden, dtype=model.dtype, device=model.device)
    attention = model.attention(contexts, block_size)
    adding = lora if arrangement.segments else None
    model.hidden(positions, hidden, positions, positions[:1] * 0, attention, cache, adding)


class RankedRunner(Runner):
    """Runs steps with the other ranks, which have caches of as many blocks."""

    def __init__(
        self, model: Decoder, lora: StepLora, num_blocks: int | Blocks, block_size: int, host: RankHost
    ) -> None:
        super().__init__(model, lora, num_blocks, block_size)
        windows = len(model.config.windows)
        blocks = [num_blocks] * windows if isinstance(num_blocks, int) else list(num_blocks)
        host.tell("cache", blocks, block_size)
        self._host = host

    def _forward(self, rows: Rows) -> tuple[Tensor, Callable[[], Vectors]]:
        """Compute this rank's part, and the rest that no other does."""
        self._host.tell("step", *message_of(rows))
        try:
            found = super()._forward(rows)
        except Exception as error:
            self._host.lose_step(error)
            raise
        if self._host.failure:  # exchanges in shared memory end without a result
            raise self._host.failure
        return found


@dataclass(frozen=True)
class RankedAdapter(PackedAdapter):
    """A packed part of an adapter whose other parts other ranks hold, under a number."""

    number: int = 0


class RankedPacker:
    """Packs an adapter on every rank, each its part of what it read and verified itself."""

    def __init__(self, pack: Callable[[Bundle], PackedAdapter], host: RankHost) -> None:
        self._pack, self._host, self._numbers = pack, host, count(1)

    def __call__(self, bundle: Bundle) -> RankedAdapter:
        """Pack a bundle.

        Raises:
            Fault: that of the first rank that cannot.
        """
        number = next(self._numbers)
        others = self._host.ask("pack", number, bundle.digest)
        try:
            own = self._pack(bundle)
            others()
        except Exception:
            self._host.drop(number)
            raise
        values = {each.name: getattr(own, each.name) for each in fields(own)}
        packed = RankedAdapter(**values, number=number)
        weakref.finalize(packed, self._host.drop, number)
        return packed


class RankedBank:
    """The banks of all ranks, which hold the same adapters in the same places."""

    def __init__(self, lora: LoraBackend, host: RankHost) -> None:
        self._lora, self._host = lora, host

    def copy(self, packed: PackedAdapter, offset: int) -> None:
        """Copy each rank's part; return when all are there."""
        others = self._host.ask("copy", _number(packed), offset)
        self._lora.copy(packed, offset)
        others()

    def enter(self, slot: int, offset: int, packed: PackedAdapter) -> None:
        """Give a slot to what was copied."""
        self._host.tell("enter", slot, offset, _number(packed))
        self._lora.enter(slot, offset, packed)

    def leave(self, slot: int) -> None:
        """Empty a slot."""
        self._host.tell("leave", slot)
        self._lora.leave(slot)


def _number(packed: PackedAdapter) -> int:
    assert isinstance(packed, RankedAdapter)  # noqa: S101 - `RankedPacker` packed it
    return packed.number
