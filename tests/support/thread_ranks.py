"""Ranks of tensor parallelism in threads of one process: what they compute, without the processes."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from inference_service.engine.engine import Engine
from inference_service.engine.execution.graphs import Recorder
from inference_service.engine.execution.runner import Runner
from inference_service.engine.execution.tape import TapeRecorder
from inference_service.engine.kernels.launch import Launch
from inference_service.engine.lora.places import taken_by
from inference_service.engine.lora.weights import load_adapter, part_of
from inference_service.engine.models.checkpoint import Checkpoint
from inference_service.engine.models.decoder import Decoder
from inference_service.engine.scheduling.block_manager import BlockManager
from inference_service.engine.scheduling.blocks import StateSlots
from inference_service.engine.scheduling.queues import SchedulerLimits
from inference_service.startup.choose import choose_backend
from inference_service.startup.ranks import work
from loramux_shared.bases.read import read_config
from loramux_shared.bases.shard import Shard
from loramux_shared.bundle.reader import read_bundle
from loramux_shared.settings import InferenceSettings
from loramux_shared.storage.base import Store
from tests.support.native import reuse_native
from tests.support.tiny import Replica
from tests.support.waiting import BOUND_S


class _Meeting:
    """Ranks that compute one at a time: Triton's interpreter is of a process, not of a thread."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world)
        self.given: list[Tensor] = [torch.empty(0)] * world
        self.turn = threading.Lock()

    def wait(self) -> None:
        """Let others compute until all are here."""
        self.turn.release()
        try:
            self.barrier.wait(BOUND_S)
        finally:
            self.turn.acquire()


class ThreadRanks:
    """Exchanges tensors with other threads, as a kernel that graphs repeat."""

    fn = SimpleNamespace(__name__="exchange")

    def __init__(self, shard: Shard, meeting: _Meeting) -> None:
        self.shard, self._at = shard, meeting

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """Return the kernel, whose grid is how many ranks' rows are summed."""

        def exchange(rows: Tensor) -> None:
            self._at.given[self.shard.rank] = rows.clone()
            self._at.wait()
            found = torch.stack(self._at.given[: grid[0]]).sum(0)
            self._at.wait()
            rows.copy_(found)

        return exchange

    def share(self, rows: Tensor) -> None:
        """Take the first rank's rows."""
        Launch(self, (1,), {"rows": rows})()

    def sum(self, partial: Tensor) -> Tensor:
        """Sum in the order of the ranks."""
        Launch(self, (self.shard.world,), {"rows": partial})()
        return partial


def in_turn(meeting: _Meeting, step: Callable[[], Any]) -> Callable[[], Any]:
    """Return what makes a step while no other rank computes."""

    def take() -> Any:
        with meeting.turn:
            return step()

    return take


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
def run_in_ranks(
    ready: Replica,
    folder: Path,
    store: Store,
    world: int = 2,
    recorded: SchedulerLimits | None = None,
    backend: str = "auto",
    recorder: Recorder | None = None,
) -> Iterator[Replica]:
    """Give a replica an engine with ranks in threads; within limits, steps are recorded on tapes."""
    found, parts = ready.core.inspect(), []
    block_size = found.stats.block_size
    settings = InferenceSettings(deployment="tiny", dtype="float32", block_size=block_size, backend=backend)
    whole, meeting, host = read_config(folder, ready.limits.max_seq_len), _Meeting(world), _Threads()
    for rank in range(world):
        shard = Shard(whole, rank, world, whole.shard(world))
        with reuse_native():
            chosen = choose_backend(settings, shard.config)
        tensors = Checkpoint(folder, chosen.dtype, chosen.device, quantization=whole.quantization)
        model = Decoder(whole, tensors, chosen.operations, ranks=ThreadRanks(shard, meeting))
        lora = chosen.new_lora()
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

    blocks = [len(use.held) + len(use.cached) + len(use.free) for use in found.blocks]
    slots = 0 if found.states is None else len(found.states.cached) + len(found.states.free)
    states = StateSlots(slots, block_size, 1) if slots else None

    def follow(follower: Any, messages: queue.SimpleQueue[Any]) -> None:
        while (message := messages.get()) is not None:
            name, *rest = message
            try:
                with meeting.turn:
                    getattr(follower, name)(*rest)
            except BaseException:
                meeting.barrier.abort()
                raise

    threads = []
    for part in parts[1:]:
        host.queues.append(queue.SimpleQueue())
        follower = work.Follower(*part, TapeRecorder)
        threads.append(threading.Thread(target=follow, args=(follower, host.queues[-1]), daemon=True))
        threads[-1].start()
    if recorded is None:
        runner: Runner = work.RankedRunner(*parts[0], blocks, block_size, slots, host)
    else:
        runner = work.RankedGraphRunner(
            *parts[0], blocks, block_size, recorded, recorder or TapeRecorder(), slots, host
        )
        with meeting.turn:
            runner.capture()
    manager = BlockManager(blocks, block_size, whole.windows, states=states, prefix_cache=not whole.encodes)
    first: Any = Engine(runner, recorded or ready.limits, manager, ready.bank.residency)
    first.step = in_turn(meeting, first.step)
    try:
        yield replace(ready, core=first, base=replace(ready.base, model=parts[0][0]))
    finally:
        for each in host.queues:
            each.put(None)
        for thread in threads:
            thread.join(BOUND_S)
    assert host.failure == ""
