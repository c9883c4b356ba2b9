"""Folders that are signed: what differs from what was signed."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from loramux_shared.adapter_files import pieces_of
from loramux_shared.faults import SignatureInvalid
from loramux_shared.signatures import MAX_SIGNATURE, SIGNATURE
from loramux_shared.sources.files import hash_if_there
from loramux_shared.wording import listed
from loramux_signing.openssf import GIT, Signed, verified


def verify_folder(folder: Path, signature: Path, signers: Sequence[str]) -> Signed:
    """Return what is signed of a folder, after each of its files was compared.

    Raises:
        SignatureInvalid: the signature is nobody's of the signers, or files differ, lack or were not signed.
    """
    signed = verified(read_signature(signature), signers, str(signature))
    found = dict(_digests(folder, signed.ignored, signature))
    if problems := [*differences(signed.files, found), *_unread(signed.files, found)]:
        raise SignatureInvalid(
            f"{folder}: expected the files that were signed, found {listed(problems, 5)}. "
            "Restore them, or sign them again: `loramux sign`."
        )
    return signed


def read_signature(path: Path) -> bytes:
    """Return the bytes of a signature.

    Raises:
        SignatureInvalid: there is none, or it is no such file.
    """
    try:
        data = b""
        for piece in pieces_of(path):
            data += piece
            if len(data) > MAX_SIGNATURE:
                break  # which the form says
    except OSError as error:
        raise SignatureInvalid(
            f"{path}: expected a signature, found none ({error.strerror}). Sign it: `loramux sign`."
        ) from error
    return data


def require_signed(signature: bytes, files: Mapping[str, str], signers: Sequence[str], what: str) -> None:
    """Raise unless one of the signers signed each of these files, sha256 by name.

    Other files that were signed need not be here.

    Raises:
        SignatureInvalid: the signature is nobody's of them, or files differ or were not signed.
    """
    signed = verified(signature, signers, what)
    found = {name: sha256 for name, sha256 in files.items() if name != SIGNATURE}
    if problems := differences(signed.files, found):
        raise SignatureInvalid(
            f"{what}: expected the files that were signed, found {listed(problems, 5)}. "
            "Restore them, or sign them again: `loramux sign`."
        )


def differences(signed: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Return in words which of the files that were found, by sha256, are not those that were signed."""
    return [
        f"{name} ({'changed' if name in signed else 'not signed'})"
        for name, sha256 in sorted(found.items())
        if signed.get(name) != sha256
    ]


def _unread(signed: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    return [f"{name} (gone)" for name in sorted(signed.keys() - found.keys())]


def _digests(folder: Path, ignored: Sequence[str], signature: Path) -> Iterator[tuple[str, str]]:
    """Yield name and sha256 of each file of a folder that must have been signed."""
    spared = {PurePosixPath(name) for name in (*ignored, *GIT, SIGNATURE)}
    for place, folders, names in os.walk(folder):
        folders.sort()
        links = [name for name in folders if Path(place, name).is_symlink()]
        for path in (Path(place) / name for name in (*names, *links)):
            name = PurePosixPath(path.relative_to(folder).as_posix())
            if path == signature or not spared.isdisjoint((name, *name.parents)):
                continue
            if path.is_symlink() or (digest := hash_if_there(path)) is None:
                raise SignatureInvalid(
                    f"{path}: expected a file, found a link or a device. Replace it by a copy of its target."
                )
            yield str(name), digest.sha256
