"""Lineage: what bases were made from, where an extension asks a hub for it."""

from collections.abc import Callable, Iterable
from typing import TypeAlias

from loramux_shared.bundle.generation import Descent
from loramux_shared.deployment import Repository
from loramux_shared.extensions import PARTS, find_extensions, load_extension
from loramux_shared.sources.open import Sources

Lineage: TypeAlias = Callable[[str, Repository, Iterable[Repository]], tuple[Descent, ...]]
"""Returns what is known of the base that an adapter names and of the deployment's, for adapters from there."""


def lineage(sources: Sources) -> Lineage:
    """Return the lineage for one build; nothing is known without the extension."""
    found = find_extensions(PARTS).get("lineage")
    return load_extension(found).Lineages(sources).of if found else lambda *_: ()
