"""Making: the adapters of one build, from their repositories to what the generation says of them.

Bundles are converted and published several at once, each only once, and with its manifest last.
"""

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
from builder_service.pipeline.fetch import FetchedAdapter, gathered, list_adapters
from builder_service.pipeline.intake import Identity, Intake, identity
from builder_service.pipeline.keep import Keeping, keep
from builder_service.pipeline.progress import Progress, Stage
from builder_service.pipeline.validate import ValidAdapter, rulebook
from loramux_shared.bundle.generation import CONVERTER, AdapterRecord, BaseRecord
from loramux_shared.bundle.manifest import MANIFEST_FILE, REMOVAL_FILE, apart, bundle_key
from loramux_shared.bundle.proof import Proof
from loramux_shared.bundle.reader import read_manifest
from loramux_shared.deployment import Build, Merge, Repository
from loramux_shared.faults import BundleCorrupt, DeploymentInvalid, StoreUnavailable
from loramux_shared.ports import required
from loramux_shared.sources.base import Room
from loramux_shared.sources.checkpoint import Base
from loramux_shared.sources.open import Sources
from loramux_shared.storage.base import ObjectMissing, Store

log = structlog.get_logger()


REMOVAL_LOOKS: Final = 120
REMOVAL_PAUSE_S: Final = 0.5
MAX_REMOVAL: Final = timedelta(minutes=10)
"""For the removal of one bundle: a few requests."""


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
    for _ in range(REMOVAL_LOOKS):
        there = {entry.key: entry for entry in store.entries(bundle_key(digest, ""))}
        if lost := sorted(names - there.keys()):
            raise BundleCorrupt(f"bundle {digest[:12]}: {lost[0]} is not in {store.uri}. Build again.")
        if mark not in there:
            return
        if there[manifest].modified - there[mark].modified > MAX_REMOVAL:
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


def prover() -> Prover:
    """Return what computes proofs; raise SettingsInvalid where it is not installed."""
    found = required("prover", Prover, "a deployment with prove: true")
    found.require()
    return found


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

    def weights(self, base: BaseRecord) -> BaseWeights:
        """Return the base's own files, which are fetched when they are asked for."""
        sources, progress = self.context.sources, self.progress
        return BaseWeights(base, sources, self.work / "base", lambda _: progress.check(), self.room)


@contextmanager
def workshop(context: BuildContext, store: Store, progress: Progress) -> Iterator[Workshop]:
    """Open a workshop; its folder goes when it is left."""
    with context.folder() as work:
        yield Workshop(context, store, work, context.space(work), progress)


@dataclass(frozen=True)
class Making:
    """Makes adapters for one base under the settings of one deployment."""

    shop: Workshop
    base: Base
    settings: Build
    """Settings of the build; the adapters in them are not used."""
    book: Rulebook
    served: frozenset[str]
    """Digests that the served generation refers to."""
    merge: Merge
    """Merging of the one adapter into the weights."""

    def make(
        self, adapters: Mapping[str, Repository], keeping: Keeping, *, verify: bool = False
    ) -> dict[str, AdapterRecord]:
        """Keep what is what it was, make the rest; everything is checked before anything is put.

        Raises:
            AdapterInvalid: with every violation of every adapter.
            DeploymentInvalid: one that must be merged cannot be.
            Fault: what sources and the store raise.
        """
        unasked = [
            found_record for name, each in adapters.items() if (found_record := keeping.unasked(name, each))
        ]
        base, progress, shop = self.base.record, self.shop.progress, self.shop
        records = keep(shop.store, unasked, base, progress, verify=verify)
        requested = {name: each for name, each in adapters.items() if name not in records}
        signers = self.settings.signed_by
        with list_adapters(requested, shop.context.sources, shop.space, progress, signers) as listed:
            found = [found_record for each in listed if (found_record := keeping.listed(each))]
            records |= keep(shop.store, found, base, progress, verify=verify)
            valid = self._intake().take_in([each for each in listed if each.name not in records])
        self._check_merge({name: record.apart for name, record in records.items()} | _apart(valid))
        return records | self._put_out(valid)

    def make_fetched(self, fetched: FetchedAdapter) -> AdapterRecord:
        """Make an adapter whose files are in the work folder already.

        Raises:
            AdapterInvalid: with every violation.
            DeploymentInvalid: it must be merged and cannot be.
            Fault: what the base's source and the store raise.
        """
        valid = [self._intake().judge(fetched)]
        self._check_merge(_apart(valid))
        return self._put_out(valid)[fetched.name]

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
        shop = self.shop
        return Intake(self.book, shop.context, shop.space, shop.work, shop.progress)

    def _put_out(self, adapters: Sequence[ValidAdapter]) -> dict[str, AdapterRecord]:
        """Convert and publish adapters that are valid; return what the generation says of them, by name."""
        shop, groups = self.shop, duplicates(adapters)
        sources = shop.context.sources
        proofs: Sequence[Proof | None] = [None] * len(groups)
        if self.settings.prove:
            firsts = [group.first for group in groups]
            proofs = prover().prove_adapters(
                firsts, self.settings, self.base.record, sources, shop.work, shop.progress, shop.room
            )
        with ThreadPoolExecutor(shop.context.parallel_adapters, "output") as pool:
            futures = {
                group.names[0]: pool.submit(self._put_out_group, group, proof)
                for group, proof in zip(groups, proofs, strict=True)
            }
        records = gathered(futures, shop.progress)
        return {name: record for each in records for name, record in each.items()}

    def _put_out_group(self, group: Duplicates, proof: Proof | None) -> dict[str, AdapterRecord]:
        shop, base, dtype = self.shop, self.base.record, self.book.dtype
        for name in group.names:
            shop.progress.enter(name, Stage.CONVERTING)
        size = bundle_bytes(group.first.checked, dtype)
        with shop.space.writing(size, f"the bundle of adapter {group.names[0]!r}"), shop.context.compute:
            bundle = convert_adapter(group.first, dtype, shop.progress, proof)
        adapters, named = [each.fetched for each in group.adapters], bundle.manifest.base_model_name
        for adapter in adapters:
            extra = [*origin_warnings(named, adapter.licence, base), *adapter.warnings]
            shop.progress.describe(adapter.name, bundle.digest, bundle.manifest, extra)
        publish_bundle(shop.store, bundle, group.names, self.served, shop.progress)
        return {adapter.name: _record(adapter, bundle) for adapter in adapters}


def making(shop: Workshop, base: Base, settings: Build, served: frozenset[str], merge: Merge) -> Making:
    """Return what makes adapters for a base under a deployment's settings."""
    book = rulebook(base.model, settings.lora_configuration, shop.weights(base.record))
    return Making(shop, base, settings, book, served, merge)


def _apart(valid: Sequence[ValidAdapter]) -> dict[str, str]:
    """Why they are never merged, by name."""
    checked = {each.fetched.name: each.checked for each in valid}
    return {
        name: apart(each.invocation_tokens, each.modules, each.vocab, each.num_labels)
        for name, each in checked.items()
    }
