"""Stores with as many bundles as are wanted, made from one that the builder built."""

from __future__ import annotations

import io
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import serving
from loramux_shared.bundle.deployments import current_generation, publish_generation
from loramux_shared.bundle.generation import AdapterRecord, Generation
from loramux_shared.bundle.manifest import MANIFEST_FILE, WEIGHTS_FILE, FileDigest, bundle_key, sha256_hex
from loramux_shared.bundle.reader import read_manifest
from loramux_shared.storage.base import Store
from loramux_shared.storage.local import LocalStore

RANK = 16
SIGN = np.uint16(0x8000)


class Forge:
    """A store in a folder, with the demo's base, adapters of rank 16 on all seven modules in bfloat16.

    The first is built as the builder does. The others have its matrices with a few signs changed, so that each
    has a digest of its own and every check of a bundle holds.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self.store: Store = LocalStore(work / "store")
        self._records: list[AdapterRecord] = []
        prepare = [sys.executable, str(serving.ROOT / "examples/prepare_base.py"), str(serving.BASE)]
        subprocess.run(prepare, check=True, capture_output=True)  # noqa: S603 - our own script
        if current_generation(self.store, "bench") is None:
            names = serving.make_adapters(work / "adapters", 1, RANK)
            serving.build_deployment(work, names, f"file://{work}/store")
        built = current_generation(self.store, "bench")
        assert built is not None  # noqa: S101 - it was built
        self.built = built
        [self._template] = built.adapters.values()
        self._manifest = read_manifest(self.store, self._template.digest)
        self._weights = self.store.get(bundle_key(self._template.digest, WEIGHTS_FILE))
        self._others = {
            name: self.store.get(bundle_key(self._template.digest, name))
            for name in self._manifest.files
            if name != WEIGHTS_FILE
        }

    def records(self, count: int) -> list[AdapterRecord]:
        """Return adapters whose bundles are in the store, made where they are not there yet."""
        while len(self._records) < count:
            self._records.append(self._make(len(self._records)))
        return self._records[:count]

    def ghosts(self, first: int, count: int) -> list[AdapterRecord]:
        """Return adapters whose bundles are nowhere: they are registered, and nothing uses them."""
        return [
            self._template.model_copy(update={"digest": sha256_hex(f"ghost {number}".encode())})
            for number in range(first, first + count)
        ]

    def publish(self, deployment: str, adapters: dict[str, AdapterRecord], **fields: Any) -> Generation:
        """Make a generation of these adapters the current one of a deployment."""
        fields |= {"deployment": deployment, "adapters": adapters, "create_time": datetime.now(UTC)}
        return publish_generation(self.store, self.built.model_copy(update=fields))

    def deploy(self, deployment: str, real: int, registered: int = 0) -> list[str]:
        """Publish so many real adapters, and ghosts up to a number of all; return the real ones' names."""
        known = self.records(real)
        known += self.ghosts(real, max(0, registered - real))
        names = [f"a{number:05d}" for number in range(len(known))]
        self.publish(deployment, dict(zip(names, known, strict=True)))
        return names[:real]

    def _make(self, number: int) -> AdapterRecord:
        """Put the bundle of a number into the store, which has it already where the folder is kept."""
        data = np.frombuffer(self._weights, np.uint8).copy()
        reader = io.BytesIO(self._weights)
        np.lib.format.read_magic(reader)
        np.lib.format.read_array_header_1_0(reader)
        values = data[reader.tell() :].view(np.uint16)
        values[[place for place in range(32) if number >> place & 1]] ^= SIGN
        weights = data.tobytes()
        reported = FileDigest(size=len(weights), sha256=sha256_hex(weights))
        manifest = self._manifest.model_copy(update={"files": {**self._manifest.files, WEIGHTS_FILE: reported}})
        digest = sha256_hex(manifest.to_bytes())
        if self.store.sha256(bundle_key(digest, MANIFEST_FILE)) is None:
            for name, content in {WEIGHTS_FILE: weights, **self._others}.items():
                self.store.put(bundle_key(digest, name), content)
            self.store.put(bundle_key(digest, MANIFEST_FILE), manifest.to_bytes())
        return self._template.model_copy(update={"digest": digest, "summary": manifest.summary})
