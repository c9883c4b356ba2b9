"""The largest step there can be, run once, and what it takes of the device's memory."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch

from inference_service.core.adapter import Adapter
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Batch, Chunk, Sequence as EngineSequence
from inference_service.engine.plan import SchedulerLimits
from inference_service.engine.runner import Runner
from inference_service.engine.step import StepRunner
from loramux_shared.bases.memory import GB, GRAPH_BYTES
from loramux_shared.faults import ResourcesExhausted

SCRATCH_BLOCKS: Final = 8
"""Blocks of the cache that the profiled step reads and writes repeatedly: their content is irrelevant here."""
TRIED: Final = 4
"""Graphs that are recorded to see what each takes."""
LEAST_GRAPH_BYTES: Final = 1 << 20
"""Taken by a graph at least: the driver hands memory out in pieces."""


class DeviceMemory(Protocol):
    """The memory of a device, in bytes, as its driver and torch's allocator see it."""

    def settled(self) -> int:
        """Wait for the device, give the driver back what the allocator only keeps, and return what is free."""
        ...

    def reserved(self) -> int:
        """Return the bytes that the allocator has of the driver."""
        ...

    def watch_peak(self) -> None:
        """Begin to note the most that the allocator has at once."""
        ...

    def peak(self) -> int:
        """The most since `watch_peak`."""
        ...


class CudaMemory:
    """The memory of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def settled(self) -> int:
        """Wait for the device, give the driver back what the allocator only keeps, and return what is free."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)[0]

    def reserved(self) -> int:
        """Return the bytes that the allocator has of the driver."""
        return torch.cuda.memory_reserved(self._device)

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


def measure_graph(new_runner: Callable[[], Runner], memory: DeviceMemory) -> int:
    """Return the bytes that each recorded step takes, by a runner that is thrown away.

    The first one takes the memory that all share; those behind it show what each takes.
    """
    runner = new_runner()
    runner.record_one()
    before = memory.settled()
    for _ in range(TRIED):
        runner.record_one()
    return max(LEAST_GRAPH_BYTES, (before - memory.settled()) // TRIED)


def measure(new_runner: Callable[[], StepRunner], batch: Batch, memory: DeviceMemory) -> Measured:
    """Run a batch with a runner of its own, whose cache has SCRATCH_BLOCKS blocks.

    Raises:
        ResourcesExhausted: the device has not enough memory for it.
    """
    before = memory.settled()
    memory.watch_peak()
    try:
        new_runner().submit(batch).tokens()
    except torch.OutOfMemoryError as error:
        raise ResourcesExhausted(
            f"a step of {batch.num_tokens} tokens and {len(batch.chunks)} sequences, the largest, does not fit "
            f"in the {before / GB:.2f} GB that weights and adapters leave. Lower LORAMUX_MAX_BATCH_TOKENS or "
            "LORAMUX_MAX_BATCH_SEQS, or serve fewer adapters."
        ) from error
    free = memory.settled()
    return Measured(memory.peak() - memory.reserved(), before - free, free)


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
