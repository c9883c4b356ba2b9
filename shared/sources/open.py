"""The sources that this version knows, by kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from shared.deployment import Repository, SourceKind
from shared.faults import SourceRefused
from shared.sources.base import Source
from shared.sources.hub import HubSource
from shared.sources.local import LocalSource
from shared.sources.secrets import Secrets


class Sources:
    """Sources by the kind of a repository."""

    def __init__(self, sources: Mapping[SourceKind, Source]) -> None:
        self._sources = dict(sources)

    def of(self, repository: Repository) -> Source:
        """Return the source of a repository, or raise `SourceRefused`."""
        source = self._sources.get(repository.source)
        if source is None:
            raise SourceRefused(
                f"source {repository.source} is not supported by this version; "
                f"supported: {', '.join(sorted(self._sources))}"
            )
        return source


def open_sources(
    *,
    local_roots: Sequence[Path] = (),
    secrets_dir: Path | None = None,
    environment: Mapping[str, str] | None = None,
    hub_endpoint: str | None = None,
) -> Sources:
    """Return the sources of this version.

    local_roots are the folders that LOCAL may read; hub_endpoint is for mirrors, and HF_ENDPOINT's value
    where it is not given.
    """
    secrets = Secrets(secrets_dir, environment)
    return Sources(
        {
            SourceKind.HF: HubSource(secrets, endpoint=hub_endpoint),
            SourceKind.LOCAL: LocalSource(local_roots),
        }
    )
