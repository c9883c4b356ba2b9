"""A rollback: the content of an older generation as the newest one."""

from __future__ import annotations

from builder_service.pipeline.build import BuildResult, digests_of
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.publish import hold
from loramux_shared.bundle.changes import newest_generation, publish_change, require
from loramux_shared.bundle.claims import generation_numbers
from loramux_shared.bundle.deployments import read_generation
from loramux_shared.bundle.generation import Generation
from loramux_shared.faults import GenerationNotFound
from loramux_shared.storage.patient import PatientStore
from loramux_shared.wording import listed


def rollback(name: str, to: int | None, expected: int | None, context: BuildContext) -> BuildResult:
    """Publish what an older generation says; None: the one before the newest. Blocks.

    Raises:
        DeploymentNotFound: there is no such deployment.
        GenerationNotFound: it has no such generation; the message lists those that it has.
        DeploymentInvalid: the names of the older generation do not fit together.
        GenerationMismatch: the newest generation is another than the expected one.
        BundleCorrupt: the older generation, or a bundle to which it refers, is not whole any more.
        StoreUnavailable: the store does not answer.
    """
    store = PatientStore(context.store)
    before = newest_generation(store, name)
    require(before, expected)
    numbers = generation_numbers(store, name)
    chosen = to or max((number for number in numbers if number < before.number), default=0)
    if chosen not in numbers:
        which = f"no generation {to}" if to else "no generation before the newest"
        raise GenerationNotFound(
            f"deployment {name} has {which}; it has {listed([str(number) for number in reversed(numbers)])}"
        )
    target = read_generation(store, name, chosen)
    held: set[str] = set(digests_of(before))

    def change(current: Generation) -> Generation:
        lost = digests_of(target) - digests_of(current) - held
        hold(store, lost)
        held.update(lost)
        return target

    hold(store, digests_of(target) - held)
    with context.publishing(name):
        generation, new = publish_change(store, name, change, expected=expected, known=before)
    return BuildResult(generation, unchanged=not new, restored=chosen)
