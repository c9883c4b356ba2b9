"""Base checkpoints: which files serving needs, what they are, and how a replica gets them."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import structlog

from loramux_shared.adapter_files import ADAPTER_GGUF
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.files import CONFIG, GENERATION, GGUF_SUFFIX, INDEX, WEIGHTS, gguf_files
from loramux_shared.bases.formats import QUANTIZE, says_quantization, with_quantize
from loramux_shared.bases.logit_score import LOGIT_SCORE
from loramux_shared.bases.read import SENTENCES, read_fields
from loramux_shared.bases.splade import SPLADE
from loramux_shared.bundle.generation import BaseRecord
from loramux_shared.bundle.manifest import FileDigest
from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.faults import BundleCorrupt, CheckpointInvalid, SignatureInvalid
from loramux_shared.runtime import FILE as POOLING, PROMPTS
from loramux_shared.signatures import MAX_SIGNATURE, SIGNATURE, signatures
from loramux_shared.sources.base import Progress, Resolved, Room, Source, about, unwatched
from loramux_shared.sources.cache import alone, differs, discard, open_cache
from loramux_shared.sources.files import hash_if_there, inside, scratch, whole
from loramux_shared.sources.licence import README, licence_in, reads_readme
from loramux_shared.sources.open import Sources
from loramux_shared.untrusted_json import JsonInvalid, parse_json
from loramux_shared.wording import listed

log = structlog.get_logger()

SMALL_FILES: Final = (
    CONFIG,
    POOLING,
    LOGIT_SCORE,
    PROMPTS,
    INDEX,
    "chat_template.jinja",
    GENERATION,
    QUANTIZE,
    SENTENCES,
    SPLADE,
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
_SHARD: Final = re.compile(r"[\w.\-]+\.safetensors")
MAX_JSON: Final = 64 << 20
T = TypeVar("T")


@dataclass(frozen=True)
class Base:
    """A base checkpoint as the builder sees it."""

    record: BaseRecord
    model: ModelConfig


def describe_base(
    sources: Sources,
    repository: Repository,
    progress: Progress = unwatched,
    room: Room = unwatched,
    *,
    max_seq_len: int | None = None,
    signed_by: Sequence[str] = (),
) -> Base:
    """Resolve a base checkpoint and record every file that serving needs; weights stay where they are.

    max_seq_len is what the deployment asks for, and signed_by who is to have signed all of these files.

    Raises:
        SignatureInvalid: nobody of them has.
        CheckpointInvalid: ``config.json`` or the weights are missing or cannot be read, or the base is not
            served.
        Fault: what the source raises.
    """
    source = sources.of(repository)
    with about(repository), closing(source.resolve(repository, progress, room)) as resolved:
        if CONFIG not in resolved.files:
            cure = _gguf_cure(resolved) or "The base must be a decoder checkpoint in Hugging Face format."
            raise CheckpointInvalid(f"{_name(repository)}: expected {CONFIG}, found {_some(resolved)}. {cure}")
        fields, generation, quantize = (
            _read_json(source, resolved, name, sources.work_dir) if name in resolved.files else None
            for name in (CONFIG, GENERATION, QUANTIZE)
        )
        unused = {QUANTIZE} if says_quantization(fields or {}) else set()
        model = read_fields(with_quantize(fields or {}, quantize), generation, max_seq_len)
        names = [name for name in SMALL_FILES if name in resolved.files and name not in unused]
        names += _weights(source, resolved, sources.work_dir)
        files = source.digests(resolved, names, progress, room)
        sizes = {name: file.size for name, file in resolved.files.items()}
        beside = [README] if reads_readme(sizes) else []
        with scratch(sources.work_dir) as folder:
            read = files | source.fetch(resolved, beside, folder)
            if signed_by:
                _require_signed(source, resolved, read, signed_by, folder)
            licence = licence_in(folder, sizes)
        return Base(BaseRecord(source=source.pin(resolved, files), files=files, licence=licence), model)


@dataclass(frozen=True)
class PlacedBase:
    """A recorded base where its source put it, not yet verified: who reads a file verifies what was read."""

    record: BaseRecord
    folder: Path
    cache: Path
    """Below which files are the replica's own."""
    removed: set[str] = field(default_factory=set)
    """Files of the cache that were not those that were recorded; they can be fetched again."""

    def require(self, name: str, found: FileDigest | None) -> None:
        """Raise `BundleCorrupt` unless that is the file that was recorded; one of the cache is removed."""
        expected, path = self.record.files.get(name), inside(self.folder, name)
        if found == expected:
            return
        if expected is not None:
            with alone(self.cache):
                # Another replica may have repaired the file meanwhile.
                if not differs(path, expected) or discard(path, self.cache):
                    self.removed.add(name)
        expectation = f"sha256 {expected.sha256} ({expected.size} bytes)" if expected else "no such file"
        raise BundleCorrupt(
            f"base {_name(self.record.source)}: {name}: expected {expectation}, "
            f"found {found.sha256 if found else 'no file'}. Restore the file, or build the deployment again."
        )

    def verify(self, progress: Progress = unwatched) -> Path:
        """Return the folder once each file was verified where it is."""
        for name in self.record.files:
            self.require(name, hash_if_there(inside(self.folder, name), progress))
        return self.folder

    @contextmanager
    def small_files(self) -> Iterator[Path]:
        """Yield a folder with verified copies of all but the weights, which nobody else writes to."""
        with scratch(self.cache) as folder:
            for name in self.record.files:
                if name in SMALL_FILES:
                    with whole(folder / name) as sink:
                        found = hash_if_there(self.folder / name, unwatched, sink)
                    self.require(name, found)
            yield folder


