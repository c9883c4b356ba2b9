"""A file of GGUF in a repository of a hub, listed as the checkpoint or adapter that its header says it is."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loramux_shared.adapter_files import ADAPTER_GGUF
from loramux_shared.bases.files import GGUF_SUFFIX
from loramux_shared.bundle.manifest import sha256_hex
from loramux_shared.deployment import Repository
from loramux_shared.faults import RepoNotFound
from loramux_shared.gguf.files import is_adapter, link_names, small_files
from loramux_shared.gguf.header import join_headers, parse_header, parts_of
from loramux_shared.sources.base import Resolved, SourceFile

PIECE: Final = 4 << 20
"""Bytes that are read of a header at once; that of a model of 150,000 tokens has 6e6."""
ReadRange = Callable[[str, int, int], bytes]
"""Returns the bytes of a file by its name: from a place, so many."""


@dataclass(frozen=True)
class GgufListing(Resolved):
    """The files that a file of GGUF stands for."""

    small: Mapping[str, bytes]
    """Contents of those that follow from its header."""


class _RemoteFile(io.RawIOBase):
    """A file that is read in ranges."""

    def __init__(self, name: str, size: int, read: ReadRange) -> None:
        self._name, self._size, self._read, self._at = name, size, read, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._at))
        buffer[:count] = self._read(self._name, self._at, count) if count else b""
        self._at += count
        return count


def names_file(repository: Repository) -> bool:
    """Return True if a repository is a file of GGUF within one."""
    return repository.subfolder.endswith(GGUF_SUFFIX)


def folder_of(repository: Repository) -> str:
    """Return the folder within a repository that its files are in."""
    return repository.subfolder.rpartition("/")[0] if names_file(repository) else repository.subfolder


def name_in(repository: Repository, name: str) -> str:
    """Return the name of a file in its folder, by that in the listing."""
    if not names_file(repository):
        return name
    file = repository.subfolder.rpartition("/")[2]
    parts = [part.name for part in parts_of(Path(file))]
    return (dict(zip(link_names(len(parts)), parts, strict=True)) | {ADAPTER_GGUF: file})[name]


def list_gguf(repository: Repository, files: Mapping[str, SourceFile], read: ReadRange) -> GgufListing:
    """Return what a file of a repository stands for, of the files in its folder.

    Raises:
        RepoNotFound: it, or another one of its model, is not there.
        CheckpointInvalid: it is no adapter, and no model that is served.
        Fault: what read raises.
    """
    parts = parts_of(Path(repository.subfolder.rpartition("/")[2]))
    if lost := next((part.name for part in parts if part.name not in files), ""):
        raise RepoNotFound(f"HF {repository.repo}: no file {lost!r} at {repository.revision}")
    headers = []
    for part in parts:
        size = files[part.name].size
        with io.BufferedReader(_RemoteFile(part.name, size, read), PIECE) as file:
            headers.append(parse_header(part, file, size))
    header = join_headers(headers)
    of_adapter = is_adapter(header)
    small = {} if of_adapter else {name: text.encode() for name, text in small_files(header).items()}
    listed = {name: SourceFile(len(data), sha256_hex(data)) for name, data in small.items()}
    names = link_names(len(parts), of_adapter=of_adapter)
    return GgufListing(
        repository, listed | {name: files[each.name] for name, each in zip(names, parts, strict=True)}, small
    )
