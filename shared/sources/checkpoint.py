"""Base checkpoints: which files serving needs, what they are, and how a replica gets them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from shared.bases.config import ModelConfig
from shared.bases.read import read_fields
from shared.bundle.manifest import BaseRecord, FileDigest
from shared.deployment import Repository
from shared.faults import BundleCorrupt, CheckpointInvalid
from shared.sources.base import Progress, Resolved, Source, unwatched
from shared.sources.files import hash_file, hash_pieces, pieces_of, scratch, whole
from shared.sources.open import Sources

CONFIG: Final = "config.json"
GENERATION: Final = "generation_config.json"
WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
SMALL_FILES: Final = (
    CONFIG,
    INDEX,
    "chat_template.jinja",
    GENERATION,
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
_SHARD: Final = re.compile(r"[\w.\-]+\.safetensors")
MAX_JSON: Final = 64 << 20


@dataclass(frozen=True)
class Base:
    """A base checkpoint as the builder sees it."""

    record: BaseRecord
    model: ModelConfig


def describe_base(
    sources: Sources,
    repository: Repository,
    progress: Progress = unwatched,
    *,
    max_seq_len: int | None = None,
) -> Base:
    """Resolve a base checkpoint and record every file that serving needs; weights stay where they are.

    max_seq_len is what the deployment asks for.

    Raises:
        CheckpointInvalid: ``config.json`` or the weights are missing or cannot be read, or the base is not
            served.
        Fault: what the source raises.
    """
    source = sources.of(repository)
    resolved = source.resolve(repository, progress)
    if CONFIG not in resolved.files:
        raise CheckpointInvalid(
            f"{_name(repository)}: expected {CONFIG}, found {_some(resolved)}. "
            "The base must be a decoder checkpoint in Hugging Face format."
        )
    generation = GENERATION in resolved.files
    model = read_fields(
        _read_json(source, resolved, CONFIG, sources.work_dir),
        _read_json(source, resolved, GENERATION, sources.work_dir) if generation else None,
        max_seq_len,
    )
    names = [name for name in SMALL_FILES if name in resolved.files]
    files = source.digests(resolved, [*names, *_weights(source, resolved, sources.work_dir)], progress)
    return Base(BaseRecord(source=source.pin(resolved, files), files=files), model)


@dataclass(frozen=True)
class PlacedBase:
    """A recorded base where its source put it, not yet verified: who reads a file verifies what was read."""

    record: BaseRecord
    folder: Path
    cache: Path
    """Below which files are the replica's own."""

    def require(self, name: str, found: FileDigest | None) -> None:
        """Raise `BundleCorrupt` unless that is the file that was recorded; a downloaded one is removed."""
        expected, path = self.record.files.get(name), self.folder / name
        if expected is not None and found == expected:
            return
        if path.is_file() and path.resolve().is_relative_to(self.cache.resolve()):
            path.unlink()
        wanted = f"sha256 {expected.sha256} ({expected.size} bytes)" if expected else "no such file"
        raise BundleCorrupt(
            f"base {_name(self.record.source)}: {name}: expected {wanted}, "
            f"found {found.sha256 if found else 'no file'}. Restore the file, or build the deployment again."
        )

    @contextmanager
    def small_files(self) -> Iterator[Path]:
        """Yield a folder with verified copies of all but the weights, which nobody else writes to."""
        with scratch(self.cache) as folder:
            for name in self.record.files:
                if name in SMALL_FILES:
                    path = self.folder / name
                    if not path.is_file():
                        self.require(name, None)
                    with whole(folder / name) as sink:
                        found = hash_pieces(pieces_of(path), unwatched, sink)
                    self.require(name, found)
            yield folder


def place_base(base: BaseRecord, into: Path, sources: Sources, progress: Progress = unwatched) -> PlacedBase:
    """Have the source put the base's files in a folder: LOCAL's is its own, others download below into.

    What is there already is not downloaded again.

    Raises:
        BundleCorrupt: the record names a file outside the repository.
        Fault: what the source raises.
    """
    for name in base.files:
        if name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise BundleCorrupt(f"base {_name(base.source)}: {name!r} is no path inside the repository")
    return PlacedBase(base, sources.of(base.source).place(base.source, base.files, into, progress), into)


def fetch_base(base: BaseRecord, into: Path, sources: Sources, progress: Progress = unwatched) -> Path:
    """Return a folder with the base's files, each verified against its recorded digest where it is.

    Raises:
        BundleCorrupt: a file is missing or differs; a downloaded one is removed, so that a retry fetches it.
        Fault: what the source raises.
    """
    placed = place_base(base, into, sources, progress)
    for name in base.files:
        path = placed.folder / name
        placed.require(name, hash_file(path) if path.is_file() else None)
    return placed.folder


def _weights(source: Source, resolved: Resolved, work_dir: Path | None) -> list[str]:
    """Return the names of the weight files: what the index names, else the one file."""
    if INDEX in resolved.files:
        table = _read_json(source, resolved, INDEX, work_dir).get("weight_map")
        shards = sorted(set(table.values())) if isinstance(table, dict) else []
        missing = [name for name in shards if name not in resolved.files]
        if shards and not missing and all(map(_SHARD.fullmatch, shards)):
            return shards
        raise CheckpointInvalid(
            f"{_name(resolved.repository)}: {INDEX} names files that are not there: {missing[:3]}"
        )
    if WEIGHTS in resolved.files:
        return [WEIGHTS]
    raise CheckpointInvalid(
        f"{_name(resolved.repository)}: expected {WEIGHTS} or {INDEX}, found {_some(resolved)}. "
        "Convert the base to safetensors; pickled weights are refused."
    )


def _read_json(source: Source, resolved: Resolved, name: str, work_dir: Path | None) -> dict[str, Any]:
    what = f"{_name(resolved.repository)}: {name}"
    if resolved.files[name].size > MAX_JSON:
        raise CheckpointInvalid(f"{what}: expected at most {MAX_JSON} bytes")
    with scratch(work_dir) as folder:
        source.fetch(resolved, [name], folder)
        try:
            data = json.loads((folder / name).read_bytes())
        except (ValueError, RecursionError) as error:
            raise CheckpointInvalid(f"{what}: not valid JSON") from error
    if not isinstance(data, dict):
        raise CheckpointInvalid(f"{what}: expected an object, found {type(data).__name__}")
    return data


def _name(repository: Repository) -> str:
    return "/".join(part for part in (repository.shown, repository.subfolder) if part)


def _some(resolved: Resolved) -> str:
    names = sorted(resolved.files)
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "no files"
