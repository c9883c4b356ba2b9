"""The disk tier: bundles in a folder that replicas may share, verified at every read, bounded in size."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import numpy as np
import structlog

from loramux_shared.bases.memory import GB
from loramux_shared.bundle.manifest import MANIFEST_FILE, FileDigest, Manifest
from loramux_shared.bundle.npy import Bytes
from loramux_shared.bundle.reader import parse_manifest
from loramux_shared.faults import BundleCorrupt, ResourcesExhausted
from loramux_shared.process import YOUNG_S, locked
from loramux_shared.sources.cache import discard
from loramux_shared.sources.files import PART
from loramux_shared.storage.base import RECORD_BYTES

log = structlog.get_logger()

FILL_TARGET: Final = 0.9
"""Share of the bound that stays when bundles leave, so that they do not leave one by one."""
COUNT_EVERY_S: Final = 60.0
"""Other replicas write into the same folder: it is counted again after so long, when something is put."""

Verify = Callable[[Bytes, Mapping[str, FileDigest], str, str], None]
"""Raises `BundleCorrupt` unless a file's bytes are those that the manifest of a digest names."""

_NO_FILE: Final = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.ENXIO}
"""Errors of opening something that does not exist, or is no file."""
_DIGEST = re.compile(r"[0-9a-f]{64}")


def open_disk_tier(cache_dir: Path, gb: float, store_uri: str) -> DiskTier | None:
    """Return the disk tier of a replica, or None where none is wanted.

    What a store in a folder of the same file system has is read no faster from a copy.
    """
    folder = cache_dir / "bundles"
    _, local, root = store_uri.partition("file://")
    if not gb or (local and _device(Path(root)) == _device(folder)):
        return None
    return DiskTier(folder, int(gb * GB))


