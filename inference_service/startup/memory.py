"""The free memory of a replica's device, divided as `loramux_shared.bases.memory` plans it.

On a GPU the arithmetic is a forecast: what the largest step takes is measured before the cache gets its size.
On a CPU it is the plan. There the cache takes a quarter of what is free at most, its pages come when they are
written, and the most that a process had cannot be asked for one step alone.
"""

import ctypes
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import psutil
import structlog
import torch

from inference_service.core.adapter import Adapter
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Batch, Chunk, Sequence as EngineSequence
from inference_service.engine.execution.runner import Runner, StepRunner
from inference_service.engine.models.decoder import Decoder
from inference_service.engine.scheduling.block_manager import BlockManager
from inference_service.engine.scheduling.blocks import StateSlots
from inference_service.engine.scheduling.queues import SchedulerLimits
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.memory import GB, GRAPH_BYTES, MemoryPlan, cache_of, needs_of, plan_on
from loramux_shared.control_groups import memory_limit
from loramux_shared.faults import ResourcesExhausted
from loramux_shared.settings import InferenceSettings

HOST_SHARE: Final = 0.5
"""Largest share of the host's free memory for adapters that left the GPUs, of all ranks together."""
SCRATCH_BLOCKS: Final = 8
"""Blocks of the cache that the profiled step reads and writes repeatedly: their content is irrelevant here."""
TRIED: Final = 4
"""Graphs that are recorded to see what each takes."""
LEAST_GRAPH_BYTES: Final = 1 << 20
"""Taken by a graph at least: the driver hands memory out in pieces."""
MAX_GRAPH_DRIVER_BYTES: Final = 32 << 20
"""Taken by a graph beside the allocator's memory at most; a larger difference is another process's."""
MAX_DRIVER_BYTES: Final = 2 << 30
"""Taken by kernels and libraries, or by all graphs, beside the allocator's memory at most, likewise."""


@dataclass(frozen=True)
class Usage:
    """The memory of a device at one moment, in bytes."""

    free: int
    """Of the whole device: other processes take and return it too."""
    reserved: int
    """Had by this process's allocator, pools of graphs included."""

    def growth(self, later: "Usage", most_of_driver: int) -> int:
        """Return what this process took until later.

        The allocator counts its own. The driver's part is the rest of what the device has lost, but for what
        must be another process's: less than nothing, or more than most_of_driver.
        """
        own = later.reserved - self.reserved
        return own + min(max(self.free - later.free - own, 0), most_of_driver)


class CudaMemory:
    """The memory of a CUDA device, in bytes, as its driver and torch's allocator see it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def settled(self) -> Usage:
        """Wait for the device, give the driver back what the allocator only keeps, and return what is left."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return Usage(torch.cuda.mem_get_info(self._device)[0], torch.cuda.memory_reserved(self._device))

    def watch_peak(self) -> None:
        """Begin to note the most that the allocator has at once."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        """The most since `watch_peak`."""
        return torch.cuda.max_memory_reserved(self._device)


@dataclass(frozen=True)
class Measured:
    """The memory of the largest step, in bytes."""

    steps: int
    """At once, while it ran, its runner's own tensors included."""
    kept: int
    """For good: workspaces and modules of libraries, kernels, tables that later steps use again."""
    free: int
    """Bytes that are free behind it."""
    graph: int = GRAPH_BYTES
    """Taken by each recorded step beside its tensors."""


