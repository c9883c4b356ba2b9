"""Adapters as an API names them: a repository, or a bundle of the store."""

import asyncio
import re
from pathlib import PurePosixPath
from typing import Final

from loramux_shared.bundle.generation import AdapterRecord
from loramux_shared.bundle.manifest import MANIFEST_FILE, bundle_key
from loramux_shared.bundle.reader import parse_manifest
from loramux_shared.deployment import SPELLINGS, Repository, SourceKind, spelled
from loramux_shared.faults import (
    AdapterExists,
    BundleCorrupt,
    BundleNotFound,
    DeploymentInvalid,
    RequestInvalid,
    StoreUnavailable,
)
from loramux_shared.sources.entries import addressed_sources
from loramux_shared.spelling import parse_repository
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
            raise RequestInvalid.of_field(
                "this replica serves only signed bundles.",
                "lora_path",
                "an adapter that comes with a signed generation",
                f"bundle:{digest[:12]}...",
                "Add the adapter through a builder that signs.",
            )
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
            digest=digest, source=source, summary=manifest.summary, invocation_tokens=manifest.invocation_tokens
        )


BUNDLE: Final = "bundle:"
"""Prefix of a bundle that the store has: ``bundle:`` and its digest."""
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


def digest_of(path: str) -> str | None:
    """Return the digest of ``bundle:DIGEST``, None for every other path; raise RequestInvalid for no digest."""
    if not path.startswith(BUNDLE):
        return None
    digest = path.removeprefix(BUNDLE)
    if not _DIGEST.fullmatch(digest):
        raise _invalid(path, "64 hex digits after bundle:")
    return digest


def repository_of(path: str) -> Repository:
    """Return the repository that a path names, without a look at this machine; raise RequestInvalid if none."""
    word = spelled(path)
    if not word.startswith(("/", "hf:")) and "://" not in word:
        word = f"hf:{path}"  # otherwise a folder of that name would win
    if "\0" in path or ".." in PurePosixPath(path).parts or path.startswith(("~", ".")):
        raise _no_path(path)
    try:
        return parse_repository(word)
    except DeploymentInvalid:
        raise _no_path(path) from None


def _no_path(path: str) -> RequestInvalid:
    schemes = ", ".join((*SPELLINGS, *(each.scheme for each in addressed_sources())))
    expected = f"org/name[@revision], {schemes}, an absolute path of the builder's machine, or bundle:DIGEST"
    return _invalid(path, expected)


def _invalid(path: str, expected: str) -> RequestInvalid:
    masked = re.sub(r"\?.*", "?***", path)[:120]
    return RequestInvalid.of_field("the path names no adapter.", "lora_path", expected, repr(masked))


def already_loaded(name: str) -> AdapterExists:
    """Return the fault of a name that is taken."""
    return AdapterExists(
        f"The lora adapter '{name}' has already been loaded. Say load_inplace (replace), or unload it."
    )
