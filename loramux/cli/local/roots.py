"""The folders that services of one's own must be allowed to read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from loramux_shared.deployment import Repository, SourceKind


def local_roots(repositories: Iterable[Repository]) -> list[Path]:
    """Return the folders of LOCAL repositories, each once.

    The files of a snapshot in the hub's cache (``models--ORG--NAME/snapshots/COMMIT``) are links
    into ``blobs`` beside it, so that folder is one too.
    """
    folders = [Path(each.repo) for each in repositories if each.source is SourceKind.LOCAL]
    blobs = [folder.parent.with_name("blobs") for folder in folders if folder.parent.name == "snapshots"]
    return list(dict.fromkeys([*folders, *(folder for folder in blobs if folder.is_dir())]))
