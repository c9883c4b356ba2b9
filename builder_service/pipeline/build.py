"""A build: fetch, validate, convert, publish."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from builder_service.domain.rules import Rulebook, base_warning
from builder_service.pipeline.base_weights import BaseWeights
from builder_service.pipeline.convert import BuiltBundle, convert_adapter
from builder_service.pipeline.fetch import FetchedAdapter, fetch_adapters
from builder_service.pipeline.progress import Progress
from builder_service.pipeline.publish import publish_bundle
from builder_service.pipeline.validate import ValidAdapter, rulebook, validate_adapters
from builder_service.pipeline.workshop import Workshop
from shared.bundle.deployments import current_generation, publish_generation
from shared.bundle.manifest import AdapterRecord, BaseRecord, Generation
from shared.deployment import Deployment
from shared.faults import BundleCorrupt, Fault
from shared.sources.checkpoint import Base, describe_base
from shared.storage.base import Store


@dataclass(frozen=True)
class BuildResult:
    """What a build published."""

    generation: Generation
    unchanged: bool
    """True when it was the current generation already."""


def build(deployment: Deployment, shop: Workshop, progress: Progress) -> BuildResult:
    """Build a deployment. Blocks; everything is checked before anything is written to the store.

    Raises:
        AdapterInvalid: with every violation of every adapter.
        Fault: what the base, a source or the store raises.
    """
    with shop.folder() as work:
        base = _describe_base(deployment, shop, progress)
        weights = BaseWeights(base.record, shop.sources, work / "base", lambda _: progress.check())
        book = rulebook(base.config, deployment.build.lora_configuration, weights)
        fetched = fetch_adapters(deployment.build.lora_adapters, shop.sources, work, progress)
        valid = validate_adapters(fetched, book, progress)
        bundles = [_convert(adapter, base, book, progress) for adapter in valid]
        return _publish(deployment, base.record, book, fetched, bundles, shop, progress)


def _describe_base(deployment: Deployment, shop: Workshop, progress: Progress) -> Base:
    try:
        return describe_base(shop.sources, deployment.build.checkpoint_repository, lambda _: progress.check())
    except Fault as fault:
        raise type(fault)(f"base checkpoint: {fault.message}", fault.findings) from fault


def _convert(adapter: ValidAdapter, base: Base, book: Rulebook, progress: Progress) -> BuiltBundle:
    bundle = convert_adapter(adapter, book.dtype, progress)
    warning = base_warning(bundle.manifest.base_model_name, base.record.source.shown)
    extra = [*([warning] if warning else []), *adapter.fetched.warnings]
    progress.describe(bundle.name, bundle.digest, bundle.manifest, extra)
    return bundle


def _publish(
    deployment: Deployment,
    base: BaseRecord,
    book: Rulebook,
    fetched: list[FetchedAdapter],
    bundles: list[BuiltBundle],
    shop: Workshop,
    progress: Progress,
) -> BuildResult:
    for bundle in bundles:
        publish_bundle(shop.store, bundle, progress)
    sources = {adapter.name: adapter.source for adapter in fetched}
    lora, runtime = deployment.build.lora_configuration, deployment.runtime
    proposed = Generation(
        deployment=deployment.model_name,
        number=1,
        create_time=datetime.now(UTC),
        served_model_name=deployment.served_model_name,
        base=base,
        adapters={
            bundle.name: AdapterRecord(digest=bundle.digest, source=sources[bundle.name]) for bundle in bundles
        },
        max_seq_len=deployment.build.max_seq_len,
        max_lora_rank=lora.max_lora_rank,
        lora_target_modules=lora.lora_target_modules,
        lora_dtype=book.dtype,
        request_default_max_tokens=runtime.request_default_max_tokens,
    )
    before = _number(shop.store, deployment.model_name)
    published = publish_generation(shop.store, proposed)
    return BuildResult(published, unchanged=published.number == before)


def _number(store: Store, name: str) -> int:
    try:
        generation = current_generation(store, name)
    except BundleCorrupt:  # replaced by publish_generation
        return 0
    return generation.number if generation else 0
