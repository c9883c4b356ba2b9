"""The base's own tensors, for adapters that carry copies of them; their shards are fetched when asked for."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from builder_service.domain.safetensors_header import HeaderInvalid, TensorFile, read_header
from builder_service.domain.strict_json import JsonInvalid, parse
from builder_service.pipeline.widening import Widener, can_widen
from loramux_shared.bases.formats.read import QUANTIZE
from loramux_shared.bundle.generation import BaseRecord
from loramux_shared.bundle.manifest import FileDigest
from loramux_shared.faults import BundleCorrupt, CheckpointInvalid
from loramux_shared.sources.base import Progress, Room, unwatched
from loramux_shared.sources.checkpoint import INDEX, WEIGHTS
from loramux_shared.sources.files import hash_if_there
from loramux_shared.sources.open import Sources

MAX_INDEX: Final = 64 << 20
CONFIG: Final = "config.json"


class BaseWeights:
    """Finds tensors of a recorded base; safe for several threads."""

    def __init__(
        self, base: BaseRecord, sources: Sources, cache: Path, progress: Progress, room: Room = unwatched
    ) -> None:
        self._base = base
        self._sources = sources
        self._cache = cache
        self._progress = progress
        self._room = room
        self._lock = threading.Lock()
        self._shards: dict[str, str] | None = None
        self._open: dict[str, TensorFile] = {}
        self._widener = Widener(cache.parent / "widened", lambda: progress(0))

    @property
    def files(self) -> Mapping[str, FileDigest]:
        """Return the files that were recorded when the build began, by their names."""
        return self._base.files

    def find(self, name: str) -> TensorFile | None:
        """Return the verified file that holds a tensor, or None where the base has no such tensor.

        Raises:
            BundleCorrupt: a file of the base differs from what was recorded when the build began.
            CheckpointInvalid: a file of the base is not a safetensors file or no index.
            Fault: what the source raises.
        """
        with self._lock:
            shard = self._shard_of(name)
            if shard is None or shard not in self._base.files:
                return None
            file = self._open.get(shard) or self._read(shard)
            return file if name in file.tensors else None

    def widened(self, name: str, shape: tuple[int, int]) -> TensorFile | None:
        """Return a file with a weight of few bits [out, in] in float32, which goes with the object.

        None where the base has no such weight, or torch is not installed here.

        Raises:
            CheckpointInvalid: its tensors do not go together.
            ResourcesExhausted, InternalFault: see `Widener.widen`.
            Fault: what `find` raises.
        """
        parts = self._beside(name.removesuffix("weight"))
        if not parts or not can_widen():
            return None
        for part in parts:
            self.find(part)  # find() fetches and verifies the file
        described = [self.fetch(each) for each in (CONFIG, QUANTIZE) if each in self._base.files]
        return self._widener.widen(described[0].parent, name, shape)

    def _beside(self, prefix: str) -> list[str]:
        """Return the tensors of a linear."""
        with self._lock:
            self._shard_of("")
            if self._shards is None:
                self._open[WEIGHTS] = self._open.get(WEIGHTS) or self._read(WEIGHTS)
            names = self._open[WEIGHTS].tensors if self._shards is None else self._shards
            return [name for name in names if name.startswith(prefix)]

    def _shard_of(self, name: str) -> str | None:
        if INDEX not in self._base.files:
            return WEIGHTS
        if self._shards is None:
            path = self.fetch(INDEX)
            try:
                table = parse(path.read_bytes()) if path.stat().st_size <= MAX_INDEX else None
            except JsonInvalid as error:
                raise CheckpointInvalid(f"base: {INDEX}: {error}") from error
            shards = table.get("weight_map") if isinstance(table, dict) else None
            if not isinstance(shards, dict):
                raise CheckpointInvalid(f"base: {INDEX}: expected an object with a weight_map")
            self._shards = {str(tensor): str(shard) for tensor, shard in shards.items()}
        return self._shards.get(name)

    def _read(self, shard: str) -> TensorFile:
        path = self.fetch(shard)
        try:
            file = read_header(path)
        except HeaderInvalid as error:
            raise CheckpointInvalid(f"base: {shard}: {error}") from error
        self._open[shard] = file
        return file

    def fetch(self, name: str) -> Path:
        """Return a recorded file of the base.

        Raises:
            BundleCorrupt: it differs from what was recorded when the build began.
            Fault: what the source raises.
        """
        expected = self._base.files[name]
        source = self._sources.of(self._base.source)
        folder = source.place(self._base.source, {name: expected}, self._cache, self._progress, self._room)
        path = folder / name
        if hash_if_there(path, lambda _: self._progress(0)) != expected:
            raise BundleCorrupt(
                f"base: {name} changed while the build ran: expected sha256 {expected.sha256}. Build again."
            )
        return path
