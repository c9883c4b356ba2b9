"""The C library's allocator: how threads share memory; nothing happens where it is not glibc's."""

from __future__ import annotations

import ctypes
from typing import Final

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
