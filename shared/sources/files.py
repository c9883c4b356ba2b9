"""Copying and hashing of files, in pieces."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from shared.bundle.manifest import FileDigest, sha256_hex
from shared.sources.base import Progress, unwatched

PIECE = 1 << 20


def hash_file(path: Path, progress: Progress = unwatched) -> FileDigest:
    """Return what a file is."""
    digest, size = hashlib.sha256(), 0
    for piece in _pieces(path, progress):
        digest.update(piece)
        size += len(piece)
    return FileDigest(size=size, sha256=digest.hexdigest())


def copy_file(path: Path, target: Path, progress: Progress = unwatched) -> FileDigest:
    """Copy a file, and return what the copy is."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with target.open("wb") as sink:
        for piece in _pieces(path, progress):
            digest.update(piece)
            sink.write(piece)
            size += len(piece)
    return FileDigest(size=size, sha256=digest.hexdigest())


def content_digest(files: Mapping[str, FileDigest]) -> str:
    """Return one digest of files by name: the revision of a repository that has no commits."""
    listing = {name: file.sha256 for name, file in files.items()}
    return sha256_hex(json.dumps(listing, sort_keys=True, separators=(",", ":")).encode())


def _pieces(path: Path, progress: Progress) -> Iterator[bytes]:
    with path.open("rb") as source:
        while piece := source.read(PIECE):
            yield piece
            progress(len(piece))
