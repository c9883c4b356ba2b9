"""LOCAL: folders of this machine, below the roots that the operator allows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from shared.bundle.manifest import FileDigest
from shared.deployment import Repository
from shared.faults import RepoNotFound, RevisionNotFound, SourceRefused, SourceUnavailable
from shared.sources.base import Progress, Resolved, SourceFile, unwatched
from shared.sources.files import content_digest, copy_file, hash_file

MAX_DEPTH = 2
"""Folders below the repository's that are listed: enough to see where an adapter is."""
MAX_FILES = 10_000


class LocalSource:
    """Reads folders; links are followed as far as the roots reach."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = tuple(root.expanduser().resolve() for root in roots)

    def resolve(self, repository: Repository) -> Resolved:
        """List a folder; the revision follows from the content, and is known once the files were read."""
        folder = self._folder(repository)
        files = {}
        with _translated():
            for path in self._walk(folder, MAX_DEPTH):
                files[path.relative_to(folder).as_posix()] = SourceFile(path.stat().st_size)
                if len(files) > MAX_FILES:
                    raise SourceRefused(f"LOCAL {folder}: more than {MAX_FILES} files; name a folder in it")
        return Resolved(repository, files)

    def fetch(
        self, resolved: Resolved, names: Iterable[str], into: Path, progress: Progress = unwatched
    ) -> dict[str, FileDigest]:
        """Copy files, so that nothing can change them while they are used."""
        folder = self._folder(resolved.repository)
        with _translated():
            return {
                name: copy_file(self._allowed(folder / name), into / name, progress) for name in sorted(names)
            }

    def digests(
        self, resolved: Resolved, names: Iterable[str], progress: Progress = unwatched
    ) -> dict[str, FileDigest]:
        """Hash files where they are."""
        folder = self._folder(resolved.repository)
        with _translated():
            return {name: hash_file(self._allowed(folder / name), progress) for name in sorted(names)}

    def pin(self, resolved: Resolved, files: Mapping[str, FileDigest]) -> Repository:
        """Return the repository with the digest of its files as revision."""
        repository, revision = resolved.repository, content_digest(files)
        if repository.revision and repository.revision != revision:
            raise RevisionNotFound(
                f"LOCAL {repository.repo}: expected content {repository.revision}, found {revision}. "
                "Leave revision out to take the folder as it is."
            )
        return repository.model_copy(update={"revision": revision})

    def place(
        self, repository: Repository, files: Mapping[str, FileDigest], cache: Path, progress: Progress
    ) -> Path:
        """Return the folder itself; nothing is copied."""
        del cache, progress
        folder = self._folder(repository)
        for name in files:
            self._allowed(folder / name)
        return folder

    def _folder(self, repository: Repository) -> Path:
        path = Path(repository.repo)
        if not path.is_absolute():
            raise SourceRefused(f"LOCAL {repository.repo!r}: expected an absolute folder of the server")
        folder = self._allowed(path / repository.subfolder)
        if not folder.is_dir():
            raise RepoNotFound(f"LOCAL {folder}: no such folder on the server")
        return folder

    def _allowed(self, path: Path) -> Path:
        real = path.resolve()
        if not any(real.is_relative_to(root) for root in self._roots):
            allowed = ", ".join(map(str, self._roots)) or "none"
            raise SourceRefused(
                f"LOCAL {path}: not below a folder that the operator allows ({allowed}). "
                "Move it there, or start the server with --local-root."
            )
        return real

    def _walk(self, folder: Path, depth: int) -> Iterator[Path]:
        for child in sorted(folder.iterdir()):
            if child.name.startswith("."):
                continue
            if child.is_file():  # no pipes, no devices
                yield child
            elif depth and child.is_dir() and not child.is_symlink():
                yield from self._walk(child, depth - 1)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise SourceRefused(f"LOCAL {error.filename}: the server may not read it") from error
    except FileNotFoundError as error:
        raise RepoNotFound(f"LOCAL {error.filename}: it went away while it was read") from error
    except OSError as error:
        raise SourceUnavailable(f"LOCAL {error.filename}: {error.strerror}") from error
