"""Room on the disk for what builds write, asked for before it is written."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from shared.faults import ResourcesExhausted

RESERVE_BYTES: Final = 256 << 20
"""Stays free for everything else on the disk."""


@dataclass
class Ledger:
    """What all builds of this process have announced and not written yet."""

    outstanding: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Space:
    """The part of the disk that one build may use."""

    def __init__(self, folder: Path, ledger: Ledger, max_bytes: int | None) -> None:
        self._folder = folder
        self._ledger = ledger
        self._max_bytes = max_bytes
        self._written = 0

    def check(self, size: int, what: str) -> None:
        """Raise `ResourcesExhausted`, with the numbers, unless so many bytes more can be written."""
        with self._ledger.lock:
            self._check(size, what)

    def spend(self, size: int, what: str) -> None:
        """Count bytes that were written already.

        Raises:
            ResourcesExhausted: they are more than the build may write.
        """
        with self._ledger.lock:
            self._written += size
            self._check(0, what)

    @contextmanager
    def writing(self, size: int, what: str) -> Iterator[None]:
        """Keep so many bytes free for what is written inside.

        Raises:
            ResourcesExhausted: there are not as many.
        """
        with self._ledger.lock:
            self._check(size, what)
            self._written += size
            self._ledger.outstanding += size
        try:
            yield
        finally:
            with self._ledger.lock:
                self._ledger.outstanding -= size

    def _check(self, size: int, what: str) -> None:
        if self._max_bytes is not None and self._written + size > self._max_bytes:
            raise ResourcesExhausted(
                f"{what}: {size} bytes, and {self._written} were written; a build may write {self._max_bytes}. "
                "Build fewer adapters at once, or raise LORAMUX_MAX_BUILD_GB."
            )
        free = shutil.disk_usage(self._folder).free - self._ledger.outstanding - RESERVE_BYTES
        if size > free:
            raise ResourcesExhausted(
                f"{what}: {size} bytes, and {max(free, 0)} are free in the builder's work folder. "
                "Free some space, or set LORAMUX_WORK_DIR."
            )
