"""Changes of the served adapters by an API: through a builder or, for bundles, in this replica alone."""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Final

from inference_service.adapters.adapter_set import AdapterSet
from inference_service.adapters.ports import Bundles, GenerationFollower, Publisher
from loramux_shared.bundle.generation import AdapterRecord
from loramux_shared.bundle.manifest import MANIFEST_FILE, bundle_key
from loramux_shared.bundle.reader import parse_manifest
from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.faults import (
    AdapterExists,
    BundleCorrupt,
    BundleNotFound,
    DeploymentInvalid,
    Finding,
    NoBuilder,
    ReplicaBehind,
    RequestInvalid,
    StoreUnavailable,
)
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


BUNDLE: Final = "bundle:"
"""Prefix of a bundle that the store has: ``bundle:`` and its digest."""
_HUBS: Final = ("huggingface://", "hf://", "huggingface:")
_GCS: Final = "gcs://"
"""AIBrix's spelling of ``gs://``."""
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
EXPECTED: Final = (
    "org/name[@revision], hf://, huggingface://, s3://, gs://, azure://, https:// or oci://, an absolute path "
    "of the builder's machine, or bundle:DIGEST"
)


def digest_of(path: str) -> str | None:
    """Return the digest that ``bundle:DIGEST`` names; None for every other path.

    Raises:
        RequestInvalid: what stands behind ``bundle:`` is no digest.
    """
    if not path.startswith(BUNDLE):
        return None
    digest = path.removeprefix(BUNDLE)
    if not _DIGEST.fullmatch(digest):
        raise _invalid(path, "64 hex digits after bundle:")
    return digest


def repository_of(path: str) -> Repository:
    """Return the repository that a path names; nothing of this machine is looked at.

    Raises:
        RequestInvalid: it names none.
    """
    path = f"gs://{path.removeprefix(_GCS)}" if path.startswith(_GCS) else path
    word = next((f"hf:{path.removeprefix(hub)}" for hub in _HUBS if path.startswith(hub)), path)
    if word == path and not path.startswith("/") and "://" not in path and not path.startswith("hf:"):
        word = f"hf:{path}"  # otherwise a folder of that name would win
    if "\0" in path or ".." in PurePosixPath(path).parts or path.startswith(("~", ".")):
        raise _invalid(path, EXPECTED)
    try:
        return parse_repository(word)
    except DeploymentInvalid:
        raise _invalid(path, EXPECTED) from None


def _invalid(path: str, expected: str) -> RequestInvalid:
    masked = re.sub(r"\?.*", "?***", path)[:120]
    finding = Finding(code="E_BAD_FIELD", where="lora_path", expected=expected, found=repr(masked))
    return RequestInvalid("the path names no adapter.", [finding])


class Changing:
    """Changes names, and returns when this replica serves the change.

    A replica does not convert: what is not a bundle yet is given to a builder, which publishes the next
    generation, so that a change through one replica reaches all of them and survives restarts.
    """

    def __init__(
        self,
        adapters: AdapterSet,
        follower: GenerationFollower,
        bundles: Bundles | None = None,
        publisher: Publisher | None = None,
    ) -> None:
        """Change names; bundles is None where they never change, publisher where no builder is known."""
        self._adapters = adapters
        self._follower = follower
        self._bundles = bundles
        self._publisher = publisher

    async def add(self, name: str, path: str | Repository, *, replace: bool = False) -> bool:
        """Add a name, or give it another version; return whether a generation of the deployment has it.

        Raises:
            RequestInvalid: the path names no adapter, a bundle's name cannot be one of this replica, or the
                replica serves only what is signed.
            DeploymentInvalid: the builder finds that the name does not fit the others.
            AdapterExists: the name is taken, and is not to be replaced.
            NoBuilder: the path names no bundle, and no builder is known; or no name can change here.
            ReplicaBehind: it was published, and this replica does not serve it yet.
            BundleNotFound: of bundle:DIGEST, the store has no such bundle.
            BundleCorrupt: likewise, its manifest is damaged.
            StoreUnavailable: it does not answer.
        """
        if isinstance(path, str) and (digest := digest_of(path)) is not None:
            await self._load_bundle(name, digest, replace=replace)
            return False
        repository = repository_of(path) if isinstance(path, str) else path
        await self._publish(name, repository, replace=replace)
        return True

    async def remove(self, name: str) -> int | None:
        """Take a name away; return the generation that lacks it, or None where this replica alone had it.

        Raises:
            NoBuilder: a generation has it, and no builder is known.
            ReplicaBehind: the generation was published, and this replica does not serve it yet.
        """
        if self._adapters.is_own(name):
            self._adapters.remove(name)
            return None
        generation = await self._builder().remove(name)
        await self._follower.catch_up(generation)
        return generation

    async def roll_back(self, to: int | None) -> int:
        """Have an older generation published again; return its new number.

        Raises:
            NoBuilder: no builder is known.
            ReplicaBehind: the generation was published, and this replica does not serve it yet.
        """
        generation = await self._builder().roll_back(to)
        await self._follower.catch_up(generation)
        return generation

    def _builder(self) -> Publisher:
        if self._publisher is None:
            raise NoBuilder(
                "this replica has no builder, and only a builder can change the deployment. Start it with "
                "--builder HOST:PORT, or load a bundle that the store has: bundle:DIGEST."
            )
        return self._publisher

    def _taken(self, name: str) -> bool:
        catalog = self._adapters.catalog
        return name != catalog.base_name and any(model.name == name for model in catalog.everything)

    def _require_free(self, name: str, *, replace: bool) -> None:
        if not replace and self._taken(name):
            raise _already_loaded(name)

    async def _publish(self, name: str, repository: Repository, *, replace: bool) -> None:
        builder = self._builder()
        self._require_free(name, replace=replace)
        try:
            number = await builder.add(name, repository, must_be_new=not replace)
        except AdapterExists as fault:
            if not self._taken(name):  # published a moment ago, through another replica
                with suppress(ReplicaBehind):
                    await self._follower.catch_up(self._follower.standing.generation + 1)
            raise _already_loaded(name) from fault
        await self._follower.catch_up(number)

    async def _load_bundle(self, name: str, digest: str, *, replace: bool) -> None:
        if self._bundles is None:
            raise NoBuilder("the names of this replica never change. Serve the bundle from another one.")
        self._require_free(name, replace=replace)
        self._adapters.check_own(name)
        record = await self._bundles.record(digest)
        self._require_free(name, replace=replace)
        self._adapters.add(name, record)


def _already_loaded(name: str) -> AdapterExists:
    return AdapterExists(
        f"The lora adapter '{name}' has already been loaded. Say load_inplace (replace), or unload it."
    )
