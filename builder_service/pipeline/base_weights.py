"""The base's own tensors, for adapters that carry copies of them; their shards are fetched when asked for.

Bases as they were recorded are read again without a look at their weights.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

from builder_service.domain.gguf_tensors import read_tensors
from builder_service.domain.safetensors_header import HeaderInvalid, TensorFile, read_header
from builder_service.pipeline.widener import Widener, open_widener
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.files import CONFIG, GENERATION, INDEX, WEIGHTS, gguf_files
from loramux_shared.bases.formats import QUANTIZE, with_quantize
from loramux_shared.bases.read import read_fields
from loramux_shared.bundle.generation import BaseRecord
from loramux_shared.bundle.manifest import FileDigest
from loramux_shared.faults import BundleCorrupt, CheckpointInvalid
from loramux_shared.sources.base import Progress, Room, unwatched
from loramux_shared.sources.checkpoint import Base
from loramux_shared.sources.files import hash_if_there
from loramux_shared.sources.open import Sources
from loramux_shared.untrusted_json import JsonInvalid, parse_json, parse_strict_json

MAX_INDEX: Final = 64 << 20


class BaseWeights:
    """Finds tensors of a recorded base; safe for several threads."""

    def __init__(
        self, base: BaseRecord, sources: Sources, cache: Path, progress: Progress, room: Room = unwatched
    ) -> None:
        self._base = base
        self._blocks = gguf_files(base.files)
        self._sources = sources
        self._cache = cache
        self._progress = progress
        self._room = room
        self._lock = threading.Lock()
        self._shards: dict[str, str] | None = None
        self._open: dict[str, TensorFile] = {}
        self._widener: Widener | None = None

    @property
    def files(self) -> Mapping[str, FileDigest]:
        """Return the files that were recorded when the build began, by their names."""
        return self._base.files

    def find(self, name: str) -> TensorFile | None:
        """Return the verified file that holds a tensor, or None where the base has no such tensor.

        Raises:
            BundleCorrupt: a file of the base differs from what was recorded when the build began.
            CheckpointInvalid: a file of the base is not a safetensors file, no file of GGUF, or no index.
            Fault: what the source raises.
        """
        with self._lock:
            shard = self._shard_of(name)
            if shard is None or shard not in self._base.files:
                return None
            file = self._open.get(shard) or self._read(shard)
            return file if name in file.tensors else None

    def widen(self, name: str, shape: tuple[int, int]) -> TensorFile | None:
        """Return a file with a weight of few bits [out, in] in float32, which goes with the object.

        None where the base has no such weight, or torch is not installed here.

        Raises:
            CheckpointInvalid: its tensors do not go together.
            ResourcesExhausted, InternalFault: the process that widens it failed.
            Fault: what `find` raises.
        """
        parts = [name] if self._blocks else self._beside(name.removesuffix("weight"))
        if not parts or (widener := self._open_widener()) is None:
            return None
        for part in parts:
            self.find(part)  # find() fetches and verifies the file
        described = [self.fetch(each) for each in (CONFIG, QUANTIZE) if each in self._base.files]
        return widener.widen(described[0].parent, name, shape)

    def _open_widener(self) -> Widener | None:
        """Return the process that widens weights, one for this base; None where there is none."""
        with self._lock:
            if self._widener is None:
                self._widener = open_widener(self._cache.parent / "widened", lambda: self._progress(0))
            return self._widener

    def _beside(self, prefix: str) -> list[str]:
        with self._lock:
            self._shard_of("")
            if self._shards is None:
                self._open[WEIGHTS] = self._open.get(WEIGHTS) or self._read(WEIGHTS)
            names = self._open[WEIGHTS].tensors if self._shards is None else self._shards
            return [name for name in names if name.startswith(prefix)]

    def _shard_of(self, name: str) -> str | None:
        if INDEX not in self._base.files:
            return self._part_of(name) if self._blocks else WEIGHTS
        if self._shards is None:
            path = self.fetch(INDEX)
            try:
                table = parse_strict_json(path.read_bytes()) if path.stat().st_size <= MAX_INDEX else None
            except JsonInvalid as error:
                raise CheckpointInvalid(f"base: {INDEX}: {error}") from error
            shards = table.get("weight_map") if isinstance(table, dict) else None
            if not isinstance(shards, dict):
                raise CheckpointInvalid(f"base: {INDEX}: expected an object with a weight_map")
            self._shards = {str(tensor): str(shard) for tensor, shard in shards.items()}
        return self._shards.get(name)

    def _part_of(self, name: str) -> str | None:
        """Return the file of GGUF that has a whole tensor; None where all that have been opened lack it."""
        opened = ((part, self._open.get(part) or self._read(part)) for part in self._blocks)
        return next((part for part, file in opened if name in file.tensors), None)

    def _read(self, shard: str) -> TensorFile:
        path = self.fetch(shard)
        try:
            file: TensorFile = read_tensors(path) if shard in self._blocks else read_header(path)
        except HeaderInvalid as error:
            raise CheckpointInvalid(f"base: {shard}: {error}") from error
        self._open[shard] = file
        return file

    def fetch(self, name: str) -> Path:
        """Return a recorded file of the base. Raise BundleCorrupt where it differs from what was recorded when
        the build began, and what the source does.
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


MAX_KNOWN_CONFIGS: Final = 64
"""Configs that are remembered; one is a few KB."""

CONFIGS: Final = (CONFIG, GENERATION, QUANTIZE)
"""Files that describe a base."""

_Key: TypeAlias = tuple[tuple[str, ...], int | None]


class KnownBases:
    """Remembers the configs of bases by their digests; safe for several threads."""

    def __init__(self) -> None:
        self._models: OrderedDict[_Key, ModelConfig] = OrderedDict()
        self._lock = threading.Lock()

    def remember(self, base: Base, max_seq_len: int | None) -> None:
        """Keep what was read of a base."""
        with self._lock:
            self._models[_key(base.record, max_seq_len)] = base.model
            while len(self._models) > MAX_KNOWN_CONFIGS:
                self._models.popitem(last=False)

    def recall(self, record: BaseRecord, max_seq_len: int | None, weights: BaseWeights) -> Base:
        """Return a recorded base; its configs are fetched where they were not read before.

        Raises:
            BundleCorrupt: a config is not the recorded one any more.
            CheckpointInvalid: this release does not serve the base.
            Fault: what its source raises.
        """
        with self._lock:
            known = self._models.get(_key(record, max_seq_len))
        if known is not None:
            return Base(record, known)
        fields, generation, quantize = (
            _fields(weights, name) if name in record.files else None for name in CONFIGS
        )
        model = read_fields(with_quantize(fields or {}, quantize), generation, max_seq_len)
        base = Base(record, model)
        self.remember(base, max_seq_len)
        return base


def _key(record: BaseRecord, max_seq_len: int | None) -> _Key:
    digests = [record.files[name].sha256 if name in record.files else "" for name in CONFIGS]
    return tuple(digests), max_seq_len


def _fields(weights: BaseWeights, name: str) -> dict[str, Any]:
    fields: dict[str, Any] = parse_json(weights.fetch(name).read_bytes())
    return fields
