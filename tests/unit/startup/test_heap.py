"""The allocator of a replica."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

import pytest

from inference_service.startup import memory as heap


def anonymous() -> int:
    """Bytes of this process that lie in no file."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another libc")
def test_what_a_thread_freed_is_the_systems_again() -> None:
    """Pieces too small to be mapped alone are given back, though the last of them is still there."""
    heap.bound_arenas()
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    pieces: list[int] = []

    def load() -> None:
        pieces.extend(libc.malloc(60_000) for _ in range(1000))
        for piece in pieces:
            ctypes.memset(piece, 1, 60_000)
        for piece in pieces[:-1]:
            libc.free(piece)

    before = anonymous()
    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    full = anonymous()
    heap.give_back()
    libc.free(pieces[-1])
    assert full - before > 50_000_000
    assert anonymous() - before < 10_000_000
