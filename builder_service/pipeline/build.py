"""A build: fetch, validate, prove where it is wished, convert, publish."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from builder_service.domain.rules import Rulebook
from builder_service.pipeline.base_weights import BaseWeights
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.intake import Intake
from builder_service.pipeline.output import Output, duplicates
from builder_service.pipeline.progress import Progress
from builder_service.pipeline.prove import prove_adapters, require_prover
from builder_service.pipeline.space import BASE_FILES
from builder_service.pipeline.validate import rulebook
from loramux_shared.bundle.deployments import current_generation, publish_generation
from loramux_shared.bundle.manifest import AdapterRecord, BaseRecord, Generation, Recipe
from loramux_shared.bundle.proof import Proof
from loramux_shared.deployment import Deployment
from loramux_shared.faults import BundleCorrupt, Fault
from loramux_shared.sources.base import Room
from loramux_shared.sources.checkpoint import Base, describe_base
from loramux_shared.storage.base import Store
from loramux_shared.storage.patient import PatientStore


@dataclass(frozen=True)
class BuildResult:
    """What a build published."""

    generation: Generation
    unchanged: bool
    """True when it was the current generation already."""


def build(deployment: Deployment, context: BuildContext, progress: Progress) -> BuildResult:
    """Build a deployment. Blocks; everything is checked before anything is written to the store.

    Raises:
        AdapterInvalid: with every violation of every adapter.
        Fault: what the base, a source or the store raises.
    """
    if deployment.build.prove:
        require_prover()
    store = PatientStore(context.store, progress.check)
    with context.folder() as work:
        space = context.space(work)
        room = space.room(BASE_FILES)
        base = _describe_base(deployment, context, progress, room)
        weights = BaseWeights(base.record, context.sources, work / "base", lambda _: progress.check(), room)
        book = rulebook(base.model, deployment.build.lora_configuration, weights)
        adapters = Intake(book, context, space, work, progress).take_in(deployment.build.lora_adapters)
        groups = duplicates(adapters)
        proofs: Sequence[Proof | None] = [None] * len(groups)
        if deployment.build.prove:
            firsts = [group.first for group in groups]
            proofs = prove_adapters(
                firsts, deployment.build, base.record, context.sources, work, progress, room
            )
        before = _served(store, deployment.model_name)
        served = frozenset(record.digest for record in before.adapters.values()) if before else frozenset()
        output = Output(book.dtype, base.record.source.shown, store, served, space, progress, context)
        records = output.put_out(groups, proofs)
        progress.check()
        published = publish_generation(store, _generation(deployment, base.record, book, records))
        return BuildResult(published, unchanged=before is not None and published.number == before.number)


def _describe_base(deployment: Deployment, context: BuildContext, progress: Progress, room: Room) -> Base:
    repository = deployment.build.checkpoint_repository
    try:
        return describe_base(
            context.sources,
            repository,
            lambda _: progress.check(),
            room,
            max_seq_len=deployment.build.max_seq_len,
        )
    except Fault as fault:
        raise fault.retold(f"base checkpoint: {fault.message}") from fault


def _generation(
    deployment: Deployment,
    base: BaseRecord,
    book: Rulebook,
    adapters: Mapping[str, AdapterRecord],
) -> Generation:
    lora, runtime = deployment.build.lora_configuration, deployment.runtime
    return Generation(
        deployment=deployment.model_name,
        number=1,
        create_time=datetime.now(UTC),
        served_model_name=deployment.served_model_name,
        base=base,
        adapters=dict(sorted(adapters.items())),
        max_seq_len=deployment.build.max_seq_len,
        max_lora_rank=lora.max_lora_rank,
        lora_target_modules=lora.lora_target_modules,
        lora_dtype=book.dtype,
        request_default_max_tokens=runtime.request_default_max_tokens,
        serve_base=runtime.serve_base,
        merge=runtime.merge,
        aliases=runtime.aliases,
        limits=runtime.limits,
        recipe=Recipe(truncate_to_rank=lora.truncate_to_rank, prove=deployment.build.prove),
    )


def _served(store: Store, name: str) -> Generation | None:
    try:
        return current_generation(store, name)
    except BundleCorrupt:  # replaced by publish_generation
        return None
