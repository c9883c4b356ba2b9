"""Signatures in the form of OpenSSF model signing, which the command ``model_signing`` writes and reads too.

A signature is a Sigstore bundle with a DSSE envelope around an in-toto statement, which lists files with
their sha256. The library of that name makes and verifies it; which files it must list says who reads them.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loramux_shared.faults import SettingsInvalid, SignatureInvalid, SourceUnavailable
from loramux_shared.signatures import MAX_SIGNATURE, SIGNATURE, SIGSTORE, SigningKey, label
from loramux_shared.sources.files import disk_errors
from loramux_shared.untrusted_json import parse_json
from loramux_shared.wording import listed

GIT: Final = (".git", ".gitattributes", ".github", ".gitignore")
"""Never signed, as in the library."""


@dataclass(frozen=True)
class Signed:
    """The content of a signature, after it was verified."""

    files: Mapping[str, str]
    """sha256 by name."""
    ignored: tuple[str, ...]
    """Names that were left out when it was made."""
    by: str
    """Signer, in words."""


def verified(signature: bytes, signers: Sequence[str], what: str) -> Signed:
    """Return what is signed by one of the signers.

    Raises:
        SignatureInvalid: it is nobody's of them, or no signature of files by their sha256.
        SettingsInvalid: the packages are missing, or a signer's key cannot be used.
        SourceUnavailable: Sigstore does not answer.
    """
    _check_form(signature, what)
    reasons = []
    for signer in signers:
        check, failures = _verifier(signer)
        with _file(signature) as path:
            try:
                manifest = check(path)
            except failures as error:
                reasons.append(f"not of {label(signer)} ({_reason(error)})")
                continue
        return _signed(manifest, label(signer), what)
    raise SignatureInvalid(
        f"{what}: expected a signature of {' or '.join(map(label, signers))}, found one that is "
        f"{listed(reasons)}. Sign it with the right key (`loramux sign`), or correct the required signer."
    )


def sign_folder(folder: Path, key: SigningKey | None) -> bytes:
    """Return the signature of all files of a folder but the signature itself and git's; no key: by Sigstore.

    Raises:
        SignatureInvalid: a file cannot be signed, as a link cannot.
        SettingsInvalid: the packages are missing, or the key cannot be used.
    """
    with _library():
        from model_signing import hashing, signing
    config = signing.Config()
    failures = _failures()
    with _usable(key, failures):
        if key is None:
            with _sigstore():
                config.use_sigstore_signer(use_ambient_credentials=True)
        elif key.certificates is None:
            config.use_elliptic_key_signer(private_key=key.key)
        else:  # the file holds the whole chain; its first certificate is the key's
            chain = [key.certificates]
            config.use_certificate_signer(
                private_key=key.key, signing_certificate=key.certificates, certificate_chain=chain
            )
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=True))
    with disk_errors(), tempfile.TemporaryDirectory() as place:
        try:
            config.sign(folder, Path(place) / SIGNATURE)
        except failures as error:
            raise SignatureInvalid(f"{folder}: cannot be signed: {_reason(error)}") from error
        return (Path(place) / SIGNATURE).read_bytes()


def public_key(key: SigningKey) -> str:
    """Return who signs with a key, as a signer.

    Raises:
        SettingsInvalid: the packages are missing, or the key cannot be used.
    """
    with _library():
        from cryptography.hazmat.primitives import serialization
    with _usable(key, _failures()):
        private = serialization.load_pem_private_key(key.key.read_bytes(), None)
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        return private.public_key().public_bytes(serialization.Encoding.PEM, form).decode()


def _signed(manifest: Any, by: str, what: str) -> Signed:
    serialization = manifest.serialization_type
    entries = list(manifest.resource_descriptors())
    if serialization["method"] != "files" or any(entry.digest.algorithm != "sha256" for entry in entries):
        raise SignatureInvalid(
            f"{what}: expected the sha256 of whole files, found another digest or parts of files. "
            "Sign it with `loramux sign`, or with model_signing's defaults."
        )
    ignored = serialization.get("ignore_paths", ())
    return Signed({e.identifier: e.digest.digest_hex for e in entries}, tuple(map(str, ignored)), by)


def _check_form(signature: bytes, what: str) -> None:
    """Refuse what the library would read without bounds, or with a word on stdout."""
    try:
        material = parse_json(signature[: MAX_SIGNATURE + 1].decode())["verificationMaterial"]
        key = material.get("publicKey")
        hinted = key is None or (isinstance(key["hint"], str) and bool(key["hint"]))
        form = hinted and len(signature) <= MAX_SIGNATURE
    except (ValueError, KeyError, TypeError, AttributeError):
        form = False
    if not form:
        raise SignatureInvalid(
            f"{what}: expected a signature of OpenSSF model signing 1.0 or newer of at most {MAX_SIGNATURE} "
            "bytes, found something else. Sign it again: `loramux sign`."
        )


def _verifier(signer: str) -> tuple[Callable[[Path], Any], tuple[type[Exception], ...]]:
    """Return what reads a signature and gives what is signed, and what it raises otherwise."""
    with _library():
        from model_signing._signing import sign_certificate, sign_ec_key, sign_sigstore, sign_sigstore_pb
    failures = _failures()
    if signer.startswith(SIGSTORE):
        issuer, _, identity = signer.removeprefix(SIGSTORE).partition("#")

        def by_sigstore(path: Path) -> Any:
            with _sigstore():
                verifier = sign_sigstore.Verifier(identity=identity, oidc_issuer=issuer)
            return verifier.verify(sign_sigstore.Signature.read(path))

        return by_sigstore, failures
    with _file(signer.encode()) as path, _usable(signer, failures):
        of_authorities = "CERTIFICATE" in signer
        verifier = sign_certificate.Verifier([path]) if of_authorities else sign_ec_key.Verifier(path)
    return lambda signature: verifier.verify(sign_sigstore_pb.Signature.read(signature)), failures


def _failures() -> tuple[type[Exception], ...]:
    """Return what the library and those below it raise about keys, signatures and what is in them."""
    with _library():
        from cryptography import x509
        from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
        from OpenSSL import crypto
        from sigstore.errors import Error
        from sigstore.oidc import IdentityError
    of_certificates = (x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType)
    of_openssl = (crypto.Error, crypto.X509StoreContextError)
    in_python = (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, OSError)
    return (
        *in_python,
        InvalidSignature,
        UnsupportedAlgorithm,
        *of_certificates,
        *of_openssl,
        Error,
        IdentityError,
    )


@contextmanager
def _library() -> Iterator[None]:
    """Turn an import that fails into `SettingsInvalid`."""
    try:
        yield
    except ImportError as error:
        raise SettingsInvalid(
            f"signatures need packages that are not installed ({error.name}): pip install 'loramux[signing]'"
        ) from None


@contextmanager
def _sigstore() -> Iterator[None]:
    """Turn a Sigstore that does not answer, whose keys are fetched, into `SourceUnavailable`."""
    with _library():
        from sigstore.errors import NetworkError, TUFError
    try:
        yield
    except (TUFError, NetworkError, OSError) as error:
        raise SourceUnavailable(f"Sigstore does not answer ({_reason(error)}). Retry.") from error


@contextmanager
def _usable(key: SigningKey | str | None, failures: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turn what is wrong with a key into `SettingsInvalid`."""
    try:
        yield
    except failures as error:
        which = label(key) if isinstance(key, str) else "Sigstore" if key is None else f"the key {key.key}"
        raise SettingsInvalid(
            f"{which}: expected a key on the curve P-256, P-384 or P-521 (PEM, without a password), with "
            f"its certificates, if they are set: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    words = " ".join(reason.split())[:200].rstrip(". ")
    return words if isinstance(error, ValueError | OSError) and words else type(error).__name__


@contextmanager
def _file(data: bytes) -> Iterator[Path]:
    """Yield a file with some bytes: the library reads nothing else."""
    with disk_errors(), tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        yield Path(file.name)
