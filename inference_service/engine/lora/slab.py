"""Host memory that a GPU copies adapters from: locked once, in one piece, and used again."""

import ctypes
import mmap
import weakref
from collections import deque
from collections.abc import Callable
from threading import Lock
from typing import Final

import torch
from torch import Tensor

from loramux_shared.faults import ResourcesExhausted

ALIGNMENT: Final = 4096
"""Bytes: pieces begin at pages, so that no two share one."""

LockPages = Callable[[int, int], int]
"""Locks the pages from an address on, of so many bytes; returns 0, or CUDA's number of an error."""


def cuda_lock_pages(address: int, num_bytes: int) -> int:
    """Register memory with CUDA, for copies that the host does not wait for."""
    return int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0))  # type: ignore[no-untyped-call]  # torch leaves it untyped


class Slab:
    """Locked memory, in pieces that return when their tensors are gone. Calls may come from any thread.

    Torch's own locked memory is rounded up to powers of two, piece by piece, and is never given back.
    """

    def __init__(self, num_bytes: int, lock_pages: LockPages = cuda_lock_pages) -> None:
        """Take the memory and lock it; raise ResourcesExhausted where the machine does not lock so much."""
        size = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        self._memory = mmap.mmap(-1, size)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        error = lock_pages(address, size)
        if error:
            raise ResourcesExhausted(
                f"{size:,} bytes of host memory could not be locked for adapters that left the GPU (CUDA error "
                f"{error}). Lower LORAMUX_ADAPTER_HOST_GB, or raise the container's limit of memory."
            )
        self._free: list[tuple[int, int]] = [(0, size)]
        """First and last byte of the pieces that are free, in their order."""
        self._returned: deque[tuple[int, int]] = deque()
        """Pieces whose tensors are gone: a collector that runs within `empty` may add to them."""
        self._lock = Lock()

    @property
    def free_bytes(self) -> int:
        """Bytes that are in no tensor."""
        with self._lock:
            self._take_back()
            return sum(end - first for first, end in self._free)

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return a tensor [numel] in the smallest free piece that holds it.

        Where there is none it is in memory that is not locked, from which a copy takes longer.
        """
        size = -(-max(1, numel * dtype.itemsize) // ALIGNMENT) * ALIGNMENT
        with self._lock:
            self._take_back()
            fitting = [piece for piece in self._free if piece[1] - piece[0] >= size]
            if not fitting:
                return torch.empty(numel, dtype=dtype)
            first, end = min(fitting, key=lambda piece: piece[1] - piece[0])
            self._free.remove((first, end))
            if end - first > size:
                self._free.append((first + size, end))
                self._free.sort()
        piece = (ctypes.c_char * size).from_buffer(self._memory, first)
        weakref.finalize(piece, self._returned.append, (first, first + size)).atexit = False
        return torch.frombuffer(piece, dtype=dtype, count=numel) if numel else torch.empty(0, dtype=dtype)

    def _take_back(self) -> None:
        """Make of pieces that returned, and of their free neighbours, one each."""
        while self._returned:
            self._free.append(self._returned.popleft())
        self._free.sort()
        joined: list[tuple[int, int]] = []
        for first, end in self._free:
            if joined and joined[-1][1] == first:
                joined[-1] = joined[-1][0], end
            else:
                joined.append((first, end))
        self._free = joined
