"""Bundles that are named by their digest."""

from __future__ import annotations

import asyncio

from loramux_shared.bundle.manifest import AdapterRecord
from loramux_shared.bundle.reader import read_manifest
from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.faults import BundleCorrupt, StoreUnavailable
from loramux_shared.storage.base import Store


class StoredBundles:
    """Reads the manifests of a store's bundles; each is verified."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def record(self, digest: str) -> AdapterRecord:
        """Return what a generation would say of a bundle.

        Raises:
            BundleCorrupt: the store has no such bundle, or its manifest is damaged.
            StoreUnavailable: the store does not answer.
        """
        try:
            manifest = await asyncio.to_thread(read_manifest, self._store, digest)
        except StoreUnavailable as fault:
            raise fault.retold("the store does not answer, so the bundle cannot be read. Retry.") from fault
        except BundleCorrupt as fault:
            raise fault.retold(
                f"the store has no bundle {digest[:12]} whose manifest is right. Build it, or name another."
            ) from fault
        # Where it came from is told by no bundle, and this record is stored nowhere.
        source = Repository(source=SourceKind.PUSHED, repo=f"bundle:{digest}")
        return AdapterRecord(digest=digest, source=source, summary=manifest.summary)