class DiskTier:
    """Bundles by digest, ``DIGEST/FILE`` as in a store.

    A bundle is written to a folder of another name, which its writer keeps locked, and then renamed: what is
    there under a digest was whole, also after a kill. Nothing that the disk refuses is a failure; it is logged
    once, and the bundle is not kept.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._tidying = threading.Lock()
        self._bytes = 0
        """Bytes on the disk at the last count, and what this process added since."""
        self._counted_s = -COUNT_EVERY_S
        self._refused = False

    def manifest(
        self, digest: str, parse: Callable[[bytes, str], Manifest] = parse_manifest
    ) -> Manifest | None:
        """Return the manifest of a bundle that is here, as parse reads it; a damaged bundle is removed."""
        try:
            return parse(bytes(self._read(digest, MANIFEST_FILE, RECORD_BYTES)), digest)
        except OSError as error:
            self._discard(digest, error)
        except BundleCorrupt as damage:
            self._remove_damaged(digest, damage.message)
        return None

    def files(
        self, digest: str, manifest: Manifest, names: Sequence[str], verify: Verify
    ) -> dict[str, Bytes] | None:
        """Return files of a bundle, each verified; None where one is not here. A damaged bundle is removed."""
        found: dict[str, Bytes] = {}
        try:
            for name in names:
                found[name] = self._read(digest, name, manifest.files[name].size + 1)
                verify(found[name], manifest.files, name, digest)
        except OSError as error:
            self._discard(digest, error)
        except BundleCorrupt as damage:
            self._remove_damaged(digest, damage.message)
        else:
            with suppress(OSError):  # a process that may not write here still reads
                os.utime(self._path(digest))
            return found
        return None

    def put(self, digest: str, manifest: bytes, files: Mapping[str, Bytes]) -> None:
        """Keep a bundle whose bytes were verified, and let those go that were not used for longest."""
        size = len(manifest) + sum(map(len, files.values()))
        if size > self._max_bytes * FILL_TARGET:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._writing() as part:
                for name, data in {**files, MANIFEST_FILE: manifest}.items():
                    (part / name).write_bytes(data)
                part.rename(self._path(digest))
        except OSError as error:
            self._say_once(error)
            return
        self._refused = False
        self._make_room(size)

    def sweep(self) -> None:
        """Remove what killed replicas left, and what is too much; at the start, beside other work."""
        for path in self._folder.glob(f"{PART}*"):
            with suppress(OSError, ResourcesExhausted):  # another replica may do the same
                if path.stat().st_mtime < time.time() - YOUNG_S:
                    with locked(path) as abandoned:
                        if abandoned:
                            discard(path, self._folder)
        self._make_room(0)

    def _path(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise ValueError("a digest has 64 hex digits")
        return self._folder / digest

    def _read(self, digest: str, name: str, at_most: int) -> memoryview:
        """Return a regular file's content, at most so many bytes of it, in memory that nobody else sees."""
        path = self._path(digest) / name
        with open(path, "rb", buffering=0, opener=_no_link) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", str(path))
            # np.empty, as bytearray would write zeros first.
            data = np.empty(min(found.st_size, at_most), np.uint8).data
            filled = 0
            while filled < len(data) and (count := file.readinto(data[filled:])):
                filled += count
            return data[:filled]

    @contextmanager
    def _writing(self) -> Iterator[Path]:
        """Yield a locked folder that is removed afterwards, unless it was renamed."""
        part = Path(tempfile.mkdtemp(prefix=PART, dir=self._folder))
        try:
            with locked(part):
                part.chmod(0o755)  # replicas of other users may read
                yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _say_once(self, error: OSError) -> None:
        if error.errno in {errno.ENOTEMPTY, errno.EEXIST}:  # another replica was faster
            return
        if not self._refused:
            log.warning(
                "disk cannot be written, bundles are served without the cache",
                folder=str(self._folder),
                problem=error.strerror or type(error).__name__,
                fix="free space, let the server write there, or set LORAMUX_ADAPTER_DISK_GB=0",
            )
        self._refused = True

    def _discard(self, digest: str, error: OSError) -> None:
        """Remove a bundle that lacks a file or has something else in its place; what the disk refuses stays."""
        problem = error.strerror or type(error).__name__
        if error.errno in _NO_FILE:
            self._remove_damaged(digest, problem)
        else:
            log.warning("cached bundle cannot be read", digest=digest[:12], problem=problem)

    def _remove_damaged(self, digest: str, problem: str) -> None:
        path = self._path(digest)
        if os.path.lexists(path):
            log.warning("cached bundle is damaged, removed", digest=digest[:12], problem=problem)
            self._remove(path)

    def _remove(self, path: Path) -> None:
        """Let a bundle go: at once, under another name, whatever happens before all of it is removed."""
        try:
            with self._writing() as part, suppress(FileNotFoundError):  # another replica was faster
                path.rename(part / path.name)
        except OSError as error:
            log.warning("cached bundle cannot be removed", folder=str(path), problem=error.strerror)

    def _make_room(self, added: int) -> None:
        """Count what was added; where it is too much, count everything, and remove the oldest.

        One at a time: what is put while another counts would be neither in that count nor beside it.
        """
        with self._tidying:
            now = time.monotonic()
            self._bytes += added
            if self._bytes <= self._max_bytes and now - self._counted_s <= COUNT_EVERY_S:
                return
            self._counted_s = now
            found = sorted(self._cached_files())
            self._bytes = sum(size for _, _, size in found)
            if self._bytes <= self._max_bytes:
                return
            for _, path, size in found:
                if self._bytes <= self._max_bytes * FILL_TARGET:
                    return
                self._remove(path)
                self._bytes -= size

    def _cached_files(self) -> Iterator[tuple[float, Path, int]]:
        """Yield when each bundle was used last, where it is, and its bytes."""
        with suppress(OSError):
            for path in self._folder.iterdir():
                if _DIGEST.fullmatch(path.name):
                    with suppress(OSError):
                        yield path.lstat().st_mtime, path, _size_of(path)


def _device(path: Path) -> int:
    """Return the file system that a path is on, or will be."""
    while True:
        try:
            return path.stat().st_dev
        except OSError:
            path = path.parent


def _size_of(folder: Path) -> int:
    total = 0
    with suppress(OSError), os.scandir(folder) as entries:
        total = sum(entry.stat(follow_symlinks=False).st_size for entry in entries)
    return total


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
