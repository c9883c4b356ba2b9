"""Room on the disk for what builds write, asked for before it is written."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from loramux_shared.faults import ResourcesExhausted
from loramux_shared.sources.base import Room

RESERVE_BYTES: Final = 256 << 20
"""Stays free for everything else on the disk."""

BASE_FILES: Final = "files of the base"
"""Name for messages of the files that a build writes of its base."""


@dataclass
class Ledger:
    """The bytes that all builds of this process have announced and not written yet."""

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

    def room(self, what: str) -> Room:
        """Return what counts bytes that are about to be written and stay; raises as `check` does."""

        def take(size: int) -> None:
            with self._ledger.lock:
                self._check(size, what)
                self._written += size

        return take

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
        free, promised = shutil.disk_usage(self._folder).free, self._ledger.outstanding
        needed = size + promised + RESERVE_BYTES
        if needed > free:
            raise ResourcesExhausted(
                f"{what}: {size} bytes; with {promised} that running builds are about to write and "
                f"{RESERVE_BYTES} that stay free for others, the disk of the builder's work folder needs "
                f"{needed} free bytes and has {free}. Free {needed - free}, or set LORAMUX_WORK_DIR to a "
                "folder on a larger disk."
            )
