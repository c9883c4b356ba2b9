"""Adapters that a build reuses from the served generation: they are neither fetched nor converted."""

import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import structlog

from builder_service.domain.origin import origin_warnings
from builder_service.domain.rules.files import extra_files
from builder_service.domain.rules.tensors import AdapterLimits
from builder_service.pipeline.fetch import ListedAdapter, recorded
from builder_service.pipeline.progress import Progress
from loramux_shared.bundle.generation import CONVERTER, AdapterRecord, BaseRecord, Generation
from loramux_shared.bundle.manifest import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, bundle_key
from loramux_shared.bundle.reader import read_manifest
from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.faults import BundleCorrupt, Finding
from loramux_shared.sources.entries import pinned_revision
from loramux_shared.storage.base import Store

log = structlog.get_logger()

MAX_PARALLEL_REQUESTS: Final = 16
"""Bundles that are looked at at once: each look is a request."""
Place: TypeAlias = tuple[SourceKind, str, str, str | None]
"""Kind, address and folder of a repository, with what says its state."""


@dataclass(frozen=True)
class ReusedAdapter:
    """An adapter that stays as it was."""

    name: str
    record: AdapterRecord
    warnings: tuple[Finding, ...] = ()
    """About files of its repository that are not used."""


class Moved(Exception):
    """The newest generation is no longer the one that adapters were made for."""


@dataclass
class ReusableAdapters:
    """The adapters of the served generation that a build with the same base and settings may reuse."""

    before: Generation | None
    """The served generation; None where none of its adapters may be reused by its source."""
    fixed: Mapping[str, AdapterRecord] = field(default_factory=dict)
    """Adapters that stay as they are, whatever their sources say now."""
    _by_revision: dict[Place, AdapterRecord] = field(default_factory=dict)
    _by_listing: dict[Place, AdapterRecord] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for record in self.before.adapters.values() if self.before else ():
            if record.converter == CONVERTER and record.summary is not None:
                self._by_revision[_place(record.source, record.source.revision)] = record
                self._by_listing[_place(record.source, record.listing)] = record

    def find_by_revision(self, name: str, repository: Repository) -> ReusedAdapter | None:
        """Return an adapter that is fixed, or was built at this very revision; its source is not asked."""
        if name in self.fixed:
            return ReusedAdapter(name, self.fixed[name])
        pinned = pinned_revision(repository.source_name)
        if repository.source is not SourceKind.PUSHED and not (
            pinned and re.fullmatch(pinned, repository.revision)
        ):
            return None
        found = self._by_revision.get(_place(repository, repository.revision))
        if found is None and repository.source is SourceKind.PUSHED and not repository.revision:
            found = self._last_pushed(repository)
        return ReusedAdapter(name, _from(found, repository)) if found else None

    def find_by_listing(self, adapter: ListedAdapter) -> ReusedAdapter | None:
        """Return an adapter whose source lists the same files as when the adapter was built."""
        repository, says = adapter.resolved.repository, adapter.digest
        found = self._by_listing.get(_place(repository, says)) if says else None
        if found is None:
            return None
        pins = pinned_revision(repository.source_name) is not None
        if not pins and repository.revision not in ("", found.source.revision):
            return None  # the source will report the missing revision
        extra = tuple(extra_files(adapter.resolved.files))
        return ReusedAdapter(adapter.name, _from(found, repository), extra)

    def _last_pushed(self, repository: Repository) -> AdapterRecord | None:
        """Return the adapter that was pushed under this name last."""
        pushed = (r for r in self._by_revision.values() if r.source.source is SourceKind.PUSHED)
        return next((record for record in pushed if record.source.repo == repository.repo), None)


def same_conditions(one: Generation, other: Generation) -> bool:
    """Return True if an adapter gives the same bundle, or breaks the same rules, in both."""
    return _conditions(one) == _conditions(other)


def still_fits(record: AdapterRecord, before: Generation, draft: Generation, limits: AdapterLimits) -> bool:
    """Return True if two generations differ in ceilings alone, and an adapter is below the new ones."""
    ceilings = {"max_lora_rank": draft.max_lora_rank, "lora_target_modules": draft.lora_target_modules}
    summary, allowed = record.summary, limits.target_modules
    return (
        same_conditions(before.model_copy(update=ceilings), draft)
        and summary is not None
        and max(summary.ranks, default=0) <= limits.max_rank
        and (not allowed or allowed.issuperset(summary.modules))
    )


def _conditions(generation: Generation) -> tuple[object, ...]:
    return (
        generation.base.files,
        generation.max_lora_rank,
        generation.lora_target_modules,
        generation.lora_dtype,
        generation.recipe,
    )


def _place(repository: Repository, state: str | None) -> Place:
    return repository.source, repository.label, repository.subfolder, state


def _from(record: AdapterRecord, repository: Repository) -> AdapterRecord:
    """Return a record as of a repository: of another commit with the same files, or with another secret."""
    pins = pinned_revision(repository.source_name) is not None
    revision = repository.revision if pins else record.source.revision
    source = recorded(repository).model_copy(update={"revision": revision})
    return record.model_copy(update={"source": source, "added": False})


def keep(
    store: Store, found: Iterable[ReusedAdapter], base: BaseRecord, progress: Progress, *, verify: bool
) -> dict[str, AdapterRecord]:
    """Return the records of adapters whose bundles are in the store, and report these adapters as done.

    With verify every byte of a bundle is read back, and a bundle that differs is not kept. Without, it is
    enough that all files are there. Raise StoreUnavailable where the store does not answer.
    """
    candidates = list(found)
    is_whole = _is_whole if verify else _has_files
    digests = list({each.record.digest: each.record for each in candidates}.values())
    with ThreadPoolExecutor(MAX_PARALLEL_REQUESTS, "keep") as pool:
        whole = dict(
            zip([r.digest for r in digests], pool.map(lambda r: is_whole(store, r), digests), strict=True)
        )
    reused = [each for each in candidates if whole[each.record.digest]]
    for each in reused:
        named = each.record.summary.base_model_name if each.record.summary else ""
        origin = origin_warnings(named, each.record.licence, base)
        extra = [*origin, *each.warnings]
        progress.settle(each.name, each.record, extra, read_back=verify)
    return {each.name: each.record for each in reused}


def _has_files(store: Store, record: AdapterRecord) -> bool:
    names: tuple[str, ...] = (WEIGHTS_FILE, CONFIG_FILE)
    if record.summary is not None:
        names = (*record.summary.npy_files, *record.summary.texts)
    there = set(store.list(bundle_key(record.digest, "")))
    lost = {bundle_key(record.digest, name) for name in (MANIFEST_FILE, *names)} - there
    if lost:
        log.warning("bundle lacks files, building it again", digest=record.digest, lost=sorted(lost))
    return not lost


def _is_whole(store: Store, record: AdapterRecord) -> bool:
    try:
        manifest = read_manifest(store, record.digest)
    except BundleCorrupt as damage:
        log.warning("bundle is damaged, building it again", problem=damage.message)
        return False
    differ = [
        name
        for name, file in manifest.files.items()
        if store.sha256(bundle_key(record.digest, name)) != file.sha256
    ]
    if differ:
        log.warning("bundle is damaged, building it again", digest=record.digest, differ=differ)
    return not differ
