"""Bundles that are named by their digest."""

from __future__ import annotations

import asyncio

from loramux_shared.bundle.generation import AdapterRecord
from loramux_shared.bundle.manifest import MANIFEST_FILE, bundle_key
from loramux_shared.bundle.reader import parse_manifest
from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.faults import BundleCorrupt, BundleNotFound, Finding, RequestInvalid, StoreUnavailable
from loramux_shared.storage.base import ObjectMissing, Store


class StoredBundles:
    """Reads the manifests of a store's bundles; each is verified."""

    def __init__(self, store: Store, *, refused: bool = False) -> None:
        """Read from a store; refused where only what a signed generation names may be served."""
        self._store = store
        self._refused = refused

    async def record(self, digest: str) -> AdapterRecord:
        """Return what a generation would say of a bundle.

        Raises:
            BundleNotFound: the store has no such bundle.
            BundleCorrupt: its manifest is damaged.
            RequestInvalid: only what a signed generation names is served.
            StoreUnavailable: the store does not answer.
        """
        if self._refused:
            finding = Finding(
                code="E_BAD_FIELD",
                where="lora_path",
                expected="an adapter that comes with a signed generation",
                found=f"bundle:{digest[:12]}...",
                fix="Add the adapter through a builder that signs.",
            )
            raise RequestInvalid("this replica serves only signed bundles.", [finding])
        try:
            data = await asyncio.to_thread(self._store.get, bundle_key(digest, MANIFEST_FILE))
            manifest = parse_manifest(data, digest)
        except ObjectMissing as missing:
            raise BundleNotFound(
                f"bundle:{digest}: the store has no bundle of this digest. Build it, or name another."
            ) from missing
        except StoreUnavailable as fault:
            raise fault.with_message(
                "the store does not answer, so the bundle cannot be read. Retry."
            ) from fault
        except BundleCorrupt as fault:
            raise fault.with_message(
                f"bundle {digest[:12]}: its manifest is damaged in the store. Build it again, or name another."
            ) from fault
        # No bundle says where it came from, and this record is stored nowhere.
        source = Repository(source=SourceKind.PUSHED, repo=f"bundle:{digest}")
        return AdapterRecord(
            digest=digest,
            source=source,
            summary=manifest.summary,
            invocation_tokens=manifest.invocation_tokens,
        )
