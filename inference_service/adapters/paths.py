"""What is meant by the path of an adapter, as trainers and controllers write it."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Final

from loramux_shared.deployment import Repository
from loramux_shared.faults import DeploymentInvalid, Finding, RequestInvalid
from loramux_shared.spelling import parse_repository

BUNDLE: Final = "bundle:"
"""Of a bundle that the store has: ``bundle:`` and its digest."""
_HUBS: Final = ("huggingface://", "hf://", "huggingface:")
_GCS: Final = "gcs://"
"""AIBrix's spelling of ``gs://``."""
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
EXPECTED: Final = (
    "org/name[@revision], hf://, huggingface://, s3://, gs://, azure:// or https://, an absolute path of the "
    "builder's machine, or bundle:DIGEST"
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
        raise _invalid(path, "64 hex digits behind bundle:")
    return digest


def repository_of(path: str) -> Repository:
    """Return the repository that a path names; nothing of this machine is looked at.

    Raises:
        RequestInvalid: it names none.
    """
    path = f"gs://{path.removeprefix(_GCS)}" if path.startswith(_GCS) else path
    word = next((f"hf:{path.removeprefix(hub)}" for hub in _HUBS if path.startswith(hub)), path)
    if word == path and not path.startswith("/") and "://" not in path and not path.startswith("hf:"):
        word = f"hf:{path}"  # else a folder of that name would be meant, where there is one
    if "\0" in path or ".." in PurePosixPath(path).parts or path.startswith(("~", ".")):
        raise _invalid(path, EXPECTED)
    try:
        return parse_repository(word)
    except DeploymentInvalid:
        raise _invalid(path, EXPECTED) from None


def _invalid(path: str, expected: str) -> RequestInvalid:
    shown = re.sub(r"\?.*", "?***", path)[:120]
    finding = Finding(code="E_BAD_FIELD", where="lora_path", expected=expected, found=repr(shown))
    return RequestInvalid("the path names no adapter.", [finding])