def with_base(
    base: BaseRecord,
    into: Path,
    sources: Sources,
    use: Callable[[PlacedBase], T],
    progress: Progress = unwatched,
    room: Room = unwatched,
) -> T:
    """Have the source put the base's files in a folder, and use them; LOCAL's is its own, others' is into.

    What is there already is not downloaded again. Where use finds a file of the cache damaged, that one is
    fetched again, once, and use is called again.

    Raises:
        BundleCorrupt: a file is missing or differs, also after it was fetched once more.
        Fault: what the source and use raise.
    """
    if base.source.source is not SourceKind.LOCAL:
        open_cache(into)
    repaired: set[str] = set()
    while True:
        with alone(into, progress):
            folder = sources.of(base.source).place(base.source, base.files, into, progress, room)
        placed = PlacedBase(base, folder, into)
        try:
            return use(placed)
        except BundleCorrupt:
            if not placed.removed or placed.removed & repaired:
                raise
            log.warning(
                "files of the base differ from the record, fetching them again",
                folder=str(folder),
                files=sorted(placed.removed),
            )
            repaired |= placed.removed


def fetch_base(
    base: BaseRecord, into: Path, sources: Sources, progress: Progress = unwatched, room: Room = unwatched
) -> Path:
    """Return a folder with the base's files, each verified against its recorded digest; see `with_base`."""
    return with_base(base, into, sources, lambda placed: placed.verify(progress), progress, room)


def _weights(source: Source, resolved: Resolved, work_dir: Path | None) -> list[str]:
    """Return the names of the weight files: what the index names, else the one file."""
    if INDEX in resolved.files:
        table = _read_json(source, resolved, INDEX, work_dir).get("weight_map")
        named = {str(name) for name in table.values()} if isinstance(table, dict) else set[str]()
        shards = sorted(named)
        missing = [name for name in shards if name not in resolved.files]
        if shards and not missing and all(map(_SHARD.fullmatch, shards)):
            return shards
        raise CheckpointInvalid(f"{_name(resolved.repository)}: {INDEX} names missing files: {missing[:3]}")
    if WEIGHTS in resolved.files:
        return [WEIGHTS]
    if blocks := gguf_files(resolved.files):
        return blocks
    others = [name for name in resolved.files if _SHARD.fullmatch(name)]
    cure = _gguf_cure(resolved) or "Convert the base to safetensors; pickled weights are refused."
    raise CheckpointInvalid(
        f"{_name(resolved.repository)}: expected {WEIGHTS} or {INDEX}, found {_some(resolved)}. "
        + (f"Name {others[0]} {WEIGHTS}." if len(others) == 1 else cure)
    )


def _gguf_cure(resolved: Resolved) -> str:
    """Return how to name the first file of GGUF among others; nothing where there is none."""
    file = next((name for name in sorted(resolved.files) if name.endswith(GGUF_SUFFIX)), "")
    if file == ADAPTER_GGUF:
        return "It is an adapter of llama.cpp: name it as one, and a model as the base."
    if file and resolved.repository.source is SourceKind.HF:
        return f"A file of GGUF is named itself, as subfolder: {file}, or in one word: REPOSITORY#{file}."
    return f"A file of GGUF is named itself, of source LOCAL: FOLDER/{file}." if file else ""


def _read_json(source: Source, resolved: Resolved, name: str, work_dir: Path | None) -> dict[str, Any]:
    what = f"{_name(resolved.repository)}: {name}"
    if resolved.files[name].size > MAX_JSON:
        raise CheckpointInvalid(f"{what}: expected at most {MAX_JSON} bytes")
    with scratch(work_dir) as folder:
        source.fetch(resolved, [name], folder)
        try:
            data = parse_json((folder / name).read_bytes())
        except JsonInvalid as error:
            raise CheckpointInvalid(f"{what}: not valid JSON") from error
    if not isinstance(data, dict):
        raise CheckpointInvalid(f"{what}: expected an object, found {type(data).__name__}")
    return data


def _require_signed(
    source: Source, resolved: Resolved, files: Mapping[str, FileDigest], signers: Sequence[str], folder: Path
) -> None:
    what = f"{_name(resolved.repository)}: {SIGNATURE}"
    if SIGNATURE not in resolved.files or resolved.files[SIGNATURE].size > MAX_SIGNATURE:
        raise SignatureInvalid(f"{what}: expected a signature, found none. Sign it: `loramux sign`.")
    source.fetch(resolved, [SIGNATURE], folder)
    found = {name: file.sha256 for name, file in files.items()}
    signatures().require_signed((folder / SIGNATURE).read_bytes(), found, signers, what)


def _name(repository: Repository) -> str:
    return "/".join(part for part in (repository.label, repository.subfolder) if part)


def _some(resolved: Resolved) -> str:
    names = sorted(resolved.files)
    return listed(names, 5, none="no files")