def measure_graph(new_runner: Callable[[], Runner], memory: CudaMemory) -> int:
    """Return the bytes that each recorded step takes, by a runner that is thrown away.

    The first one takes the memory that all share; those behind it show what each takes.
    """
    runner = new_runner()
    runner.record_one()
    before = memory.settled()
    for _ in range(TRIED):
        runner.record_one()
    taken = before.growth(memory.settled(), TRIED * MAX_GRAPH_DRIVER_BYTES)
    return max(LEAST_GRAPH_BYTES, taken // TRIED)


def measure(new_runner: Callable[[], StepRunner], batch: Batch, memory: CudaMemory) -> Measured:
    """Run a batch with a runner of its own, whose cache has SCRATCH_BLOCKS blocks; raise ResourcesExhausted
    where the device has not enough memory for it.
    """
    before = memory.settled()
    memory.watch_peak()
    try:
        new_runner().submit(batch).tokens()
    except torch.OutOfMemoryError as error:
        raise ResourcesExhausted(
            f"a step of {batch.num_tokens} tokens and {len(batch.chunks)} sequences, the largest, does not fit "
            f"in the {before.free / GB:.2f} GB that weights and adapters leave. Lower LORAMUX_MAX_BATCH_TOKENS "
            "or LORAMUX_MAX_BATCH_SEQS, or serve fewer adapters."
        ) from error
    after = memory.settled()
    kept = before.growth(after, MAX_DRIVER_BYTES)
    return Measured(memory.peak() - after.reserved, kept, after.free)


def largest_step(limits: SchedulerLimits, adapters: Sequence[Adapter], block_size: int) -> Batch:
    """Return a step of as many rows and sequences as there may be, each at the end of the longest context.

    The first take what is left of the rows for chunks of prompts; a token is drawn for each, with its log
    probability, and as many adapters take part as may.
    """
    longest, seqs = limits.max_seq_len, min(limits.max_seqs, limits.max_tokens)
    tokens = [0] * longest
    blocks = array("i", [place % SCRATCH_BLOCKS for place in range(-(-longest // block_size))])
    models = [*adapters[: limits.max_adapters], None]
    left, chunks = limits.max_tokens - seqs, []
    for number in range(seqs):
        more = min(left, longest - 1)
        left -= more
        params = SamplingParams(max_tokens=1, logprobs=1)
        seq = EngineSequence(f"profile-{number}", tokens, params, models[number % len(models)])
        progress = seq.progress
        progress.tokens, progress.num_computed = tokens, longest - 1 - more
        progress.blocks, progress.state_slot = blocks, 0
        chunks.append(Chunk(seq, 1 + more))
    return Batch(tuple(chunks))


log = structlog.get_logger()


def divide_memory(
    settings: InferenceSettings,
    max_seq_len: int | None,
    model: Decoder,
    adapters: int,
    *,
    promised: int = 0,
    graphs: bool,
    measure: Callable[[int], Measured] | None = None,
) -> MemoryPlan:
    """Plan the memory of a model that is loaded, adapters' bytes included, and log a line per item.

    promised are bytes that will be taken and are not yet; adapters' memory on a CPU comes when it is written.
    measure runs the largest step, with contexts of so many tokens; without it, arithmetic must do. Raise
    ResourcesExhausted where it does not fit.
    """
    config, item_bytes, device = model.config, model.dtype.itemsize, model.device
    free = free_bytes(device, 1 if model.ranks is None else model.ranks.shard.world) - promised
    needs = needs_of(config, item_bytes, adapters, settings, device.type, graphs=graphs)
    cache = cache_of(config, item_bytes, settings, device.type, max_seq_len)
    forecast: dict[str, int] = {}
    libraries = 0
    if measure is not None:
        forecast = {"activations": needs.activations, "graphs": needs.graphs, "libraries": 0}
        measured = measure(cache.longest)
        counted = needs_of(
            config, item_bytes, adapters, settings, device.type, graphs=graphs, graph_bytes=measured.graph
        )
        needs = replace(needs, activations=measured.steps, graphs=counted.graphs)
        free, libraries = measured.free, measured.kept
    plan = plan_on(device.type, free, needs, cache)
    if plan.seqs < cache.seqs:
        log.info(
            "fewer sequences run at once, since each holds a recurrent state", seats=plan.seqs, usual=cache.seqs
        )
    left = free - needs.activations - needs.graphs - plan.kv_bytes
    items = {**asdict(needs), "libraries": libraries, "key-value cache": plan.kv_bytes, "left": left}
    for item, size in items.items():
        planned = {"planned_gb": round(forecast[item] / GB, 3)} if item in forecast else {}
        log.info("memory", item=item, gb=round(size / GB, 3), **planned)
    return plan


def blocks_of(plan: MemoryPlan, config: ModelConfig, settings: InferenceSettings) -> BlockManager:
    """Return the blocks and slots that were planned, all of them free."""
    size = settings.block_size
    states = StateSlots(plan.slots, size, plan.spacing) if plan.slots else None
    cached = settings.prefix_cache
    return BlockManager(plan.blocks, size, config.windows, states=states, prefix_cache=cached)


def free_bytes(device: torch.device, ranks: int = 1) -> int:
    """Free bytes of the device, or a rank's part of those of the host."""
    if device.type == "cuda":
        return CudaMemory(device).settled().free
    return host_memory().free // ranks


@dataclass(frozen=True)
class HostMemory:
    """The memory of a process on a host, in bytes: the machine's, or what a container's limit allows of it."""

    total: int
    free: int


def host_memory(root: Path = Path("/")) -> HostMemory:
    """Return the memory that this process may have, and what is free of it; root is as in `memory_limit`."""
    machine, limit = psutil.virtual_memory(), memory_limit(root)
    if limit is None:
        return HostMemory(machine.total, machine.available)
    return HostMemory(min(machine.total, limit.num_bytes), min(machine.available, limit.free))


def plan_host_tier(settings: InferenceSettings, free: int, ranks: int) -> int:
    """Return the bytes of locked memory for adapters that left a rank's GPU, of a host with so many free."""
    requested, most = int(settings.adapter_host_gb * GB), int(HOST_SHARE * free) // ranks
    if most < requested:
        log.info(
            "LORAMUX_ADAPTER_HOST_GB is more than half of the host's free memory: fewer adapters stay there",
            gb=round(most / GB, 3),
            free_gb=round(free / GB, 3),
        )
    return min(requested, most)


_M_ARENA_MAX: Final = -8
"""Option of mallopt, from malloc.h."""
ARENAS: Final = 2
"""glibc's own is eight for each core: each thread of a load would keep in its own what it freed."""


def bound_arenas() -> None:
    """Let all threads allocate from few arenas; to be called before there are many threads."""
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_M_ARENA_MAX, ARENAS)


def give_back() -> None:
    """Return to the system what was freed, of all arenas."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
