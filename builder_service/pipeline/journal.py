"""Builds that were accepted and have not ended, kept in the store for a builder that is started again."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Final

import structlog
from pydantic import Field

from shared.bundle.manifest import Record
from shared.deployment import Deployment
from shared.faults import BundleCorrupt
from shared.storage.base import ObjectMissing, Store

log = structlog.get_logger()

_PREFIX: Final = "builds/"


class JournalEntry(Record):
    """An accepted build."""

    deployment: Deployment
    request_id: str = ""
    create_time: datetime
    attempt: int = Field(default=1, ge=1)
    """Counts the starts of the builder that ran it."""


class Journal:
    """One object per deployment that is being built; blocking."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def write(self, entry: JournalEntry) -> None:
        """Record a build before it begins."""
        self._store.put(_key(entry.deployment.model_name), entry.to_bytes())

    def remove(self, name: str) -> None:
        """Forget a build that ended."""
        self._store.delete(_key(name))

    def entries(self) -> Iterator[JournalEntry]:
        """Yield the builds that did not end; an entry that cannot be read is logged and removed."""
        for key in list(self._store.list(_PREFIX)):
            try:
                yield JournalEntry.from_bytes(self._store.get(key), what=key)
            except ObjectMissing:
                continue
            except BundleCorrupt as damage:
                log.warning("journal entry dropped", key=key, problem=damage.message)
                self._store.delete(key)


def _key(name: str) -> str:
    return f"{_PREFIX}{name}.json"
