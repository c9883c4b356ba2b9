"""Host memory that a GPU copies adapters from: locked in parts, as adapters come, and used again."""

import ctypes
import mmap
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Lock
from typing import Final, TypeAlias

import structlog
import torch
from torch import Tensor

from loramux_shared.faults import ResourcesExhausted

log = structlog.get_logger()

ALIGNMENT: Final = 4096
"""Bytes: pieces begin at pages, so that no two share one."""
PART_BYTES: Final = 256 << 20
"""Memory that is locked at once, at least: tenths of a second."""

OUT_OF_MEMORY: Final = 2
"""CUDA's number of that error."""

LockPages = Callable[[int, int], int]
"""Locks the pages from an address on, of so many bytes; returns 0, or CUDA's number of an error."""
Piece: TypeAlias = tuple[int, int, int]
"""A part, and the first byte of a piece in it and the first one behind it."""


def cuda_lock_pages(address: int, num_bytes: int) -> int:
    """Register memory with CUDA, for copies that the host does not wait for.

    CUDA keeps an error for the thread that caused it, and torch would raise it at that thread's next launch.
    """
    register = torch.cuda.cudart().cudaHostRegister  # type: ignore[no-untyped-call]  # torch leaves it untyped
    with ThreadPoolExecutor(1, "lock") as thread:
        return int(thread.submit(register, address, num_bytes, 0).result())


class Slab:
    """Locked memory, in pieces that return when their tensors are gone. Calls may come from any thread.

    Torch's own locked memory is rounded up to powers of two, piece by piece, and is never given back. A piece
    lies in one part: CUDA copies from no two at once.
    """

    def __init__(self, num_bytes: int, lock_pages: LockPages = cuda_lock_pages) -> None:
        """Plan for so many bytes, and lock the first part; raise ResourcesExhausted where that fails."""
        self._left = _aligned(num_bytes)
        """Planned bytes that are in no part yet."""
        self._lock_pages = lock_pages
        self._parts: list[mmap.mmap] = []
        self._free: list[Piece] = []
        """Pieces that are free, in their order."""
        self._returned: deque[Piece] = deque()
        """Pieces whose tensors are gone: a collector that runs within `empty` may add to them."""
        self._lock = Lock()
        size = min(PART_BYTES, self._left)
        if error := self._add_part(size):
            raise ResourcesExhausted(
                f"{size:,} bytes of host memory could not be locked for adapters that left the GPU (CUDA error "
                f"{error}). Lower LORAMUX_ADAPTER_HOST_GB, or raise the container's limit of memory."
            )

    @property
    def free_bytes(self) -> int:
        """Bytes that are in no tensor, locked or to be locked."""
        with self._lock:
            self._take_back()
            return self._left + sum(end - first for _, first, end in self._free)

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return a tensor [numel] in the smallest free piece that holds it, or in a part that is locked for it.

        Where there is neither it is in memory that is not locked, from which a copy takes longer.
        """
        size = _aligned(max(1, numel * dtype.itemsize))
        with self._lock:
            piece = self._take(size)
        if piece is None:
            return torch.empty(numel, dtype=dtype)
        part, first, _ = piece
        memory = (ctypes.c_char * size).from_buffer(self._parts[part], first)
        weakref.finalize(memory, self._returned.append, piece).atexit = False
        return torch.frombuffer(memory, dtype=dtype, count=numel) if numel else torch.empty(0, dtype=dtype)

    def _take(self, size: int) -> Piece | None:
        """Return a piece of so many bytes that is free no longer; None where there is none."""
        self._take_back()
        if not (fitting := self._fitting(size)) and size <= self._left:
            part = min(-(-PART_BYTES // size) * size, self._left)  # a whole number of such pieces
            if error := self._add_part(part):
                log.warning(
                    "host memory could not be locked: other adapters are copied from memory that is not",
                    num_bytes=part,
                    cuda_error=error,
                    setting="LORAMUX_ADAPTER_HOST_GB",
                )
            fitting = self._fitting(size)
        if not fitting:
            return None
        part, first, end = min(fitting, key=lambda piece: piece[2] - piece[1])
        self._free.remove((part, first, end))
        if end - first > size:
            self._free.append((part, first + size, end))
            self._free.sort()
        return part, first, first + size

    def _fitting(self, size: int) -> list[Piece]:
        return [piece for piece in self._free if piece[2] - piece[1] >= size]

    def _add_part(self, num_bytes: int) -> int:
        """Lock a part of the plan; return 0, or CUDA's number of an error, behind which no part is tried."""
        try:
            memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:
            self._left = 0
            return OUT_OF_MEMORY
        with suppress(OSError):  # a kernel need not have them
            memory.madvise(mmap.MADV_HUGEPAGE)
        memory.madvise(mmap.MADV_DONTFORK)  # a child that copied them would move what CUDA has locked
        error = self._lock_pages(ctypes.addressof(ctypes.c_char.from_buffer(memory)), num_bytes)
        self._left = 0 if error else self._left - num_bytes
        if not error:
            self._free.append((len(self._parts), 0, num_bytes))
            self._parts.append(memory)
        return error

    def _take_back(self) -> None:
        """Make of pieces that returned, and of their free neighbours in a part, one each."""
        while self._returned:
            self._free.append(self._returned.popleft())
        self._free.sort()
        joined: list[Piece] = []
        for part, first, end in self._free:
            if joined and joined[-1][0] == part and joined[-1][2] == first:
                joined[-1] = part, joined[-1][1], end
            else:
                joined.append((part, first, end))
        self._free = joined


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
