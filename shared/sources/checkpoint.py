"""Base checkpoints: which files serving needs, what they are, and how a replica gets them."""

from __future__ import annotations

import json
import re
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog

from shared.bundle.manifest import BaseRecord
from shared.deployment import Repository, SourceKind
from shared.faults import BundleCorrupt, CheckpointInvalid
from shared.sources.base import Progress, Resolved, Room, Source, unwatched
from shared.sources.cache import alone, differs, discard, open_cache
from shared.sources.files import inside, scratch
from shared.sources.open import Sources

log = structlog.get_logger()

CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
SMALL_FILES: Final = (
    CONFIG,
    INDEX,
    "chat_template.jinja",
    "generation_config.json",
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
    config: dict[str, Any]
    """``config.json``, parsed."""


def describe_base(
    sources: Sources, repository: Repository, progress: Progress = unwatched, room: Room = unwatched
) -> Base:
    """Resolve a base checkpoint and record every file that serving needs; weights stay where they are.

    Raises:
        CheckpointInvalid: ``config.json`` or the weights are missing or cannot be read.
        Fault: what the source raises.
    """
    source = sources.of(repository)
    with closing(source.resolve(repository, progress, room)) as resolved:
        if CONFIG not in resolved.files:
            raise CheckpointInvalid(
                f"{_name(repository)}: expected {CONFIG}, found {_some(resolved)}. "
                "The base must be a decoder checkpoint in Hugging Face format."
            )
        config = _read_json(source, resolved, CONFIG, sources.work_dir)
        names = [name for name in SMALL_FILES if name in resolved.files]
        names += _weights(source, resolved, sources.work_dir)
        files = source.digests(resolved, names, progress, room)
        return Base(BaseRecord(source=source.pin(resolved, files), files=files), config)


def fetch_base(
    base: BaseRecord,
    into: Path,
    sources: Sources,
    progress: Progress = unwatched,
    room: Room = unwatched,
) -> Path:
    """Return a folder with the base's files, each verified against its recorded digest.

    LOCAL is verified where it is; other sources are downloaded below into, and what is there already is
    not downloaded again, unless it is damaged.

    Raises:
        BundleCorrupt: a file is missing or differs, also after it was fetched once more.
        Fault: what the source raises.
    """
    source, wrong = sources.of(base.source), dict[str, str]()
    if base.source.source is not SourceKind.LOCAL:
        open_cache(into)
    for _ in range(2):
        with alone(into, progress):
            folder = source.place(base.source, base.files, into, progress, room)
        paths = {name: inside(folder, name) for name in base.files}
        found = {name: differs(path, base.files[name], progress) for name, path in paths.items()}
        wrong = {name: problem for name, problem in found.items() if problem}
        if not wrong:
            return folder
        log.warning("files of the base differ", folder=str(folder), files=sorted(wrong))
        with alone(into, progress):  # another replica may have mended them meanwhile
            still = [paths[name] for name in wrong if differs(paths[name], base.files[name], progress)]
            if not all(discard(path, into) for path in still):
                break
    name = next(iter(wrong))
    raise BundleCorrupt(
        f"base {_name(base.source)}: {name}: expected sha256 {base.files[name].sha256} "
        f"({base.files[name].size} bytes), found {wrong[name]}. Restore the file, or build the deployment "
        "again."
    )


def _weights(source: Source, resolved: Resolved, work_dir: Path | None) -> list[str]:
    """Return the names of the weight files: what the index names, else the one file."""
    if INDEX in resolved.files:
        table = _read_json(source, resolved, INDEX, work_dir).get("weight_map")
        named = {str(name) for name in table.values()} if isinstance(table, dict) else set[str]()
        shards = sorted(named)
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
