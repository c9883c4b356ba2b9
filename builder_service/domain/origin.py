"""Warnings about an adapter's origin: the name of its base, and the licences of both."""

from __future__ import annotations

from collections.abc import Sequence

from builder_service.domain.base_names import base_warning
from loramux_shared.bundle.generation import BaseRecord, Descent
from loramux_shared.faults import Finding
from loramux_shared.sources.licence import OTHER, README


def origin_warnings(
    named: str, licence: str, base: BaseRecord, lineage: Sequence[Descent] = ()
) -> list[Finding]:
    """Return the warnings about the base and the licence that an adapter names."""
    found = (base_warning(named, base.source.shown, lineage), licence_warning(licence, base.licence))
    return [finding for finding in found if finding is not None]


def licence_warning(adapter: str, base: str) -> Finding | None:
    """Return a warning where an adapter and its base have different licences, or only one says which.

    Whether one allows the other is for people to say.
    """
    if not adapter and not base:
        return None
    known = not any(
        licence.casefold() in ("", OTHER) or licence.startswith("see ") for licence in (adapter, base)
    )
    if known and adapter.casefold() == base.casefold():
        return None
    return Finding(
        code="W_LICENSE",
        where=f"{README}: license",
        expected=f"{base or 'none that is said'}, as the base",
        found=adapter or "none",
        fix="See that both licences allow what you do.",
    )
