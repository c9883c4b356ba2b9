"""The work of all ranks together: a step as flat arrays; runners, packer and bank that involve the others."""

import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import count
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from inference_service.core.sequence import Batch
from inference_service.engine.backends.base import LoraBackend, StepLora
from inference_service.engine.backends.triton_lora import TritonLora
from inference_service.engine.execution.buffers import StepBuffers
from inference_service.engine.execution.graph_runner import GraphRunner
from inference_service.engine.execution.graphs import Recorder
from inference_service.engine.execution.runner import (
    KNOWN,
    Blocks,
    Pending,
    Rows,
    Runner,
    Vectors,
    new_cache,
    to_device,
)
from inference_service.engine.kernels.attention import Context
from inference_service.engine.lora.packed import PackedAdapter
from inference_service.engine.lora.segments import Arrangement, Segment
from inference_service.engine.lora.vocabulary import StepVocabulary
from inference_service.engine.models.blocks import Cache
from inference_service.engine.models.decoder import Decoder
from inference_service.engine.scheduling.queues import SchedulerLimits
from inference_service.startup.ranks.host import RankHost
from loramux_shared.bundle.reader import Bundle


def message_of(rows: Rows) -> list[Any]:
    """Return what another rank needs of a step: positions, contexts, and segments of adapters."""
    contexts = [
        [each.row, each.length, each.end, each.slot, *map(_bytes, each.tables or (each.blocks,))]
        for each in rows.contexts
    ]
    segments = [
        [[each.slot, each.start, each.end, each.scale] for each in some]
        for some in (rows.arrangement.plain, rows.arrangement.mixed)
    ]
    return [_bytes(rows.positions), contexts, segments]


def _bytes(numbers: Any) -> bytes:
    return np.asarray(numbers, dtype=np.int32).tobytes()


def rows_of(message: Sequence[Any]) -> Rows:
    """Return the rows of a message, without tokens and draws, which are the first rank's."""
    packed, of_contexts, of_segments = message
    positions = np.frombuffer(packed, np.int32).tolist()
    contexts = []
    for row, length, end, slot, *tables in of_contexts:
        blocks = tuple([array("i", table) for table in tables])
        contexts.append(Context(row, length, blocks[0], end, blocks, slot))
    plain, mixed = (tuple([Segment(*each) for each in some]) for some in of_segments)
    sources = [KNOWN] * len(positions)
    return Rows(Arrangement((), plain, mixed), {}, [0] * len(positions), sources, positions, contexts)


@torch.inference_mode()
def compute(model: Decoder, lora: StepLora, cache: Cache, block_size: int, rows: Rows) -> None:
    """Compute another rank's part of a step; hidden rows come from the first one."""
    positions, arrangement = to_device(rows.positions, model.device), rows.arrangement
    if arrangement.segments:
        lora.begin(arrangement)
    hidden = torch.empty(len(positions), model.config.dims.hidden, dtype=model.dtype, device=model.device)
    attention, recurrence = model.attention(rows.contexts, block_size), model.recurrence(rows.contexts)
    adding = lora if arrangement.segments else None
    model.hidden(positions, hidden, positions, positions[:1] * 0, attention, cache, adding, recurrence)


class FollowingRunner(GraphRunner):
    """Another rank's runner: it records and replays what the first one does, and neither embeds nor draws."""

    def follow(self, rows: Rows) -> None:
        """Compute the rank's part of a step; hidden rows come from the first one."""
        with torch.inference_mode():
            self._launch(rows)

    def _embed(self, buffers: StepBuffers, own: StepVocabulary | None = None) -> None:
        """Do nothing: the first exchange brings the rows."""

    def _draw(self, buffers: StepBuffers, own: StepVocabulary | None = None) -> None:
        """Do nothing: the head is the first rank's."""


