"""The demo's base, random adapters for it, and stores with as many bundles as are wanted."""

import io
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import numpy as np
import torch

from benchmarks.on_gpu import checkpoint
from loramux_shared.bundle.deployments import current_generation, publish_generation
from loramux_shared.bundle.generation import AdapterRecord
from loramux_shared.bundle.manifest import MANIFEST_FILE, WEIGHTS_FILE, FileDigest, bundle_key, sha256_hex
from loramux_shared.bundle.reader import read_manifest
from loramux_shared.storage.base import Store
from loramux_shared.storage.local import LocalStore

ROOT: Final = Path(__file__).resolve().parents[1]
BASE: Final = Path.home() / ".cache/loramux/models/SmolLM2-135M-Instruct"
CONTEXT: Final = 8192
RANK: Final = 16
SIGN: Final = np.uint16(0x8000)


def make_adapters(work: Path, count: int) -> list[str]:
    """Write random adapters for the demo's base, which is prepared where it is missing; return their names."""
    prepare = [sys.executable, str(ROOT / "examples/prepare_base.py"), str(BASE)]
    subprocess.run(prepare, check=True, capture_output=True)  # noqa: S603 - our own script
    shape = json.loads((BASE / "config.json").read_text())
    torch.manual_seed(0)
    names = [f"lora{index}" for index in range(count)]
    for name in names:
        checkpoint.write_adapter(work / "adapters" / name, shape, RANK, torch.device("cpu"))
    return names


def build(work: Path, deployment: str, adapters: list[str]) -> None:
    """Build some of these adapters into `work/store`."""
    checkpoint.build_deployment(work, deployment, adapters, CONTEXT, BASE)


class Forge:
    """A store with the demo's base, adapters of rank 16 on all seven modules in bfloat16.

    The first is built as the builder does. The others have its matrices with a few signs changed, so that each
    has a digest of its own and every check of a bundle holds.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self.store: Store = LocalStore(work / "store")
        self._records: list[AdapterRecord] = []
        build(work, "bench", make_adapters(work, 1))
        built = current_generation(self.store, "bench")
        assert built is not None  # noqa: S101 - it was built
        self._built = built
        [self._template] = built.adapters.values()
        self._manifest = read_manifest(self.store, self._template.digest)
        self._files = {
            name: self.store.get(bundle_key(self._template.digest, name)) for name in self._manifest.files
        }

    def deploy(self, deployment: str, real: int, registered: int = 0) -> list[str]:
        """Publish so many adapters, and beside them up to a number some whose bundles are nowhere.

        Returns the names of those that can be asked for.
        """
        while len(self._records) < real:
            self._records.append(self._make(len(self._records)))
        known = self._records[:real]
        for number in range(real, registered):
            digest = sha256_hex(f"{number}".encode())
            known.append(self._template.model_copy(update={"digest": digest}))
        names = [f"a{number:05d}" for number in range(len(known))]
        fields = {"deployment": deployment, "create_time": datetime.now(UTC)}
        fields["adapters"] = dict(zip(names, known, strict=True))
        publish_generation(self.store, self._built.model_copy(update=fields))
        return names[:real]

    def _make(self, number: int) -> AdapterRecord:
        """Put the bundle of a number into the store."""
        weights = self._files[WEIGHTS_FILE]
        data = np.frombuffer(weights, np.uint8).copy()
        reader = io.BytesIO(weights)
        np.lib.format.read_magic(reader)
        np.lib.format.read_array_header_1_0(reader)
        values = data[reader.tell() :].view(np.uint16)
        values[[place for place in range(32) if number >> place & 1]] ^= SIGN
        changed = data.tobytes()
        described = FileDigest(size=len(changed), sha256=sha256_hex(changed))
        manifest = self._manifest.model_copy(
            update={"files": {**self._manifest.files, WEIGHTS_FILE: described}}
        )
        digest = sha256_hex(manifest.to_bytes())
        files = self._files | {
            WEIGHTS_FILE: changed,
            MANIFEST_FILE: manifest.to_bytes(),
        }  # the manifest is last
        for name, content in files.items():
            self.store.put(bundle_key(digest, name), content)
        return self._template.model_copy(update={"digest": digest, "summary": manifest.summary})
