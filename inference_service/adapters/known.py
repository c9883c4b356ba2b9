"""Weights that were verified once are known again by a faster digest."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Final

from blake3 import blake3

from inference_service.adapters.recent import Recent
from loramux_shared.bundle.manifest import VOCABULARY_FILE, WEIGHTS_FILE, FileDigest
from loramux_shared.bundle.npy import Bytes
from loramux_shared.bundle.reader import verify_file

KNOWN: Final = 4096
"""Bundles whose faster digest is kept, 0.2 KB each."""


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
