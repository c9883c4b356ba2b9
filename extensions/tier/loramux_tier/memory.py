"""Memory for blocks that left the cache: locked memory of a GPU's machine, or a file."""

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import Final

import torch
from torch import Tensor

from inference_service.lora.slab import LockPages, Slab, cuda_lock_pages

AT_ONCE: Final = 64 << 20
"""Bytes of a device's memory that copies pass through."""
MOST_PIECES: Final = 1024
"""Pieces of memory that one call of the system reads or writes, at most: IOV_MAX."""


def parts_of(layer: Sequence[Tensor], num_blocks: int) -> list[Tensor]:
    """Return a layer's keys, values and scales as bytes [pieces of a block, blocks, bytes].

    Keys and values are [kv heads, ...], and their scales [2, kv heads, ...]; all blocks' rows are behind.
    """
    heads = layer[0].shape[0]
    pieces = (heads, heads, 2 * heads)
    return [
        each.view(torch.uint8).view(count, num_blocks, -1) for each, count in zip(layer, pieces, strict=False)
    ]


def bytes_of(parts: Sequence[Tensor]) -> int:
    """Return the bytes of a block."""
    return sum(part.shape[0] * part.shape[2] for part in parts)


class BlockFile:
    """Slots in a file without a name, for a cache in the host's memory: copied by the system, piece by piece.

    The system keeps in free memory what of it was used last, as of any file.
    """

    def __init__(self, parts: Sequence[Tensor], count: int, folder: Path) -> None:
        """Take the disk's space.

        Raises:
            OSError: there is not enough of it.
        """
        self.count, self.slot_bytes = count, bytes_of(parts)
        self._pieces = [piece for part in parts for piece in part.numpy()]
        folder.mkdir(parents=True, exist_ok=True)
        self._file = TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - open as long as the replica
        os.posix_fallocate(self._file.fileno(), 0, count * self.slot_bytes)

    def write(self, blocks: Mapping[int, int]) -> None:
        """Write blocks into slots, by slot."""
        for slot, block in blocks.items():
            self._copy(os.pwritev, slot, block)

    def read(self, slots: Mapping[int, int]) -> None:
        """Read slots into blocks, by block."""
        for block, slot in slots.items():
            self._copy(os.preadv, slot, block)

    def _copy(self, call: Callable[[int, list[memoryview], int], int], slot: int, block: int) -> None:
        place, pieces = slot * self.slot_bytes, (piece[block].data for piece in self._pieces)
        while some := list(islice(pieces, MOST_PIECES)):
            size = sum(each.nbytes for each in some)
            if call(self._file.fileno(), some, place) != size:
                raise OSError(errno.EIO, f"fewer than {size} bytes of a block could be copied")
            place += size


class LockedMemory:
    """Slots in the host's locked memory, for a cache on a GPU: copies are in its stream, and not waited for."""

    def __init__(self, parts: Sequence[Tensor], count: int, lock_pages: LockPages = cuda_lock_pages) -> None:
        """Take the memory and lock it.

        Raises:
            ResourcesExhausted: the machine does not let that much be locked.
        """
        self.count, self.slot_bytes = count, bytes_of(parts)
        self._parts = parts
        self._host = Slab(count * self.slot_bytes, lock_pages).empty(count * self.slot_bytes, torch.uint8)
        self._slots = self._host.view(count, self.slot_bytes)

    def write(self, blocks: Mapping[int, int]) -> None:
        """Copy blocks into slots, by slot."""
        for slots, places in self._by_size(blocks):
            pieces = (part.index_select(1, places).transpose(0, 1).flatten(1) for part in self._parts)
            for slot, row in zip(slots, torch.cat(list(pieces), 1), strict=True):
                self._slots[slot].copy_(row, non_blocking=True)

    def read(self, slots: Mapping[int, int]) -> None:
        """Copy slots into blocks, by block."""
        for blocks, places in self._by_size({slot: block for block, slot in slots.items()}):
            rows = torch.empty(len(blocks), self.slot_bytes, dtype=torch.uint8, device=places.device)
            for slot, row in zip(blocks, rows, strict=True):
                row.copy_(self._slots[slot], non_blocking=True)
            first = 0
            for part in self._parts:
                pieces, _, width = part.shape
                columns = rows[:, first : first + pieces * width].view(len(rows), pieces, width)
                part.index_copy_(1, places, columns.transpose(0, 1))
                first += pieces * width

    def _by_size(self, blocks: Mapping[int, int]) -> Iterator[tuple[list[int], Tensor]]:
        """Yield slots, and their blocks on the device, in portions."""
        each = max(1, AT_ONCE // self.slot_bytes)
        left = iter(blocks.items())
        while some := dict(islice(left, each)):
            places = torch.tensor(list(some.values()), dtype=torch.int64)
            yield list(some), places.to(self._parts[0].device, non_blocking=True)
