"""Bundles from where they are: the disk, where it has them, else the store; every byte is verified."""

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Final

import structlog
from blake3 import blake3

from inference_service.adapters.disk import DiskTier
from inference_service.adapters.recent import Recent
from inference_service.adapters.workers import Workers
from loramux_shared.bundle.manifest import (
    MANIFEST_FILE,
    REBUILD,
    SCORE_FILE,
    VOCABULARY_FILE,
    WEIGHTS_FILE,
    FileDigest,
    Manifest,
    ScoreHead,
    sha256_hex,
)
from loramux_shared.bundle.npy import Array, Bytes
from loramux_shared.bundle.reader import (
    Bundle,
    assemble,
    files_of,
    parse_manifest,
    read_file,
    read_score,
    texts_of,
    verify_file,
)
from loramux_shared.faults import BundleCorrupt, StoreUnavailable
from loramux_shared.storage.base import Store

log = structlog.get_logger()

REQUESTS: Final = 16
"""Files beside the weights that are asked of the store at once, for all bundles."""
MANIFESTS_BYTES: Final = 32 << 20
"""Bytes of parsed manifests that are kept, about: those of 100 adapters of a small dense base."""
PARSED: Final = 6
"""Bytes that a byte of a manifest takes once it is parsed."""
KNOWN: Final = 4096
"""Bundles whose faster digest is kept, 0.2 KB each."""
AT_ONCE_BYTES: Final = 1 << 30
"""Bytes of bundles that are read and not yet packed; a larger one is read alone."""


class Tier(StrEnum):
    """The place where an adapter was found."""

    HOST = "host"
    DISK = "disk"
    STORE = "store"


@dataclass(frozen=True)
class FoundBundle:
    """A verified bundle, and where it was."""

    bundle: Bundle
    tier: Tier
    manifest: bytes = b""
    """Manifest of a bundle from the store, which the disk keeps beside the files."""
    files: Mapping[str, Bytes] = field(default_factory=dict)


