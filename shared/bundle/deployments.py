"""Deployments in a store: immutable generations, and one pointer to the served one."""

from __future__ import annotations

import re
from collections.abc import Callable

import structlog

from shared.bundle.manifest import Current, Generation, current_key, generation_key, sha256_hex
from shared.faults import BundleCorrupt
from shared.storage.base import ObjectMissing, Store

log = structlog.get_logger()

_PREFIX = "deployments/"
_CURRENT = re.compile(r"deployments/([^/]+)/current\.json")
_GENERATION = re.compile(r"deployments/[^/]+/generations/([0-9]{8,})\.json")


def is_deployment_name(name: str) -> bool:
    """True when a name can stand in a key."""
    return re.fullmatch(r"[a-zA-Z0-9_\-.:]{1,128}", name) is not None and name not in {".", ".."}


def list_deployments(store: Store) -> list[str]:
    """Return the names of the deployments that have a generation, in order."""
    return sorted({match[1] for key in store.list(_PREFIX) if (match := _CURRENT.fullmatch(key))})


def current_generation(store: Store, name: str) -> Generation | None:
    """Return the served generation, or None when the store has no such deployment.

    Raises:
        BundleCorrupt: the pointer or the generation is damaged, or the generation is missing.
        StoreUnavailable: the store does not answer.
    """
    if not is_deployment_name(name):
        return None
    try:
        data = store.get(current_key(name))
    except ObjectMissing:
        return None
    current = Current.from_bytes(data, what=f"deployment {name}: current.json")
    return read_generation(store, name, current.generation, sha256=current.sha256)


def read_generation(store: Store, name: str, number: int, *, sha256: str | None = None) -> Generation:
    """Return a generation, against its digest where one is known.

    Raises:
        BundleCorrupt: it is missing, has another digest, or is another one's.
        StoreUnavailable: the store does not answer.
    """
    what = f"deployment {name}: generation {number}"
    try:
        data = store.get(generation_key(name, number))
    except ObjectMissing as missing:
        raise BundleCorrupt(
            f"{what}: expected an object, found none in {store.uri}. Rebuild the deployment."
        ) from missing
    generation = Generation.from_bytes(data, sha256=sha256, what=what)
    if (generation.deployment, generation.number) != (name, number):
        raise BundleCorrupt(
            f"{what}: expected itself, found generation {generation.number} of {generation.deployment}"
        )
    return generation


def generation_numbers(store: Store, name: str) -> list[int]:
    """Return the numbers of a deployment's generations, ascending, served or not."""
    keys = store.list(f"{_PREFIX}{name}/generations/")
    return sorted(int(match[1]) for key in keys if (match := _GENERATION.fullmatch(key)))


def publish_generation(store: Store, generation: Generation) -> Generation:
    """Make a generation the served one and return it as published: with the next free number.

    The bundles that it names must be in the store already. The current generation is returned, and nothing
    is written, when it has the same content. A generation that a killed builder left without a pointer is
    taken up when it has this content, and skipped otherwise. The pointer is written last; damaged records
    are logged and replaced.

    Raises:
        StoreUnavailable: the store does not answer.
    """
    name = generation.deployment
    current = _unless_damaged(lambda: current_generation(store, name))
    if current is not None and current.same_content(generation):
        return current
    numbers = generation_numbers(store, name)
    served = current.number if current else 0
    if numbers and numbers[-1] > served:
        left = _unless_damaged(lambda: _canonical(store, name, numbers[-1]))
        if left is not None and left.same_content(generation):
            return _point(store, left)
    number = max([served, *numbers]) + 1
    published = generation.model_copy(update={"number": number})
    store.put(generation_key(name, number), published.to_bytes())
    return _point(store, published)


def _canonical(store: Store, name: str, number: int) -> Generation:
    """Read a generation that no pointer vouches for: its bytes must be those that we would write."""
    found = read_generation(store, name, number)
    return read_generation(store, name, number, sha256=sha256_hex(found.to_bytes()))


def _unless_damaged(read: Callable[[], Generation | None]) -> Generation | None:
    try:
        return read()
    except BundleCorrupt as damage:
        log.warning("damaged record", problem=damage.message)
        return None


def _point(store: Store, generation: Generation) -> Generation:
    pointer = Current(generation=generation.number, sha256=sha256_hex(generation.to_bytes()))
    store.put(current_key(generation.deployment), pointer.to_bytes())
    return generation
