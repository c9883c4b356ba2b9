"""Output: the bundles of a build converted and published, several at once, each only once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from builder_service.domain.origin import origin_warnings
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.convert import BuiltBundle, bundle_bytes, convert_adapter
from builder_service.pipeline.fetch import FetchedAdapter, gathered
from builder_service.pipeline.intake import Identity, identity
from builder_service.pipeline.lineage import Lineages
from builder_service.pipeline.progress import Progress, Stage
from builder_service.pipeline.publish import publish_bundle
from builder_service.pipeline.space import Space
from builder_service.pipeline.validate import ValidAdapter
from loramux_shared.bundle.generation import CONVERTER, AdapterRecord, BaseRecord, Descent
from loramux_shared.bundle.proof import Proof
from loramux_shared.deployment import Dtype
from loramux_shared.storage.base import Store


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


@dataclass(frozen=True)
class Output:
    """The outgoing bundles of one build, all of whose adapters are valid."""

    dtype: Dtype
    base: BaseRecord
    store: Store
    served: frozenset[str]
    """Digests that the served generation refers to."""
    space: Space
    progress: Progress
    context: BuildContext
    lineages: Lineages

    def put_out(self, groups: Sequence[Duplicates], proofs: Sequence[Proof | None]) -> dict[str, AdapterRecord]:
        """Convert and publish; returns what the generation says of the adapters, by their names.

        Raises:
            ResourcesExhausted: the disk has no room for a bundle.
            StoreUnavailable: the store does not answer.
            InternalFault: a bundle was not written as planned.
        """
        with ThreadPoolExecutor(self.context.parallel_adapters, "output") as pool:
            futures = {
                group.names[0]: pool.submit(self._put_out, group, proof)
                for group, proof in zip(groups, proofs, strict=True)
            }
        return {
            name: record for records in gathered(futures, self.progress) for name, record in records.items()
        }

    def _put_out(self, group: Duplicates, proof: Proof | None) -> dict[str, AdapterRecord]:
        for name in group.names:
            self.progress.enter(name, Stage.CONVERTING)
        size = bundle_bytes(group.first.checked, self.dtype)
        with self.space.writing(size, f"the bundle of adapter {group.names[0]!r}"), self.context.compute:
            bundle = convert_adapter(group.first, self.dtype, self.progress, proof)
        sources = [adapter.fetched.source for adapter in group.adapters]
        lineage = self.lineages.of(bundle.manifest.base_model_name, self.base.source, sources)
        self._describe(group, bundle, lineage)
        publish_bundle(self.store, bundle, group.names, self.served, self.progress)
        return {adapter.fetched.name: _record(adapter.fetched, bundle, lineage) for adapter in group.adapters}

    def _describe(self, group: Duplicates, bundle: BuiltBundle, lineage: tuple[Descent, ...]) -> None:
        named = bundle.manifest.base_model_name
        for adapter in group.adapters:
            origin = origin_warnings(named, adapter.fetched.licence, self.base, lineage)
            extra = [*origin, *adapter.fetched.warnings]
            self.progress.describe(adapter.fetched.name, bundle.digest, bundle.manifest, extra)


def _record(fetched: FetchedAdapter, bundle: BuiltBundle, lineage: tuple[Descent, ...]) -> AdapterRecord:
    return AdapterRecord(
        digest=bundle.digest,
        source=fetched.source,
        summary=bundle.manifest.summary,
        listing=fetched.listing,
        converter=CONVERTER,
        invocation_tokens=bundle.manifest.invocation_tokens,
        lineage=lineage,
        licence=fetched.licence,
    )
