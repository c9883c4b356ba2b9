"""The context that all builds of a process share: its folders, and the room on the disk for what they write."""

import fcntl
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TextIO

from builder_service.pipeline.base_weights import KnownBases
from loramux_shared.faults import ResourcesExhausted
from loramux_shared.sources.base import Room
from loramux_shared.sources.open import Sources
from loramux_shared.storage.base import Store

RESERVE_BYTES: Final = 256 << 20
"""Bytes of the disk that stay free for others."""

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
        """Keep bytes free for what is written inside; raise ResourcesExhausted where there are fewer."""
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


PREFIX: Final = "loramux-build-"
LEFTOVER_S: Final = 24 * 3600
"""A folder that was not touched for so long belongs to a builder that was killed."""


@dataclass(frozen=True)
class BuildContext:
    """The sources, stores and folders of builds."""

    store: Store
    sources: Sources
    work_dir: Path | None = None
    """Holds one folder per build; the system's temporary folder when not given."""
    parallel_adapters: int = 4
    """Adapters of one build that are worked on at once."""
    max_build_bytes: int | None = None
    """Bytes that one build may write into its folder."""
    owner: str = ""
    """Owner of the folders: an owner that starts again removes those of its killed predecessor."""
    compute: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(os.cpu_count() or 1))
    """Bounds the computations of all builds: more than there are cores would hinder each other."""
    heavy: threading.Lock = field(default_factory=threading.Lock)
    """Held while a build needs memory for large tensors."""
    bases: KnownBases = field(default_factory=KnownBases)
    """Descriptions of the bases of earlier builds."""
    _publishing: dict[str, threading.Lock] = field(default_factory=dict)
    _ledger: Ledger = field(default_factory=Ledger)

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A folder for one build, removed at its end whatever happens."""
        with tempfile.TemporaryDirectory(prefix=self._prefix, dir=self.place()) as name:
            yield Path(name)

    @contextmanager
    def publishing(self, deployment: str) -> Iterator[None]:
        """Let changes of a deployment that exists follow each other here, rather than meet in the store."""
        with self._publishing.setdefault(deployment, threading.Lock()):
            yield

    def space(self, folder: Path) -> Space:
        """Return what a build may write into its folder."""
        return Space(folder, self._ledger, self.max_build_bytes)

    def sweep(self) -> None:
        """Remove the folders that killed builders left: those of this owner, and old ones."""
        for path in self.place().glob(f"{PREFIX}*"):
            mine = bool(self.owner) and path.name.startswith(self._prefix)
            if path.is_dir() and (mine or path.stat().st_mtime < time.time() - LEFTOVER_S):
                shutil.rmtree(path, ignore_errors=True)

    @property
    def _prefix(self) -> str:
        return f"{PREFIX}{self.owner}-" if self.owner else PREFIX

    def place(self) -> Path:
        """Return the folder of the builds' folders; raise ResourcesExhausted where there can be none."""
        place = self.work_dir or Path(tempfile.gettempdir())
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(place, error) from error
        return place


def _unusable(folder: Path, error: OSError) -> ResourcesExhausted:
    problem = f"{error.strerror}. Set LORAMUX_WORK_DIR to a folder that can be written."
    return ResourcesExhausted(f"the builder's work folder {folder}: {problem}")


MAX_BUILDERS: Final = 100
"""Builders that share one work folder."""


@dataclass(frozen=True)
class Identity:
    """A name that no other living builder has; it is free again when the process ends, however it ends."""

    name: str
    file: TextIO
    """Locked while the builder lives."""


def claim_identity(folder: Path) -> Identity:
    """Return the first identity of a work folder that no living builder has. Raise ResourcesExhausted where the
    folder cannot be written, or all of them are taken.
    """
    for slot in range(MAX_BUILDERS):
        try:
            file = (folder / f"loramux-builder-{slot}.id").open("a+")
        except PermissionError:  # another user's
            continue
        except OSError as error:
            raise _unusable(folder, error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        return Identity(_name_in(file), file)
    raise ResourcesExhausted(
        f"the builder's work folder {folder}: no place for another builder. Set LORAMUX_WORK_DIR."
    )


def _name_in(file: TextIO) -> str:
    file.seek(0)
    name = file.read()
    if not re.fullmatch(r"[0-9a-f]{16}", name):  # a new file, or a write that was killed
        name = secrets.token_hex(8)
        file.truncate(0)
        file.write(name)
        file.flush()
    return name
