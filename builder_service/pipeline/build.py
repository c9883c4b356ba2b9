"""A build: describe the base, keep or make its adapters, publish."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.keep import Keeping, same_conditions
from builder_service.pipeline.making import Workshop, making, workshop
from builder_service.pipeline.progress import Progress
from builder_service.pipeline.prove import require_prover
from builder_service.pipeline.publish import hold
from loramux_shared.bundle.deployments import current_generation, publish_generation
from loramux_shared.bundle.generation import AdapterRecord, BaseRecord, Generation, Recipe
from loramux_shared.deployment import Deployment, Dtype
from loramux_shared.faults import BundleCorrupt, Fault
from loramux_shared.sources.checkpoint import Base, describe_base
from loramux_shared.storage.base import Store
from loramux_shared.storage.patient import PatientStore


@dataclass(frozen=True)
class BuildResult:
    """What a build published."""

    generation: Generation
    unchanged: bool
    """True when it was the current generation already."""


def build(
    deployment: Deployment, context: BuildContext, progress: Progress, *, verify: bool = False
) -> BuildResult:
    """Build a deployment. Blocks; everything is checked before anything is written to the store.

    With verify, every byte of the bundles that are kept is read back.

    Raises:
        AdapterInvalid: with every violation of every adapter.
        Fault: what the base, a source or the store raises.
    """
    if deployment.build.prove:
        require_prover()
    store = PatientStore(context.store, progress.check)
    with workshop(context, store, progress) as shop:
        base = _describe_base(deployment, shop)
        before = served_generation(store, deployment.model_name)
        made = making(shop, base, deployment.build, digests_of(before), deployment.runtime.merge)
        draft = _draft(deployment, base.record, made.book.dtype)
        keeping = Keeping(before if before is not None and same_conditions(before, draft) else None)
        records = made.make(deployment.build.lora_adapters, keeping, verify=verify)
        progress.check()
        _hold_on(store, before, records.values())
        wanted = draft.model_copy(update={"adapters": dict(sorted(records.items()))})
        published = publish_generation(store, wanted)
        return BuildResult(published, unchanged=before is not None and published.number == before.number)


def served_generation(store: Store, name: str) -> Generation | None:
    """Return the served generation, or None where it cannot be read: `publish_generation` replaces that."""
    try:
        return current_generation(store, name)
    except BundleCorrupt:
        return None


def digests_of(generation: Generation | None) -> frozenset[str]:
    """Return the bundles that a generation refers to."""
    records = generation.adapters.values() if generation else ()
    return frozenset(record.digest for record in records)


def _hold_on(store: Store, before: Generation | None, records: Iterable[AdapterRecord]) -> None:
    """Keep `loramux gc` from kept bundles to which the served generation refers no more."""
    now = served_generation(store, before.deployment) if before is not None else None
    if before is not None and (now is None or now.number != before.number):
        held = digests_of(before) - digests_of(now)
        hold(store, {record.digest for record in records} & held)


def _describe_base(deployment: Deployment, shop: Workshop) -> Base:
    asked, check = deployment.build, shop.progress.check
    try:
        base = describe_base(
            shop.context.sources,
            asked.checkpoint_repository,
            lambda _: check(),
            shop.room,
            max_seq_len=asked.max_seq_len,
            signed_by=asked.base_signed_by,
        )
    except Fault as fault:
        raise fault.retold(f"base checkpoint: {fault.message}") from fault
    shop.context.bases.remember(base, asked.max_seq_len)
    return base


def _draft(deployment: Deployment, base: BaseRecord, dtype: Dtype) -> Generation:
    """Return the generation without its adapters."""
    lora, runtime = deployment.build.lora_configuration, deployment.runtime
    return Generation(
        deployment=deployment.model_name,
        number=1,
        create_time=datetime.now(UTC),
        served_model_name=deployment.served_model_name,
        base=base,
        adapters={},
        max_seq_len=deployment.build.max_seq_len,
        max_lora_rank=lora.max_lora_rank,
        lora_target_modules=lora.lora_target_modules,
        lora_dtype=dtype,
        request_default_max_tokens=runtime.request_default_max_tokens,
        speculative_tokens=runtime.speculative_tokens,
        quantization=runtime.quantization,
        tool_parser=runtime.tool_parser,
        reasoning_parser=runtime.reasoning_parser,
        pooling=runtime.pooling,
        serve_base=runtime.serve_base,
        merge=runtime.merge,
        aliases=runtime.aliases,
        limits=runtime.limits,
        recipe=Recipe(
            truncate_to_rank=lora.truncate_to_rank,
            prove=deployment.build.prove,
            signed_by=deployment.build.signed_by,
        ),
    )
