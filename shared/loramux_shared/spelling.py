"""Repositories as people write them in one word.

::

    org/name            org/name@revision           Hugging Face, unless such a local path exists
    hf:org/name@revision                            Hugging Face, whatever exists here
    ./folder   /folder   ~/folder   local:folder    a folder of this machine, or a file of GGUF
    s3://bucket/prefix   gs://bucket/prefix   azure://account/container/path
    https://host/adapter.tar.gz   oci://registry/adapter:tag
    mlflow://model/version   mlflow://model@alias   mlflow://runs/run/path

``hf://`` and ``huggingface:`` stand for ``hf:``, ``gcs://`` for ``gs://``, as other tools write them.
``#folder`` at the end names a folder inside the repository (of a local one, write the longer path); of Hugging
Face also a file of GGUF.
"""

import re
from pathlib import Path
from typing import Final

from loramux_shared.bases.files import GGUF_SUFFIX
from loramux_shared.deployment import Repository, SourceKind, spelled
from loramux_shared.faults import DeploymentInvalid
from loramux_shared.sources.entries import addressed_sources

_HUB: Final = re.compile(r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^@#\s]+))?")
_LOCAL: Final = ("/", "./", "../", "~")


def parse_repository(text: str, folder: Path | None = None) -> Repository:
    """Return the repository that a word names; a local path starts from folder, else from where we are. Raise
    DeploymentInvalid for other words.
    """
    path = _local_path(spelled(text), folder or Path.cwd())
    address, _, subfolder = spelled(text).partition("#")
    try:
        if path:
            return Repository(source=SourceKind.LOCAL, repo=str(path))
        if hub := _HUB.fullmatch(address.removeprefix("hf:")):
            revision = hub["revision"] or ""
            return Repository(source=SourceKind.HF, repo=hub["repo"], revision=revision, subfolder=subfolder)
        for entry in addressed_sources():
            if address.startswith(entry.scheme) and len(address) > len(entry.scheme):
                return Repository(source=entry.kind, repo=address, subfolder=subfolder)
    except ValueError as error:  # pydantic's: a subfolder that leads outside, a name that is no UTF-8
        raise _no_repository(text) from error
    raise _no_repository(text)


def name_of_path(path: str) -> str:
    """Return the name of the adapter that a request adds by a repository's path.

    ``my-org/support@v2`` is ``my-org:support:v2``; ``s3://bucket/support`` is ``s3::bucket:support``.
    """
    return spelled(path).removeprefix("hf:").replace("://", "::").replace("/", ":").replace("@", ":")


def _local_path(text: str, folder: Path) -> Path | None:
    """Return the absolute path that a word names, or None where it names none."""
    if text in {".", ".."} or text.startswith(("local:", *_LOCAL)):
        try:
            return _real(folder / Path(text.removeprefix("local:")).expanduser())
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, no such user, a NUL
            raise _no_repository(text) from error
    if not text or "://" in text or text.startswith("hf:") or "\0" in text:
        return None
    path = folder / text
    return _real(path) if path.is_dir() or (path.suffix == GGUF_SUFFIX and path.is_file()) else None


def _real(path: Path) -> Path:
    """Return a path without links; of a file of GGUF, which the hub's cache links to a name that says nothing,
    its folder's.
    """
    return path.parent.resolve() / path.name if path.suffix == GGUF_SUFFIX else path.resolve()


def _no_repository(text: str) -> DeploymentInvalid:
    masked = re.sub(r"\?.*", "?***", text)[:120]
    schemes = ", ".join(entry.scheme for entry in addressed_sources())
    expected = f"org/name[@revision], a path, {schemes}, each with [#folder]"
    return DeploymentInvalid.of_field(f"{masked!r} names no repository", "repository", expected, repr(masked))
