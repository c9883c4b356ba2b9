"""Bundles that are named by their digest."""

from __future__ import annotations

import asyncio

from loramux_shared.bundle.generation import AdapterRecord
from loramux_shared.bundle.reader import read_manifest
from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.faults import BundleCorrupt, SignatureInvalid, StoreUnavailable
from loramux_shared.storage.base import Store


class StoredBundles:
    """Reads the manifests of a store's bundles; each is verified."""

    def __init__(self, store: Store, *, refused: bool = False) -> None:
        """Read from a store; refused where only what a signed generation names may be served."""
        self._store = store
        self._refused = refused

    async def record(self, digest: str) -> AdapterRecord:
        """Return what a generation would say of a bundle.

        Raises:
            BundleCorrupt: the store has no such bundle, or its manifest is damaged.
            SignatureInvalid: nothing is served that is not signed.
            StoreUnavailable: the store does not answer.
        """
        if self._refused:
            raise SignatureInvalid(
                f"bundle {digest[:12]}: expected one of a signed generation, found one that is named "
                "by its digest. Add the adapter through a builder that signs."
            )
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
        return AdapterRecord(
            digest=digest,
            source=source,
            summary=manifest.summary,
            invocation_tokens=manifest.invocation_tokens,
        )
