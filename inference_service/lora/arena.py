"""The bank's memory on a CPU: addresses that are reserved at once, pages that come when they are written."""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import Final

import numpy as np
import torch
from torch import Tensor


class Arena:
    """Bytes that never move; they are zero until they are written.

    Large pages are asked for: the first copy to a place takes a quarter of the time. Pages are kept when an
    adapter leaves, for the next one would only fault them in again.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes: Final = num_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._memory = mmap.mmap(-1, max(num_bytes, mmap.PAGESIZE), flags=flags)
        with suppress(AttributeError, OSError):  # where there are none, small ones do
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = np.frombuffer(self._memory, dtype=np.uint8)
        self.address: Final[int] = self._bytes.ctypes.data

    def read(self, offset: int, num_bytes: int, dtype: torch.dtype) -> Tensor:
        """Return a view of what lies at an offset, as a flat tensor."""
        return torch.from_numpy(self._bytes[offset : offset + num_bytes]).view(dtype)

    def write(self, offset: int, values: Tensor) -> None:
        """Copy a flat tensor to an offset; the interpreter does not wait for it."""
        source = values.view(torch.uint8).numpy()
        np.copyto(self._bytes[offset : offset + len(source)], source)
