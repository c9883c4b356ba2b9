"""Deployments as the service shows them: from a running build, or from what the store holds."""

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from builder_service.domain.origin import origin_warnings
from builder_service.pipeline.progress import AdapterProgress, Stage
from loramux_shared.bundle.deployments import current_generation, is_deployment_name, read_pointer
from loramux_shared.bundle.generation import Generation
from loramux_shared.bundle.reader import read_manifest
from loramux_shared.faults import BundleCorrupt, Fault
from loramux_shared.storage.base import Store


class BuildState(StrEnum):
    """The state of a deployment's newest build."""

    BUILDING = "BUILDING"
    ACTIVE = "ACTIVE"
    FAILED = "FAILED"


@dataclass(frozen=True)
class DeploymentView:
    """A deployment and its newest build."""

    name: str
    state: BuildState
    generation: int
    """The one that is served; 0: none yet."""
    create_time: datetime
    """When the build was asked for; of a stored deployment, when its generation was published."""
    update_time: datetime
    adapters: tuple[AdapterProgress, ...] = ()
    failure: Fault | None = None
    unchanged: bool = False


def stored_view(store: Store, name: str) -> DeploymentView | None:
    """Return what the store says about a deployment, or None; damage shows as a failure. Blocks."""
    try:
        generation = current_generation(store, name)
        return None if generation is None else _view(store, generation)
    except BundleCorrupt as damage:
        return _damaged(name, damage)


def stored_light(store: Store, name: str, known: DeploymentView | None = None) -> DeploymentView | None:
    """Return what the store says about a deployment beside its adapters, or None. Blocks.

    One that is known is returned again while its generation is the served one. Raise StoreUnavailable where the
    store does not answer.
    """
    try:
        pointer = read_pointer(store, name) if is_deployment_name(name) else None
        if pointer is None or (known is not None and known.generation == pointer.generation):
            return known
        generation = current_generation(store, name)
    except BundleCorrupt as damage:
        return _damaged(name, damage)
    if generation is None:
        return None
    time = generation.create_time
    return DeploymentView(name, BuildState.ACTIVE, generation.number, time, time)


def _damaged(name: str, damage: BundleCorrupt) -> DeploymentView:
    now = datetime.now(UTC)
    return DeploymentView(name, BuildState.FAILED, 0, now, now, failure=damage)


def served_number(store: Store, name: str) -> int:
    """Return the number of the served generation; 0 where there is none that is known. Blocks."""
    try:
        pointer = read_pointer(store, name)
    except BundleCorrupt:
        return 0
    return pointer.generation if pointer else 0


def _view(store: Store, generation: Generation) -> DeploymentView:
    adapters, damage = [], None
    for name, record in sorted(generation.adapters.items()):
        adapter = AdapterProgress(name, Stage.DONE, digest=record.digest)
        try:
            manifest = read_manifest(store, record.digest)
        except BundleCorrupt as found:
            damage = found
        else:
            extra = origin_warnings(manifest.base_model_name, record.licence, generation.base)
            adapter = adapter.described(record.digest, manifest, extra)
        adapters.append(adapter)
    return DeploymentView(
        generation.deployment,
        BuildState.FAILED if damage else BuildState.ACTIVE,
        generation.number,
        generation.create_time,
        generation.create_time,
        tuple(adapters),
        damage,
    )
