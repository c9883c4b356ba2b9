"""The base's own tensors, for adapters that carry copies of them; their shards are fetched when asked for.

Weights of few bits are widened by a process of its own where torch is: the builder never imports it. Bases as
they were recorded are read again without a look at their weights.
"""

from __future__ import annotations

import importlib.util
import json
import select
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Final, TypeAlias

from builder_service.domain.safetensors_header import HeaderInvalid, TensorFile, read_header
from builder_service.domain.strict_json import JsonInvalid, parse
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.formats import QUANTIZE, with_quantize
from loramux_shared.bases.read import read_fields
from loramux_shared.bundle.generation import BaseRecord
from loramux_shared.bundle.manifest import FileDigest
from loramux_shared.extensions import PARTS, find_extensions
from loramux_shared.faults import FAULTS, BundleCorrupt, CheckpointInvalid, InternalFault, ResourcesExhausted
from loramux_shared.sources.base import Progress, Room, unwatched
from loramux_shared.sources.checkpoint import CONFIG, GENERATION, INDEX, WEIGHTS, Base
from loramux_shared.sources.files import hash_if_there
from loramux_shared.sources.open import Sources

NEEDS: Final = ("torch", "inference_service")
MODULE: Final = "loramux_lowbit.widen"
LIMIT_S: Final = 600.0
"""For one weight, the start of the process included; a large one takes a second."""
POLL_S: Final = 0.5


def can_widen() -> bool:
    """Return True if the packages that it takes are installed here."""
    there = all(importlib.util.find_spec(name) is not None for name in NEEDS)
    return there and "lowbit" in find_extensions(PARTS)


class Widener:
    """Widens weights of a base one by one, for several threads, in a process that lives as long as this."""

    def __init__(self, work: Path, check: Callable[[], None]) -> None:
        """Write into a work folder; check raises what the build was asked to end with."""
        self._work = work
        self._check = check
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None

    def widen(self, base: Path, name: str, shape: tuple[int, int]) -> TensorFile:
        """Return a file with a weight in float32, which goes with the object.

        Raises:
            CheckpointInvalid: there is none of this name and shape, or its tensors do not go together.
            ResourcesExhausted: it takes too long, or the process was killed.
            InternalFault: the process failed.
        """
        path = self._work / "widened.safetensors"
        request = {"base": str(base), "name": name, "shape": shape, "into": str(path)}
        with self._lock:
            self._work.mkdir(parents=True, exist_ok=True)
            answer = self._ask(json.dumps(request).encode() + b"\n")
            if fault := answer.get("fault"):
                raise FAULTS.get(fault["reason"], InternalFault)(f"base: {fault['message']}")
            file = read_header(path)
            file.detach()
        return file

    def _ask(self, line: bytes) -> dict[str, Any]:
        process = self._process = self._process or self._started()
        if process.stdin is None or process.stdout is None:
            raise InternalFault("widening a base: the process has no pipes. Please report it.")
        begin = time.monotonic()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            while not select.select([process.stdout], [], [], POLL_S)[0]:
                self._check()
                if time.monotonic() - begin > LIMIT_S:
                    raise ResourcesExhausted(f"widening a weight takes more than {LIMIT_S:g} s here")
            reply = process.stdout.readline()
        except BrokenPipeError:
            reply = b""
        if reply:
            answer: dict[str, Any] = json.loads(reply)
            return answer
        self._process = None
        if (status := process.wait()) < 0:
            raise ResourcesExhausted(f"widening a base: the process was killed by signal {-status}")
        raise InternalFault(f"widening a base: the process ended with {status}: {self._last_words()}")

    def _last_words(self) -> str:
        if self._errors is None:
            return ""
        self._errors.seek(0)
        last = self._errors.read()[-512:].decode(errors="replace").strip().rpartition("\n")[2]
        return f"{last}. Please report it."

    def _started(self) -> subprocess.Popen[bytes]:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        process = subprocess.Popen(  # noqa: S603 - this interpreter, and a module of ours
            [sys.executable, "-m", MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        weakref.finalize(self, _end, process)
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process, which also ends by itself when its stdin is closed."""
    process.kill()
    process.communicate()


MAX_INDEX: Final = 64 << 20


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


MOST: Final = 64
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
            while len(self._models) > MOST:
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
    fields: dict[str, Any] = json.loads(weights.fetch(name).read_bytes())
    return fields
