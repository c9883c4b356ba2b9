"""The adapters of one build, from their repositories to their records in the generation.

Bundles are converted and published several at once, each only once, and with its manifest last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

import structlog

from builder_service.domain.origin import origin_warnings
from builder_service.domain.rules.checked import Rulebook
from builder_service.pipeline.base_weights import BaseWeights
from builder_service.pipeline.context import BASE_FILES, BuildContext, Space
from builder_service.pipeline.convert import BuiltBundle, bundle_bytes, convert_adapter
from builder_service.pipeline.fetch import FetchedAdapter, gather, list_adapters
from builder_service.pipeline.keep import ReusableAdapters, keep
from builder_service.pipeline.progress import Progress, Stage
from builder_service.pipeline.validate import Identity, Intake, ValidAdapter, identity, rulebook
from loramux_shared.bundle.generation import CONVERTER, AdapterRecord, BaseRecord
from loramux_shared.bundle.manifest import MANIFEST_FILE, REMOVAL_FILE, apart, bundle_key
from loramux_shared.bundle.proof import Proof
from loramux_shared.bundle.reader import read_manifest
from loramux_shared.deployment import Build, Merge, Repository
from loramux_shared.faults import BundleCorrupt, DeploymentInvalid, StoreUnavailable
from loramux_shared.ports import required
from loramux_shared.sources.base import Room
from loramux_shared.sources.checkpoint import Base, describe_base
from loramux_shared.sources.open import Sources
from loramux_shared.storage.base import ObjectMissing, Store

log = structlog.get_logger()


MAX_REMOVAL_LOOKS: Final = 120
REMOVAL_PAUSE_S: Final = 0.5
MAX_REMOVAL_TIME: Final = timedelta(minutes=10)
"""Time of the removal of one bundle, which is a few requests."""


def publish_bundle(
    store: Store, bundle: BuiltBundle, names: Sequence[str], served: Collection[str], progress: Progress
) -> None:
    """Put a bundle into the store, unless it is there; its files leave the work folder.

    What is there is read back: a file that differs from what was built is put again, and the adapters are
    reported as repaired where a replica could have met the damage.

    One that is there, and that the served generation does not refer to, may be an orphan: its manifest is
    put again, for its age is what keeps `loramux gc` from it until a generation does.
    """
    total = sum(file.size for file in bundle.manifest.files.values())
    for name in names:
        progress.enter(name, Stage.PUBLISHING, total)
    manifest = _stored_manifest(store, bundle)
    reused = manifest == bundle.manifest_bytes
    for file, path in bundle.paths.items():
        expected, key = bundle.manifest.files[file], bundle_key(bundle.digest, file)
        if store.sha256(key) == expected.sha256:
            path.unlink()
        else:
            store.take(key, path)
            reused = False
        for name in names:
            progress.advance(name, expected.size)
    if not reused or bundle.digest not in served:
        store.put(bundle_key(bundle.digest, MANIFEST_FILE), bundle.manifest_bytes)
        outlast_removal(store, bundle.digest, bundle.paths)
    repaired = not reused and (manifest is not None or bundle.digest in served)
    if repaired:
        log.warning("damaged bundle repaired", digest=bundle.digest, adapters=list(names))
    for name in names:
        progress.update(name, stage=Stage.DONE, bytes_done=total, reused=reused, repaired=repaired)


def _stored_manifest(store: Store, bundle: BuiltBundle) -> bytes | None:
    try:
        return store.get(bundle_key(bundle.digest, MANIFEST_FILE))
    except ObjectMissing:
        return None


def hold(store: Store, digests: Collection[str]) -> None:
    """Make bundles young again, which a generation is about to refer to and the served one does not; raise
    BundleCorrupt where one of them is gone.
    """
    for digest in sorted(digests):
        manifest = read_manifest(store, digest)
        store.put(bundle_key(digest, MANIFEST_FILE), manifest.to_bytes())
        outlast_removal(store, digest, manifest.files)


def outlast_removal(
    store: Store, digest: str, files: Iterable[str], wait: Callable[[float], None] = time.sleep
) -> None:
    """Wait while `loramux gc` is about to remove a bundle whose manifest was put just now, which it sees.

    Raises:
        BundleCorrupt: a file is not there, or not any more.
        StoreUnavailable: the removal does not end.
    """
    names = {bundle_key(digest, file) for file in (MANIFEST_FILE, *files)}
    manifest, mark = bundle_key(digest, MANIFEST_FILE), bundle_key(digest, REMOVAL_FILE)
    for _ in range(MAX_REMOVAL_LOOKS):
        there = {entry.key: entry for entry in store.entries(bundle_key(digest, ""))}
        if lost := sorted(names - there.keys()):
            raise BundleCorrupt(f"bundle {digest[:12]}: {lost[0]} is not in {store.uri}. Build again.")
        if mark not in there:
            return
        if there[manifest].modified - there[mark].modified > MAX_REMOVAL_TIME:
            store.delete(mark)  # the process that put it was killed
            return
        wait(REMOVAL_PAUSE_S)
    raise StoreUnavailable(f"bundle {digest[:12]} is being removed by loramux gc. Build again in a while.")


@dataclass(frozen=True)
class Duplicates:
    """Adapters with the very same files, which have one bundle."""

    adapters: tuple[ValidAdapter, ...]

    @property
    def first(self) -> ValidAdapter:
        """The one that is converted."""
        return self.adapters[0]

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the adapters in the deployment."""
        return tuple(adapter.fetched.name for adapter in self.adapters)


