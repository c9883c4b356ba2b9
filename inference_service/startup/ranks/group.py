"""The ranks that compute a decoder together, each in a process of its own: what they exchange in a step."""

import ctypes
import mmap
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from inference_service.engine.backends.native import NativeOperations
from inference_service.engine.backends.operations import Operations
from inference_service.engine.kernels.cpu.ops import CpuOps
from loramux_shared.bases.shard import Shard

PLACE: Final = 1 << 18
"""Bytes of a place in the shared memory; more rows than fit are exchanged piece by piece."""
LINE: Final = 64
INTERFACE: Final = "GLOO_SOCKET_IFNAME"
LOOPBACK: Final = "lo0" if sys.platform == "darwin" else "lo"


class Group:
    """A rank's end of the group: gloo on CPUs, NCCL on GPUs."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard

    def meet(self, meeting: Path, device: torch.device, timeout_s: float) -> None:
        """Meet the other ranks by a file that all of them see; no exchange may last longer than timeout_s.

        Raises:
            RuntimeError: a rank did not come.
        """
        shard = self.shard
        chosen = INTERFACE in os.environ
        os.environ.setdefault(INTERFACE, LOOPBACK)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=meeting.as_uri(),
            rank=shard.rank,
            world_size=shard.world,
            timeout=timedelta(seconds=timeout_s),
        )
        if not chosen:
            del os.environ[INTERFACE]
        dist.all_reduce(torch.zeros(1, device=device))  # NCCL meets here, and not while steps are recorded

    def share(self, rows: Tensor) -> None:
        """Give all ranks the rows [T, hidden] of the first one."""
        dist.broadcast(rows, src=0)

    def sum(self, partial: Tensor) -> Tensor:
        """Sum what each rank computed, in place; all have the same bits then."""
        dist.all_reduce(partial)
        return partial

    def close(self) -> None:
        """Leave the group, be the others there or not."""
        dist.destroy_process_group()


class SharedMemory:
    """Memory that all ranks have; `CpuOps.exchange` says what is in it. It has no name, so nothing is left."""

    def __init__(self, world: int, descriptor: int | None = None) -> None:
        """Make it, or map what the first rank made."""
        self.descriptor = os.memfd_create("loramux-ranks") if descriptor is None else descriptor
        size = LINE * (1 + world) + 2 * world * PLACE
        os.ftruncate(self.descriptor, size)
        self._bytes = mmap.mmap(self.descriptor, size)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._bytes))

    def end(self) -> None:
        """End the exchange that a rank waits in, and all that follow: what they exchange is void."""
        self._bytes[0] = 1

    def close(self) -> None:
        """Let go of it, once the other ranks have it."""
        os.close(self.descriptor)


class MemoryGroup:
    """A rank's end of the group on a CPU with compiled operations, which exchange rows in shared memory.

    An exchange takes microseconds where gloo takes hundreds, and is part of replayed steps.
    """

    def __init__(self, shard: Shard, ops: CpuOps, memory: SharedMemory) -> None:
        self.shard = shard
        self._ops, self._memory = ops, memory
        self._place = shard.rank, shard.world

    def meet(self, meeting: Path, device: torch.device, timeout_s: float) -> None:
        """Do nothing: the memory is there from the start."""

    def share(self, rows: Tensor) -> None:
        """Give all ranks the rows [T, hidden] of the first one."""
        self._exchange(rows, 1)

    def sum(self, partial: Tensor) -> Tensor:
        """Sum what each rank computed, in place; all have the same bits then."""
        self._exchange(partial, self.shard.world)
        return partial

    def close(self) -> None:
        """Do nothing: there is nothing to leave."""

    def _exchange(self, rows: Tensor, sources: int) -> None:
        room = PLACE // rows.dtype.itemsize
        self._ops.exchange(rows, self._memory.address, self._place, sources, room)


def group_of(shard: Shard, operations: Operations, memory: SharedMemory) -> Group | MemoryGroup:
    """Return a rank's end of the group, by what it computes with."""
    if isinstance(operations, NativeOperations):
        return MemoryGroup(shard, operations.ops, memory)
    return Group(shard)
