"""Changes of a deployment: a generation that follows from the one before it, of which nothing gets lost.

A build says what a deployment is; a change says what is to be otherwise. Two changes that begin at the same
generation must both be in the end, on a store without conditional writes: docs/decisions/0036.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TypeAlias

from loramux_shared.bundle.claims import MAX_CLAIMS, STALE, alone, generation_numbers
from loramux_shared.bundle.deployments import (
    current_generation,
    is_deployment_name,
    point_at_highest,
    read_whole,
    stored_deployments,
)
from loramux_shared.bundle.generation import Generation, generation_key
from loramux_shared.faults import DeploymentNotFound, GenerationMismatch, StoreUnavailable
from loramux_shared.storage.base import Store

Change: TypeAlias = Callable[[Generation], Generation]
"""Returns what a generation becomes. It is called again on another generation where the first was not the
newest any more; what it raises ends the change, and nothing is published."""


def newest_generation(store: Store, name: str, known: Generation | None = None) -> Generation:
    """Return the highest whole generation of a deployment: the served one, or one that is about to be.

    One that is known, and is the highest, is not read again: it is immutable.

    Raises:
        DeploymentNotFound: there is none.
        BundleCorrupt: the served one cannot be read, and no higher one can.
        StoreUnavailable: the store does not answer.
    """
    numbers = generation_numbers(store, name) if is_deployment_name(name) else []
    if known is not None and numbers and numbers[-1] == known.number:
        return known
    served = None if not numbers else current_generation(store, name)
    if served is None:
        raise DeploymentNotFound(f"no deployment {name[:128]!r}; there are {stored_deployments(store)}")
    for number in reversed(numbers):
        if number <= served.number:
            break
        if (higher := read_whole(store, name, number)) is not None:
            return higher
    return served


def publish_change(
    store: Store,
    name: str,
    change: Change,
    *,
    expected: int | None = None,
    again: bool = False,
    known: Generation | None = None,
    stale: timedelta = STALE,
    check: Callable[[], None] = lambda: None,
) -> tuple[Generation, bool]:
    """Apply a change to the newest generation and serve what comes of it; returns it, and whether it is new.

    Nothing is published where the change changes nothing. With again, this may have been done already, by
    someone who was killed: then finding it done is right whatever was expected.

    Raises:
        GenerationMismatch: the newest generation is another than the expected one.
        DeploymentNotFound, BundleCorrupt: see `newest_generation`.
        DeploymentInvalid: the names of what comes of it do not fit together.
        StoreUnavailable: the store does not answer, or others publish the same deployment without end.
        Fault: what the change raises.
    """
    published: Generation | None = None
    for _ in range(MAX_CLAIMS):
        before = known = newest_generation(store, name, known)
        if not (published or again):
            require(before, expected)
        changed = change(before)
        if changed.same_content(before):
            return point_at_highest(store, before), published is not None
        changed.check_names()
        with alone(store, name, stale=stale, check=check) as number:
            before = newest_generation(store, name, before)
            if before.number > number:  # a build took a higher number meanwhile
                continue
            require(before, expected)
            changed = change(before)
            if changed.same_content(before):
                continue
            changed.check_names()
            update = {"number": number, "create_time": datetime.now(UTC)}
            published = changed.model_copy(update=update)
            store.put(generation_key(name, number), published.to_bytes())
        if point_at_highest(store, published).number == number:
            return published, True
        # Another builder took this one for dead and continued alone, or published after it: find out which.
    raise StoreUnavailable(f"{store.uri}: too many builders publish {name!r} at once. Try again later.")


def require(generation: Generation, expected: int | None) -> None:
    """Raise `GenerationMismatch` unless a generation is the expected one, or any is right."""
    if expected is not None and generation.number != expected:
        raise GenerationMismatch(
            f"deployment {generation.deployment}: expected generation {expected}, found {generation.number}. "
            "Look at what changed (`loramux history`), then repeat with the new number."
        )
