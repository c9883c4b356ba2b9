"""Authorship: the files of an adapter must have a signature of a signer that the deployment names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from loramux_shared.bundle.manifest import FileDigest
from loramux_shared.faults import Finding, SignatureInvalid
from loramux_shared.signing.folder import require_signed
from loramux_shared.signing.openssf import MAX_BYTES, SIGNATURE

_FIX: Final = "Sign the folder with one of the keys of signed_by: `loramux sign`."


def no_signature(sizes: Mapping[str, int]) -> list[Finding]:
    """Return what is wrong where there is no signature among files that could be one."""
    size = sizes.get(SIGNATURE)
    if size is not None and size <= MAX_BYTES:
        return []
    found = "none" if size is None else f"{size} bytes"
    expected = f"a signature of at most {MAX_BYTES} bytes"
    return [Finding(code="E_SIGNATURE", where=SIGNATURE, expected=expected, found=found, fix=_FIX)]


def take_signature(folder: Path, files: dict[str, FileDigest], signed_by: tuple[str, ...]) -> list[Finding]:
    """Take the signature out of an adapter's files, and return what is wrong with it, if anybody is named.

    Raises:
        SettingsInvalid: the packages that read signatures are not installed here.
        SourceUnavailable: Sigstore does not answer.
    """
    signature = files.pop(SIGNATURE, None)
    if signature is None or not signed_by:
        return []
    try:
        require_signed((folder / SIGNATURE).read_bytes(), files, signed_by, SIGNATURE)
    except SignatureInvalid as fault:
        return [Finding(code="E_SIGNATURE", found=fault.message.rstrip("."))]
    finally:
        (folder / SIGNATURE).unlink()
    return []