class Follower:
    """The steps of another rank, with its part of a model and of adapters, as the first rank tells it."""

    def __init__(self, model: Decoder, lora: LoraBackend, new_recorder: Callable[[], Recorder]) -> None:
        self._model, self._lora, self._new_recorder = model, lora, new_recorder
        self._cache, self._block_size = Cache(()), 0
        self._runner: FollowingRunner | None = None

    def prepare(self, blocks: Blocks, block_size: int, slots: int, recorded: dict[str, Any] | None) -> None:
        """Make the cache of the steps that follow, which are recorded within limits where there are some."""
        self._cache, self._runner, self._block_size = Cache(()), None, block_size
        if recorded is None:
            self._cache = new_cache(self._model, blocks, block_size, slots)
            return
        limits, segmented = SchedulerLimits(**recorded), cast(TritonLora, self._lora)
        recorder = self._new_recorder()
        self._runner = FollowingRunner(self._model, segmented, blocks, block_size, limits, recorder, slots)
        self._cache = self._runner.cache

    @torch.inference_mode()
    def copy_states(self, read: Sequence[int], written: Sequence[int]) -> None:
        """Copy states of sequences from slots to others."""
        self._cache.copy_states(*[to_device(slots, self._model.device) for slots in (read, written)])

    def capture(self) -> None:
        """Record all graphs."""
        cast(FollowingRunner, self._runner).capture()

    def record_one(self) -> None:
        """Record one more of the largest decode steps."""
        cast(FollowingRunner, self._runner).record_one()

    def step(self, *message: Any) -> None:
        """Compute the rank's part of a step."""
        rows = rows_of(message)
        if self._runner is None:
            compute(self._model, self._lora, self._cache, self._block_size, rows)
        else:
            self._runner.follow(rows)


class _LeadingRunner(Runner):
    """A runner that has the other ranks copy the states that it copies."""

    _host: RankHost

    def submit(self, batch: Batch) -> Pending:
        """Begin a step."""
        for copies in batch.copies:
            self._host.tell("copy_states", [*copies.values()], [*copies])
        return super().submit(batch)


class RankedGraphRunner(_LeadingRunner, GraphRunner):
    """The first rank's runner of steps that all ranks record and replay."""

    def __init__(
        self,
        model: Decoder,
        lora: TritonLora,
        blocks: Blocks,
        block_size: int,
        limits: SchedulerLimits,
        recorder: Recorder,
        slots: int,
        host: RankHost,
        *,
        depth: int | None = None,
    ) -> None:
        host.tell("prepare", blocks, block_size, slots, asdict(limits))
        super().__init__(model, lora, blocks, block_size, limits, recorder, slots, depth=depth)
        self._host = host

    def capture(self) -> None:
        """Record all graphs, on all ranks."""
        self._host.tell("capture")
        super().capture()

    def record_one(self) -> None:
        """Record one more, on all ranks."""
        self._host.tell("record_one")
        super().record_one()

    def _launch(self, rows: Rows) -> tuple[Callable[[], Vectors], list[Callable[[], None]]]:
        """Launch this rank's part, and the rest that no other does."""
        with _led(self._host, rows):
            return super()._launch(rows)


class RankedRunner(_LeadingRunner):
    """Runs steps with the other ranks, which have caches of as many blocks and slots."""

    def __init__(
        self,
        model: Decoder,
        lora: StepLora,
        blocks: Blocks,
        block_size: int,
        slots: int,
        host: RankHost,
        *,
        depth: int | None = None,
    ) -> None:
        super().__init__(model, lora, blocks, block_size, slots, depth=depth)
        host.tell("prepare", blocks, block_size, slots, None)
        self._host = host

    def _forward(self, rows: Rows) -> tuple[Tensor, Callable[[], Vectors]]:
        """Compute this rank's part, and the rest that no other does."""
        with _led(self._host, rows):
            return super()._forward(rows)


@contextmanager
def _led(host: RankHost, rows: Rows) -> Iterator[None]:
    """Have the other ranks compute a step; where this one's part raises, all are out of step."""
    host.tell("step", *message_of(rows))
    try:
        yield
    except Exception as error:
        host.lose_step(error)
        raise
    if host.failure:  # exchanges in shared memory end without a result
        raise host.failure


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
