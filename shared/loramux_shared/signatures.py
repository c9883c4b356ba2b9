"""Signers, whose signature is required, and the port of what makes and verifies signatures.

A signer is a public key (PEM), the authorities of certificates (PEM), or an identity that an OpenID issuer
vouched for, as Sigstore notes it: ``sigstore:ISSUER#IDENTITY``. People name the first two by their files.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

from loramux_shared.ports import required
from loramux_shared.storage.base import Store

SIGNATURE: Final = "model.sig"
"""Name of the signature, beside the files that it signs."""
MAX_SIGNATURE: Final = 4 << 20
"""Largest signature: about 200 bytes for each file that it lists."""
SIGSTORE: Final = "sigstore:"
MAX_SIGNER_BYTES: Final = 64 << 10
"""Largest signer; a bundle of authorities has a few KB."""
EXPECTED: Final = "the file of a public key or of certificates (PEM), or sigstore:ISSUER#IDENTITY"

_IDENTITY: Final = re.compile(r"sigstore:https://[^\s#]+#\S+")
_PEM: Final = re.compile(r"-----BEGIN ([A-Z ]+)-----\s[A-Za-z0-9+/=\s]+-----END \1-----")


@dataclass(frozen=True)
class SigningKey:
    """A private key on an elliptic curve (PEM) that signs, and certificates for it where there are some."""

    key: Path
    certificates: Path | None = None
    """The key's own first, then those that lead to an authority (PEM)."""


@dataclass(frozen=True)
class Signatures:
    """The port of what makes and verifies signatures."""

    require_signed: Callable[[bytes, Mapping[str, str], Sequence[str], str], None]
    """Raises `SignatureInvalid` unless one of the signers signed the files, which are sha256 by name: it is
    called with a signature, files, signers and what they are for.
    """
    signed_store: Callable[[Store, Sequence[str], SigningKey | None], Store]
    """Returns a store that reads no generation without a signature of the signers or the key. With a key, it
    signs each generation that it writes.
    """


def signatures() -> Signatures:
    """Return what makes and verifies signatures; raise SettingsInvalid where it is not installed."""
    return required("signatures", Signatures, "signatures that settings require")


def signed_store(store: Store, signers: Sequence[str], key: SigningKey | None = None) -> Store:
    """Return a store with signatures where settings ask for them, else the store itself.

    Raises:
        SettingsInvalid: nothing that is installed does that, or what the key signs would be refused.
    """
    return signatures().signed_store(store, signers, key) if signers or key else store


def parse_signer(text: str) -> str:
    """Return a signer as it is kept: PEM without what stands around it, or the spelling of an identity. Raise
    ValueError, which says what is expected, for everything else.
    """
    if len(text) > MAX_SIGNER_BYTES:
        raise ValueError(f"at most {MAX_SIGNER_BYTES} characters")
    if text.startswith(SIGSTORE):
        if not _IDENTITY.fullmatch(text):
            raise ValueError(
                "sigstore:ISSUER#IDENTITY, for example sigstore:https://accounts.google.com#me@my.org"
            )
        return text
    blocks = list(_PEM.finditer(text))
    kinds = [block[1] for block in blocks]
    if kinds != ["PUBLIC KEY"] and set(kinds) != {"CERTIFICATE"}:
        private = any("PRIVATE" in kind for kind in kinds)
        raise ValueError(f"{EXPECTED}, found a private key" if private else EXPECTED)
    return "".join(f"{block[0]}\n" for block in blocks)


def is_file(word: str) -> bool:
    """True for a signer that is named by its file."""
    return not word.startswith((SIGSTORE, "-----BEGIN"))


def read_signer(word: str, folder: Path) -> str:
    """Return the signer that a person names: a file, also relative to a folder, or what `parse_signer` reads.
    Raise ValueError for others, and for a file that cannot be read.
    """
    if not is_file(word):
        return parse_signer(word)
    try:
        path = folder / Path(word).expanduser()
        with path.open("rb") as file:
            return parse_signer(file.read(MAX_SIGNER_BYTES + 1).decode())
    except UnicodeDecodeError as error:
        raise ValueError(EXPECTED) from error
    except (OSError, RuntimeError) as error:  # no such user, too
        problem = error.strerror if isinstance(error, OSError) else "this user has no home"
        raise ValueError(f"{EXPECTED}; the file cannot be read: {problem}") from error


def label(signer: str) -> str:
    """Return a signer in a few words: a key by the beginning of its sha256, as a signature names it."""
    if signer.startswith(SIGSTORE):
        issuer, _, identity = signer.removeprefix(SIGSTORE).partition("#")
        return f"{identity} (by {issuer})"
    name = sha256(signer.encode()).hexdigest()[:12]
    return f"a certificate of authority {name}" if "CERTIFICATE" in signer else f"key {name}"
