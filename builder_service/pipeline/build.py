"""A build: describe the base, keep or make its adapters, publish."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

from builder_service.domain.rules.tensors import AdapterLimits
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.keep import Moved, ReusableAdapters, same_conditions, still_fits
from builder_service.pipeline.making import AdapterMaker, Workshop, hold, open_workshop, require_prover
from builder_service.pipeline.progress import Progress
from builder_service.pipeline.speculator import record_speculator
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bundle.deployments import (
    NAMELESS,
    Identity,
    current_generation,
    newest_or_none,
    point_at_highest,
    publish_change,
    publish_generation,
)
from loramux_shared.bundle.generation import AdapterRecord, BaseRecord, Generation, Recipe
from loramux_shared.deployment import Build, Deployment, Dtype, Merge, Runtime, SourceKind
from loramux_shared.faults import BundleCorrupt, DeploymentInvalid, Fault, Finding
from loramux_shared.runtime import Pooling
from loramux_shared.sources.checkpoint import Base
from loramux_shared.storage.base import Store
from loramux_shared.storage.patient import PatientStore
from loramux_shared.wording import listed

log = structlog.get_logger()


@dataclass(frozen=True)
class BuildResult:
    """The result of a build."""

    generation: Generation
    unchanged: bool
    """True when it was the current generation already."""
    restored: int = 0
    """The older generation whose content a rollback restored; 0 for other builds."""


def build(
    deployment: Deployment,
    context: BuildContext,
    progress: Progress,
    *,
    verify: bool = False,
    exact: bool = False,
    identity: Identity = NAMELESS,
) -> BuildResult:
    """Build a deployment. Blocks; everything is checked before anything is written to the store.

    Adapters that were added or pushed to it stay, unless the deployment names others like them. With exact they
    leave. With verify, every byte of the bundles that are kept is read back. A build that was published under
    the same identity is not repeated.

    Raises:
        AdapterInvalid: with every violation of every adapter.
        DeploymentInvalid: adapters that stay do not fit the deployment.
        Fault: what the base, a source or the store raises.
    """
    if deployment.build.prove:
        require_prover()
    store = PatientStore(context.store, progress.check)
    while True:
        try:
            with open_workshop(context, store, progress) as workshop:
                return _build(deployment, workshop, identity, verify=verify, exact=exact)
        except Moved:
            log.info("adapters were added during the build, building again", deployment=deployment.model_name)


def _build(
    deployment: Deployment, workshop: Workshop, identity: Identity, *, verify: bool, exact: bool
) -> BuildResult:
    store, progress = workshop.store, workshop.progress
    before = newest_or_none(store, deployment.model_name)
    if before is not None and identity.applied_in(before):
        return result_of_replay(store, before, deployment.build.lora_adapters, progress)
    base = _describe_base(deployment.build, workshop)
    _check_base(deployment.runtime, base.model, prove=deployment.build.prove)
    maker = AdapterMaker.for_base(
        workshop, base, deployment.build, digests_of(before), deployment.runtime.merge
    )
    draft = _draft(deployment, base.record, maker.rules.dtype)
    if (speculator := deployment.runtime.speculator) is not None:
        draft = draft.model_copy(update={"speculator": record_speculator(speculator, base, workshop)})
    added = {} if exact else added_to(before)
    named = deployment.build.lora_adapters
    retained = {name: record for name, record in added.items() if name not in named}
    reusable = _find_reusable(before, draft, retained, maker.rules.limits)
    _check_retained(draft, named, retained, retained.keys() - reusable.fixed.keys())
    progress.include(retained)
    sources = {**named, **{name: record.source for name, record in retained.items()}}
    records = maker.make(sources, reusable, verify=verify)
    records |= {name: records[name].model_copy(update={"added": True}) for name in retained}
    for name, record in added.items():
        if name in named and records[name].digest != record.digest:
            progress.warn(name, _replaced(record))
    _hold_reused(store, before, records.values())
    planned = draft.model_copy(update={"adapters": dict(sorted(records.items()))})
    published = _publish(planned, None if before is None or exact else added, workshop, identity)
    return BuildResult(published, unchanged=before is not None and published.number == before.number)


def _find_reusable(
    before: Generation | None,
    draft: Generation,
    retained: Mapping[str, AdapterRecord],
    limits: AdapterLimits,
) -> ReusableAdapters:
    """Return what a build may reuse: all under the same base and settings, else retained adapters that fit."""
    if before is None:
        return ReusableAdapters(None)
    if same_conditions(before, draft):
        return ReusableAdapters(before, retained)
    fitting = {name: record for name, record in retained.items() if still_fits(record, before, draft, limits)}
    return ReusableAdapters(None, fitting)


def result_of_replay(store: Store, newest: Generation, names: Iterable[str], progress: Progress) -> BuildResult:
    """Return the result of changes that the newest generation has already, and let it be served."""
    for name in newest.adapters.keys() & set(names):
        progress.settle(name, newest.adapters[name])
    return BuildResult(point_at_highest(store, newest), unchanged=False)


def _check_base(runtime: Runtime, model: ModelConfig, *, prove: bool) -> None:
    """Raise DeploymentInvalid, with the field that asks for it, for what a base of this kind cannot do."""
    kind, wrong = "a decoder", {"runtime.pooling": runtime.pooling is Pooling.CLS}
    if model.encodes:
        kind, wrong = "an encoder", {"runtime.merge": runtime.merge is Merge.ALWAYS, "build.prove": prove}
    expected, fix = f"another value, for the base is {kind}", "Correct or remove it."
    findings = [
        Finding(code="E_BAD_FIELD", where=name, expected=expected, fix=fix) for name in wrong if wrong[name]
    ]
    if findings:
        raise DeploymentInvalid("the base does not serve what the deployment asks for", findings)


def added_to(generation: Generation | None) -> dict[str, AdapterRecord]:
    """Return the adapters of a generation that did not come from the deployment's file."""
    records = generation.adapters if generation else {}
    return {name: record for name, record in records.items() if record.added}