def duplicates(adapters: Sequence[ValidAdapter]) -> list[Duplicates]:
    """Return adapters with those together that are the same."""
    found: dict[Identity, list[ValidAdapter]] = {}
    for adapter in adapters:
        found.setdefault(identity(adapter.fetched), []).append(adapter)
    return [Duplicates(tuple(group)) for group in found.values()]


def _record(fetched: FetchedAdapter, bundle: BuiltBundle) -> AdapterRecord:
    return AdapterRecord(
        digest=bundle.digest,
        source=fetched.source,
        summary=bundle.manifest.summary,
        listing=fetched.listing,
        converter=CONVERTER,
        invocation_tokens=bundle.manifest.invocation_tokens,
        licence=fetched.licence,
    )


ProveAdapters = Callable[
    [Sequence[ValidAdapter], Build, BaseRecord, Sources, Path, Progress, Room], Sequence[Proof]
]


@dataclass(frozen=True)
class Prover:
    """The port of what computes proofs."""

    require: Callable[[], None]
    """Raises `SettingsInvalid` unless its packages are installed."""
    prove_adapters: ProveAdapters
    """Returns the proofs of adapters, in their order."""


def require_prover() -> Prover:
    """Return the prover; raise SettingsInvalid where it or a package that it needs is not installed."""
    prover = required("prover", Prover, "a deployment with prove: true")
    prover.require()
    return prover


@dataclass(frozen=True)
class Workshop:
    """The folders, the base and the settings of one build."""

    context: BuildContext
    store: Store
    work: Path
    space: Space
    progress: Progress

    @property
    def room(self) -> Room:
        """Counts what is written of the base."""
        return self.space.room(BASE_FILES)

    def describe(
        self, checkpoint: Repository, *, max_seq_len: int | None = None, signed_by: Sequence[str] = ()
    ) -> Base:
        """Return the description of a checkpoint, as `describe_base` does."""
        sources, progress = self.context.sources, self.progress
        return describe_base(
            sources,
            checkpoint,
            lambda _: progress.check(),
            self.room,
            max_seq_len=max_seq_len,
            signed_by=signed_by,
        )

    def weights(self, base: BaseRecord) -> BaseWeights:
        """Return the base's own files, which are fetched when they are asked for."""
        sources, progress = self.context.sources, self.progress
        return BaseWeights(base, sources, self.work / "base", lambda _: progress.check(), self.room)


@contextmanager
def open_workshop(context: BuildContext, store: Store, progress: Progress) -> Iterator[Workshop]:
    """Open a workshop; its folder goes when it is left."""
    with context.folder() as work:
        yield Workshop(context, store, work, context.space(work), progress)


