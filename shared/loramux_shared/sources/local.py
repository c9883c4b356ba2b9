"""LOCAL: folders of this machine, below the roots that the operator allows; a file of GGUF stands for one."""

import errno
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from loramux_shared.adapter_files import pieces_of
from loramux_shared.bases.files import GGUF_SUFFIX
from loramux_shared.bundle.manifest import FileDigest
from loramux_shared.deployment import Repository
from loramux_shared.faults import RepoNotFound, SourceChanged, SourceRefused, SourceUnavailable
from loramux_shared.gguf.files import as_checkpoint
from loramux_shared.gguf.header import parts_of
from loramux_shared.sources.base import MAX_FILES, Progress, Resolved, Room, SourceFile, unwatched
from loramux_shared.sources.files import exactly, hash_pieces, inside, is_text, pin_content, whole
from loramux_shared.wording import listed

MAX_DEPTH = 2
"""Folders below the repository's that are listed: enough to see where an adapter is."""
SETTLED_NS: Final = 100_000_000
"""File systems count time in ticks of some milliseconds: of two writes in one, the second changes no time."""


class LocalSource:
    """Reads folders; links are followed as far as the roots reach."""

    def __init__(self, roots: Sequence[Path], work_dir: Path | None = None) -> None:
        """Read below roots; folders that stand for files of GGUF are made in the work folder."""
        self._made = Path(os.path.realpath(work_dir or tempfile.gettempdir())) / "gguf"
        self._roots = tuple(Path(os.path.realpath(root.expanduser())) for root in roots)

    def resolve(
        self, repository: Repository, progress: Progress = unwatched, room: Room = unwatched
    ) -> Resolved:
        """List a folder; the revision follows from the content, and is known once the files were read.

        What was written just now is listed once its time says which state it is in.
        """
        del progress, room
        folder = self._folder(repository)
        files = self._files(folder)
        if not all(file.settled for file in files.values()):
            time.sleep(SETTLED_NS / 1e9)
            files = self._files(folder)
        return Resolved(repository, files)

    def _files(self, folder: Path) -> dict[str, SourceFile]:
        files = {}
        with _translated():
            for path in self._walk(folder, MAX_DEPTH):
                files[path.relative_to(folder).as_posix()] = _listed(path)
                if len(files) > MAX_FILES:
                    raise SourceRefused(f"LOCAL {folder}: more than {MAX_FILES} files; name a folder in it")
        return files

    def fetch(
        self, resolved: Resolved, names: Iterable[str], into: Path, progress: Progress = unwatched
    ) -> dict[str, FileDigest]:
        """Copy files, so that nothing can change them while they are used."""
        copied = {}
        for name in sorted(names):
            with whole(inside(into, name)) as sink:
                copied[name] = self._read(resolved, name, progress, sink)
        return copied

    def digests(
        self, resolved: Resolved, names: Iterable[str], progress: Progress = unwatched, room: Room = unwatched
    ) -> dict[str, FileDigest]:
        """Hash files where they are."""
        del room
        return {name: self._read(resolved, name, progress) for name in sorted(names)}

    def pin(self, resolved: Resolved, files: Mapping[str, FileDigest]) -> Repository:
        """Return the repository with the digest of its files as revision."""
        return pin_content(resolved.repository, files)

    def place(
        self,
        repository: Repository,
        files: Mapping[str, FileDigest],
        cache: Path,
        progress: Progress = unwatched,
        room: Room = unwatched,
    ) -> Path:
        """Return the folder itself; nothing is copied."""
        del cache, progress, room
        folder = self._folder(repository)
        for name in files:
            self._allowed(folder / name)
        return folder

    def _read(
        self, resolved: Resolved, name: str, progress: Progress, sink: IO[bytes] | None = None
    ) -> FileDigest:
        path, file = self._allowed(self._folder(resolved.repository) / name), resolved.files[name]
        with _translated():
            pieces = exactly(pieces_of(path), file.size, f"LOCAL {path}")
            digest = hash_pieces(pieces, progress, sink)
            if _listed(path) != file:
                raise SourceChanged(f"LOCAL {path}: changed since it was listed. Build again.")
        return digest

    def _folder(self, repository: Repository) -> Path:
        path = Path(repository.repo)
        if not path.is_absolute():
            raise SourceRefused(f"LOCAL {repository.repo!r}: expected an absolute folder of the server")
        folder, named = self._allowed(path / repository.subfolder), path / repository.subfolder
        with _translated():
            if named.suffix == GGUF_SUFFIX and folder.is_file():
                for part in parts_of(named):
                    self._allowed(part)
                return as_checkpoint(named, self._made)
            if not folder.is_dir():
                raise RepoNotFound(
                    f"LOCAL {folder}: no such folder on the server. Correct the path, or put it there."
                )
        return folder

    def _allowed(self, path: Path) -> Path:
        try:
            real = path.resolve()
            _require_end(real)
        except (OSError, RuntimeError, ValueError):
            raise SourceRefused(
                f"LOCAL {str(path)[:200]!r}: not a path of this server: it has a NUL or a circular link"
            ) from None
        if not any(real.is_relative_to(root) for root in (*self._roots, self._made)):
            linked = any(path.is_relative_to(root) for root in self._roots)
            how = ", once its links are followed" if linked else ""
            allowed = listed([str(root) for root in self._roots], none="there is none")
            raise SourceRefused(
                f"LOCAL {path}: not below a folder that this server may read ({allowed}){how}. Correct "
                "the path, start the server with --local-root and a folder above it, or send an adapter with "
                "`loramux push`."
            )
        return real

    def _walk(self, folder: Path, depth: int) -> Iterator[Path]:
        for child in sorted(folder.iterdir()):
            if child.name.startswith(".") or not is_text(child.name):
                continue
            if child.is_file():  # no pipes, no devices
                yield child
            elif depth and child.is_dir() and not child.is_symlink():
                yield from self._walk(child, depth - 1)


def _require_end(path: Path) -> None:
    """Raise OSError for links in a circle, which Python 3.13 and newer return as they are."""
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise


def _listed(path: Path) -> SourceFile:
    status = path.stat()
    changed = max(status.st_mtime_ns, status.st_ctime_ns)
    version = f"{status.st_mtime_ns}-{status.st_ctime_ns}-{status.st_ino}"
    return SourceFile(status.st_size, version=version, settled=time.time_ns() - changed > SETTLED_NS)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise SourceRefused(f"LOCAL {error.filename}: the server may not read it") from error
    except FileNotFoundError as error:
        raise RepoNotFound(f"LOCAL {error.filename}: it was removed while it was read") from error
    except OSError as error:
        raise SourceUnavailable(f"LOCAL {error.filename}: {error.strerror}") from error