class BundleReader:
    """Reads bundles for many threads at once, within a bound of memory."""

    def __init__(self, store: Store, disk: DiskTier | None) -> None:
        self._store = store
        self._disk = disk
        self._requests = Workers("bundle-files", REQUESTS)
        self._room = _Room(AT_ONCE_BYTES)
        self._known = KnownWeights()
        self._manifests: Recent[Manifest] = Recent(MANIFESTS_BYTES)
        self._checked: Recent[bool] = Recent(KNOWN)
        if disk is not None:
            self._requests.submit(disk.sweep)

    def close(self) -> None:
        """End the threads."""
        self._requests.close()

    @contextmanager
    def reading(self, digest: str) -> Iterator[FoundBundle]:
        """Yield a bundle; its memory counts until the block ends. Raise BundleCorrupt where the store's is
        missing or damaged, and StoreUnavailable.
        """
        with ExitStack() as room:
            yield self._from_disk(digest, room) or self._from_store(digest, room)

    def _from_disk(self, digest: str, room: ExitStack) -> FoundBundle | None:
        manifest = self._disk.manifest(digest, self._parsed) if self._disk else None
        if manifest is None or self._disk is None:
            return None
        names = files_of(manifest, digest)
        room.enter_context(self._room.taken(_size(manifest)))
        files = self._disk.files(digest, manifest, names, self._known.verify)
        if files is None:
            room.close()
            return None
        return FoundBundle(self._assembled(digest, manifest, files), Tier.DISK)

    def _from_store(self, digest: str, room: ExitStack) -> FoundBundle:
        data = self._get(digest, MANIFEST_FILE)
        manifest = self._parsed(data, digest)
        names = files_of(manifest, digest)
        room.enter_context(self._room.taken(_size(manifest)))
        largest = max(names, key=lambda name: manifest.files[name].size)
        others = {
            name: self._requests.submit(partial(self._fetch, digest, manifest, name))
            for name in names
            if name != largest
        }
        files: dict[str, Bytes] = {largest: self._fetch(digest, manifest, largest)}
        files.update((name, future.result()) for name, future in others.items())
        return FoundBundle(self._assembled(digest, manifest, files), Tier.STORE, data, files)

    def _assembled(self, digest: str, manifest: Manifest, files: Mapping[str, Bytes]) -> Bundle:
        bundle = assemble(digest, manifest, files, checked=self._checked.get(digest) or False)
        self._checked.put(digest, True)
        return bundle

    def _parsed(self, data: bytes, digest: str) -> Manifest:
        """Return a manifest from its bytes, which are verified each time."""
        manifest = self._manifests.get(digest)
        if manifest is None or sha256_hex(data) != digest:
            manifest = parse_manifest(data, digest)
            self._manifests.put(digest, manifest, PARSED * len(data))
        return manifest

    def keep(self, found: FoundBundle) -> None:
        """Write a bundle of the store to the disk, where there is one."""
        if self._disk is not None and found.tier is Tier.STORE:
            self._disk.put(found.bundle.digest, found.manifest, found.files)

    def texts(self, digest: str) -> dict[str, bytes]:
        """Return a bundle's text files, without its weights; raise BundleCorrupt where one is missing or
        damaged in the store, and StoreUnavailable.
        """
        return self._some(digest, texts_of)[1]

    def score(self, digest: str) -> tuple[ScoreHead, Array]:
        """Return a bundle's score head, and its weights (labels, hidden size); raise BundleCorrupt where there
        are none, or damaged ones, and StoreUnavailable.
        """
        manifest, files = self._some(digest, lambda manifest: (SCORE_FILE,) if manifest.score else ())
        if manifest.score is None:
            raise BundleCorrupt(
                f"bundle {digest[:12]}: expected a score head, as the generation says. {REBUILD}"
            )
        return manifest.score, read_score(manifest.score, files[SCORE_FILE], digest)

    def _some(
        self, digest: str, select: Callable[[Manifest], tuple[str, ...]]
    ) -> tuple[Manifest, dict[str, bytes]]:
        """Return a bundle's manifest and some of its files, from the disk where it has them."""
        manifest = self._disk.manifest(digest, self._parsed) if self._disk else None
        if manifest is not None and self._disk is not None:
            files = self._disk.files(digest, manifest, select(manifest), self._known.verify)
            if files is not None:
                return manifest, {name: bytes(data) for name, data in files.items()}
        manifest = self._parsed(self._get(digest, MANIFEST_FILE), digest)
        return manifest, {name: bytes(self._fetch(digest, manifest, name)) for name in select(manifest)}

    def _fetch(self, digest: str, manifest: Manifest, name: str) -> bytes:
        data = self._get(digest, name, manifest.files[name].size)
        self._known.verify(data, manifest.files, name, digest)
        return data

    def _get(self, digest: str, name: str, size: int | None = None) -> bytes:
        """Return a file's bytes. Clients get what fails; the log alone says where the store is."""
        try:
            return read_file(self._store, digest, name, size)
        except (BundleCorrupt, StoreUnavailable) as fault:
            log.warning(
                "bundle cannot be read from the store", digest=digest[:12], file=name, problem=fault.message
            )
            if isinstance(fault, StoreUnavailable):
                raise fault.with_message(
                    "the store does not answer, so an adapter cannot be loaded. Retry."
                ) from fault
            raise fault.with_message(fault.message.replace(self._store.uri, "the store")) from fault


class KnownWeights:
    """Verifies files of bundles, every byte each time; for many threads.

    Half of what a load costs is sha256. Of weights that it has been right for, the BLAKE3 digest is kept in
    memory, which is as hard to meet with other bytes and takes a third of the time. Half of the cores verify at
    once, so that of many that come together the first ones are there long before the last.
    """

    def __init__(self) -> None:
        self._digests: Recent[bytes] = Recent(KNOWN)
        self._at_once = threading.Semaphore(max(1, (os.cpu_count() or 1) // 2))

    def verify(self, data: Bytes, files: Mapping[str, FileDigest], name: str, digest: str) -> None:
        """Raise `BundleCorrupt` unless a file of a bundle is the one that its manifest names."""
        if name not in (WEIGHTS_FILE, VOCABULARY_FILE):
            verify_file(data, files, name, digest)
            return
        key = f"{digest}/{name}"
        with self._at_once:
            found = blake3(data).digest()
            if self._digests.get(key) != found:
                verify_file(data, files, name, digest)
                self._digests.put(key, found)


class _Room:
    """A number of bytes that many threads share; who needs more than there is has it alone."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._free = size
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, size: int) -> Iterator[None]:
        """Wait for room, and give it back."""
        size = min(size, self._size)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()


def _size(manifest: Manifest) -> int:
    return sum(file.size for file in manifest.files.values())
