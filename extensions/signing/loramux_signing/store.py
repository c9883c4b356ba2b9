"""A store whose generations are signed.

::

    deployments/<name>/generations/<n>.json.sig     put before the generation that it signs

A generation names manifests by digest, and these name files by digest, so that one signature covers them all.
It lists one file, whose name is the generation's key: it is good in no other place.
"""

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, TypeAlias

from loramux_shared.bundle.generation import signature_key
from loramux_shared.bundle.manifest import sha256_hex
from loramux_shared.faults import SettingsInvalid, SignatureInvalid, SourceUnavailable, StoreUnavailable
from loramux_shared.signatures import SigningKey
from loramux_shared.sources.files import disk_errors
from loramux_shared.storage.base import Entry, ObjectMissing, Store
from loramux_signing.openssf import public_key, sign_folder, verified

Sign: TypeAlias = Callable[[str, bytes], bytes]
"""Returns the signature of what is under a key."""

_GENERATION: Final = re.compile(r"deployments/[^/]+/generations/[0-9]{8,}\.json")
_TRIED: Final = "deployments/-/generations/00000001.json"


class SignedStore:
    """Gives no generation that is not signed by one of the signers, and puts none without a signature.

    All else is as in the store below: it is used only where a generation leads to it, by its digest.
    """

    def __init__(self, store: Store, signers: Sequence[str], sign: Sign | None = None) -> None:
        self._store = store
        self._signers = tuple(signers)
        self._sign = sign
        self.uri = store.uri

    def get(self, key: str, bound: int | None = None) -> bytes:
        """Return an object's bytes, or raise as the store below, and `SignatureInvalid` of a generation."""
        data = self._store.get(key, bound)
        if _GENERATION.fullmatch(key):
            try:
                signature = self._store.get(signature_key(key))
            except ObjectMissing as missing:
                raise SignatureInvalid(
                    f"{key}: expected a signature, found none in {self.uri}. Build it with a builder that "
                    "signs, or sign it: `loramux sign`."
                ) from missing
            try:
                check_signature(key, data, signature, self._signers)
            except SourceUnavailable as fault:  # Sigstore; callers that read a store expect its absence
                raise StoreUnavailable(f"{key}: {fault.message}") from fault
        return data

    def put(self, key: str, data: bytes | Path) -> None:
        """Store bytes, or a file's content, under a key; of a generation the signature first."""
        if self._sign is not None and isinstance(data, bytes) and _GENERATION.fullmatch(key):
            self._store.put(signature_key(key), self._sign(key, data))
        self._store.put(key, data)

    def take(self, key: str, file: Path) -> None:
        """Store a file's content under a key, and remove the file."""
        self._store.take(key, file)

    def sha256(self, key: str) -> str | None:
        """Return the sha256 of an object in hex, or None when there is none."""
        return self._store.sha256(key)

    def list(self, prefix: str) -> Iterator[str]:
        """Yield the keys that begin with prefix, in lexicographic order."""
        return self._store.list(prefix)

    def entries(self, prefix: str) -> Iterator[Entry]:
        """Yield what `list` yields, with size and age."""
        return self._store.entries(prefix)

    def delete(self, key: str) -> None:
        """Remove an object; no error when there is none."""
        self._store.delete(key)


def check_signature(key: str, data: bytes, signature: bytes, signers: Sequence[str]) -> str:
    """Return the signer of the object under a key, in words.

    Raises:
        SignatureInvalid: it is by nobody of the signers.
    """
    signed = verified(signature, signers, signature_key(key))
    if signed.files != {key: sha256_hex(data)}:
        raise SignatureInvalid(
            f"{key}: expected the bytes that were signed, found others. "
            "The object was changed, or the signature belongs to another one."
        )
    return signed.by


def sign_object(key: str, data: bytes, by: SigningKey | None) -> bytes:
    """Return the signature of what is under a key; no key: by Sigstore."""
    with disk_errors(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder, key)
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        return sign_folder(Path(folder), by)


def signed_store(store: Store, signers: Sequence[str], key: SigningKey | None = None) -> Store:
    """Return a store that takes no generation without a signature, and signs its own with a key.

    With a key, generations of its own are good too, and it is tried whether what it signs is.

    Raises:
        SettingsInvalid: what the key signs would be refused, or the packages are missing.
    """
    if key is None:
        return SignedStore(store, signers)
    if key.certificates is None:
        signers = (*signers, public_key(key))
    elif not signers:
        raise SettingsInvalid(
            "LORAMUX_SIGNING_CERTIFICATES: expected LORAMUX_REQUIRE_SIGNATURE too, found none. "
            "Name the authorities of these certificates there."
        )

    def sign(name: str, data: bytes) -> bytes:
        return sign_object(name, data, key)

    try:
        check_signature(_TRIED, b"", sign(_TRIED, b""), signers)
    except SignatureInvalid as fault:
        raise SettingsInvalid(
            f"LORAMUX_SIGNING_KEY: the required signers do not include it: {fault.message}"
        ) from fault
    return SignedStore(store, signers, sign)