def _check_retained(
    draft: Generation, named: Collection[str], retained: Mapping[str, AdapterRecord], remade: Collection[str]
) -> None:
    """Refuse adapters that would stay beside those of the file, and cannot.

    `remade` names those that must be made again.
    """
    if not retained:
        return
    names = f"the file does not name {listed(retained)}, which came by an update or a push and would stay"
    lost = [name for name in retained if name in remade and retained[name].source.source is SourceKind.PUSHED]
    if lost:
        raise DeploymentInvalid(
            f"deployment {draft.deployment}: {names}, but a push leaves no files to make {listed(lost)} for "
            "another base or other settings. Build with --exact, which removes them, then push them again."
        )
    try:
        draft.model_copy(update={"adapters": {**dict.fromkeys(named), **retained}}).check_names()
    except DeploymentInvalid as fault:
        raise fault.with_message(f"{fault.message}: {names}. Build with --exact to remove them.") from fault


def _replaced(record: AdapterRecord) -> Finding:
    source, digest = record.source, record.digest[:12]
    return Finding(
        code="W_REPLACED",
        expected="a name that no added or pushed adapter has",
        found=f"{source.source} {source.label}, digest {digest}, whose place this one takes",
        fix="`loramux rollback` brings it back; under another name both are served.",
    )


def _publish(
    planned: Generation, added: Mapping[str, AdapterRecord] | None, workshop: Workshop, identity: Identity
) -> Generation:
    """Publish; raise Moved where others than the added adapters were added meanwhile, unless added is None."""
    store, name, check = PatientStore(workshop.context.store), planned.deployment, workshop.progress.check

    def change(current: Generation) -> Generation:
        if added_to(current) != added and not current.same_content(planned):
            raise Moved
        return planned

    check()  # a build that is stopped from here on is published all the same
    with workshop.context.publishing(name):
        if added is None:
            return publish_generation(store, planned, identity)
        return publish_change(store, name, change, identity, check=check)[0]


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


def _hold_reused(store: Store, before: Generation | None, records: Iterable[AdapterRecord]) -> None:
    """Keep `loramux gc` from bundles that are reused though the served generation no longer refers to them."""
    now = served_generation(store, before.deployment) if before is not None else None
    if before is not None and (now is None or now.number != before.number):
        held = digests_of(before) - digests_of(now)
        hold(store, {record.digest for record in records} & held)


def _describe_base(settings: Build, workshop: Workshop) -> Base:
    try:
        base = workshop.describe(
            settings.checkpoint_repository,
            max_seq_len=settings.max_seq_len,
            signed_by=settings.base_signed_by,
        )
    except Fault as fault:
        raise fault.with_message(f"base checkpoint: {fault.message}") from fault
    workshop.context.bases.remember(base, settings.max_seq_len)
    return base


def _draft(deployment: Deployment, base: BaseRecord, dtype: Dtype) -> Generation:
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
        tensor_parallel_count=deployment.build.tensor_parallel_count,
        tool_parser=runtime.tool_parser,
        reasoning_parser=runtime.reasoning_parser,
        pooling=runtime.pooling,
        serve_base=runtime.serve_base,
        merge=runtime.merge,
        aliases=runtime.aliases,
        limits=runtime.limits,
        resolve=runtime.resolve,
        recipe=Recipe(
            truncate_to_rank=lora.truncate_to_rank,
            prove=deployment.build.prove,
            signed_by=deployment.build.signed_by,
        ),
    )
