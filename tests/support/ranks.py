"""Ranks of tensor parallelism in threads of one process: what they compute, without the processes."""

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from inference_service.engine.engine import Engine
from inference_service.lora.places import taken_by
from inference_service.lora.weights import load_adapter, part_of
from inference_service.models.blocks import CacheSize
from inference_service.models.checkpoint import Checkpoint
from inference_service.models.decoder import Decoder
from inference_service.startup.choose import choose_backend
from inference_service.startup.load import Ready
from loramux_shared.bases.read import read_config
from loramux_shared.bases.shard import Shard
from loramux_shared.bundle.reader import read_bundle
from loramux_shared.settings import InferenceSettings
from loramux_shared.storage.base import Store
from tests.support.waiting import BOUND_S

work = pytest.importorskip("loramux_ranks.work", reason="the extension ranks is not there")


class _Meeting:
    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world)
        self.given: list[Tensor] = [torch.empty(0)] * world


class ThreadRanks:
    """Exchanges tensors with other threads."""

    def __init__(self, shard: Shard, meeting: _Meeting) -> None:
        self.shard, self._at = shard, meeting

    def _exchanged(self, own: Tensor) -> list[Tensor]:
        self._at.given[self.shard.rank] = own.clone()
        self._at.barrier.wait(BOUND_S)
        found = [*self._at.given]
        self._at.barrier.wait(BOUND_S)
        return found

    def share(self, rows: Tensor) -> None:
        """Take the first rank's rows."""
        rows.copy_(self._exchanged(rows)[0])

    def sum(self, partial: Tensor) -> Tensor:
        """Sum in the order of the ranks."""
        return partial.copy_(torch.stack(self._exchanged(partial)).sum(0))


class _Threads:
    """A queue of messages for each other rank."""

    def __init__(self) -> None:
        self.queues: list[queue.SimpleQueue[Any]] = []
        self.failure = ""

    def tell(self, *message: Any) -> None:
        for each in self.queues:
            each.put(message)

    def lose_step(self, error: Exception) -> None:
        self.failure = str(error)


@contextmanager
def divided(ready: Ready, folder: Path, store: Store, world: int = 2) -> Iterator[None]:
    """Let a replica's engine compute with ranks in threads, or raise SettingsInvalid if the base refuses."""
    engine = ready.engine._engine
    block_size, parts = engine._blocks.block_size, []
    settings = InferenceSettings(deployment="tiny", dtype="float32", block_size=block_size)
    whole, meeting, host = read_config(folder, engine._limits.max_seq_len), _Meeting(world), _Threads()
    for rank in range(world):
        shard = Shard(whole, rank, world, whole.shard(world))
        backend = choose_backend(settings, shard.config)
        tensors = Checkpoint(folder, backend.dtype, backend.device)
        model = Decoder(whole, tensors, backend.operations, ranks=ThreadRanks(shard, meeting))
        lora = backend.new_lora()
        offset = 0
        lora.open(1 << 24, 64, 64)
        for adapter in ready.bank.residency.resident():
            weights = load_adapter(
                read_bundle(store, adapter.digest), whole.layer_groups, model.dtype, lora.home
            )
            packed = lora.pack(part_of(weights, shard))
            lora.copy(packed, offset)
            lora.enter(adapter.slot, offset, packed)
            offset += taken_by(packed.num_bytes)
        parts.append((model, lora))

    def other(model: Decoder, lora: Any, messages: queue.SimpleQueue[Any]) -> None:
        cache = None
        while (message := messages.get()) is not None:
            name, *rest = message
            if name == "cache":
                cache = model.new_cache(CacheSize(tuple([number * block_size for number in rest[0]])))
                continue
            try:
                work.compute(model, lora, cache, block_size, rest)
            except BaseException:
                meeting.barrier.abort()
                raise

    threads = []
    for model, lora in parts[1:]:
        host.queues.append(queue.SimpleQueue())
        threads.append(threading.Thread(target=other, args=(model, lora, host.queues[-1]), daemon=True))
        threads[-1].start()
    blocks = tuple(group.pool.num_blocks for group in engine._blocks.groups)
    runner = work.RankedRunner(*parts[0], blocks, block_size, host)
    ready.engine._engine = Engine(runner, engine._limits, engine._blocks, engine._residency)
    try:
        yield
    finally:
        for each in host.queues:
            each.put(None)
        for thread in threads:
            thread.join(BOUND_S)
        ready.engine._engine = engine
    assert host.failure == ""