@dataclass(frozen=True)
class AdapterMaker:
    """Makes adapters for one base under the settings of one deployment."""

    workshop: Workshop
    base: Base
    settings: Build
    """Settings of the build; the adapters in them are not used."""
    rules: Rulebook
    served: frozenset[str]
    """Digests that the served generation refers to."""
    merge: Merge
    """Merging of the one adapter into the weights."""

    @classmethod
    def for_base(
        cls, workshop: Workshop, base: Base, settings: Build, served: frozenset[str], merge: Merge
    ) -> AdapterMaker:
        """Return a maker of adapters for a base under a deployment's settings."""
        rules = rulebook(base.model, settings.lora_configuration, workshop.weights(base.record))
        return cls(workshop, base, settings, rules, served, merge)

    def make(
        self, adapters: Mapping[str, Repository], reusable: ReusableAdapters, *, verify: bool = False
    ) -> dict[str, AdapterRecord]:
        """Keep what is what it was, make the rest; everything is checked before anything is put.

        Raises:
            AdapterInvalid: with every violation of every adapter.
            DeploymentInvalid: one that must be merged cannot be.
            Fault: what sources and the store raise.
        """
        pinned = [
            reused for name, each in adapters.items() if (reused := reusable.find_by_revision(name, each))
        ]
        base, progress, workshop = self.base.record, self.workshop.progress, self.workshop
        records = keep(workshop.store, pinned, base, progress, verify=verify)
        requested = {name: each for name, each in adapters.items() if name not in records}
        signers = self.settings.signed_by
        with list_adapters(requested, workshop.context.sources, workshop.space, progress, signers) as listed:
            same = [reused for each in listed if (reused := reusable.find_by_listing(each))]
            records |= keep(workshop.store, same, base, progress, verify=verify)
            valid = self._intake().take_in([each for each in listed if each.name not in records])
        self._check_merge({name: record.apart for name, record in records.items()} | _apart(valid))
        return records | self._publish(valid)

    def make_fetched(self, fetched: FetchedAdapter) -> AdapterRecord:
        """Make an adapter whose files are in the work folder already.

        Raises:
            AdapterInvalid: with every violation.
            DeploymentInvalid: it must be merged and cannot be.
            Fault: what the base's source and the store raise.
        """
        valid = [self._intake().judge(fetched)]
        self._check_merge(_apart(valid))
        return self._publish(valid)[fetched.name]

    def _check_merge(self, apart: Mapping[str, str]) -> None:
        """Refuse to merge an adapter that is more, or at times less, than layers' weights; values say why."""
        whys = [(name, why) for name, why in apart.items() if why] if self.merge is Merge.ALWAYS else []
        for name, why in whys[:1]:
            raise DeploymentInvalid.of_field(
                "the adapter cannot be merged",
                "runtime.merge",
                f"auto or never: {name} {why}",
                self.merge,
                "Set runtime.merge to auto; it is served beside the weights.",
            )

    def _intake(self) -> Intake:
        workshop = self.workshop
        return Intake(self.rules, workshop.context, workshop.space, workshop.work, workshop.progress)

    def _publish(self, adapters: Sequence[ValidAdapter]) -> dict[str, AdapterRecord]:
        """Convert and publish valid adapters; return their records by name."""
        workshop, groups = self.workshop, duplicates(adapters)
        sources = workshop.context.sources
        proofs: Sequence[Proof | None] = [None] * len(groups)
        if self.settings.prove:
            firsts = [group.first for group in groups]
            proofs = require_prover().prove_adapters(
                firsts,
                self.settings,
                self.base.record,
                sources,
                workshop.work,
                workshop.progress,
                workshop.room,
            )
        with ThreadPoolExecutor(workshop.context.parallel_adapters, "output") as pool:
            futures = {
                group.names[0]: pool.submit(self._publish_group, group, proof)
                for group, proof in zip(groups, proofs, strict=True)
            }
        records = gather(futures, workshop.progress)
        return {name: record for each in records for name, record in each.items()}

    def _publish_group(self, group: Duplicates, proof: Proof | None) -> dict[str, AdapterRecord]:
        workshop, base, dtype = self.workshop, self.base.record, self.rules.dtype
        for name in group.names:
            workshop.progress.enter(name, Stage.CONVERTING)
        size = bundle_bytes(group.first.checked, dtype)
        with (
            workshop.space.writing(size, f"the bundle of adapter {group.names[0]!r}"),
            workshop.context.compute,
        ):
            bundle = convert_adapter(group.first, dtype, workshop.progress, proof)
        adapters, named = [each.fetched for each in group.adapters], bundle.manifest.base_model_name
        for adapter in adapters:
            extra = [*origin_warnings(named, adapter.licence, base), *adapter.warnings]
            workshop.progress.describe(adapter.name, bundle.digest, bundle.manifest, extra)
        publish_bundle(workshop.store, bundle, group.names, self.served, workshop.progress)
        return {adapter.name: _record(adapter, bundle) for adapter in adapters}


def _apart(valid: Sequence[ValidAdapter]) -> dict[str, str]:
    """Return why adapters are never merged, by name; empty for those that can be."""
    checked = {each.fetched.name: each.checked for each in valid}
    return {
        name: apart(each.invocation_tokens, each.modules, each.vocab, each.num_labels)
        for name, each in checked.items()
    }
