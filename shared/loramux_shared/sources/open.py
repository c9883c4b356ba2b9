"""The sources that are installed here, by name."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.faults import RepoNotFound, SourceRefused
from loramux_shared.sources.base import Source, about
from loramux_shared.sources.entries import HUB, LOCAL, SourceEntry, SourceSettings, addressed_sources
from loramux_shared.sources.secrets import Secrets


class Sources:
    """Sources by their names."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        work_dir: Path | None = None,
        openers: Mapping[str, Callable[[], Source]] | None = None,
    ) -> None:
        """Take sources, and functions that open others at their first use."""
        self._sources = dict(sources)
        self._openers = dict(openers or {})
        self.work_dir = work_dir
        """Holds what is fetched only to be looked at; the system's temporary folder when not given."""

    def of(self, repository: Repository) -> Source:
        """Return the source of a repository. Raise SourceRefused where there is none of its kind here, and
        RepoNotFound where it was pushed: all that is left of it is its bundle.
        """
        if repository.source is SourceKind.PUSHED:
            at = f" at {repository.revision}" if repository.revision else ""
            with about(repository):
                raise RepoNotFound(
                    f"PUSHED {repository.label}{at}: its files are not stored, and the served generation has "
                    "no complete bundle of it for this base and these settings. Push it again."
                )
        name = repository.source_name
        if name in self._openers and name not in self._sources:
            with about(repository):
                self._sources[name] = self._openers[name]()
        source = self._sources.get(name)
        if source is None:
            known = ", ".join(sorted({*self._sources, *self._openers}))
            raise SourceRefused(f"source {name} is not supported here; supported: {known}")
        return source


def open_sources(
    *,
    local_roots: Sequence[Path] = (),
    allowed_hosts: Collection[str] = (),
    secrets_dir: Path | None = None,
    environment: Mapping[str, str] | None = None,
    hub_endpoint: str | None = None,
    work_dir: Path | None = None,
) -> Sources:
    """Return the sources that are installed here.

    local_roots are the folders that LOCAL may read, allowed_hosts what REMOTE_URL and OCI may reach beside
    public addresses; hub_endpoint is for mirrors, and HF_ENDPOINT's value where it is not given. work_dir holds
    what is not kept; the system's temporary folder when not given.
    """
    settings = SourceSettings(
        Secrets(secrets_dir, environment), allowed_hosts, work_dir, local_roots, hub_endpoint
    )
    return Sources(
        {entry.name: entry.open(settings) for entry in (HUB, LOCAL)},
        work_dir,
        {entry.name: partial(open_entry, entry, settings) for entry in addressed_sources()},
    )


def open_entry(entry: SourceEntry, settings: SourceSettings) -> Source:
    """Return an opened source; raise SourceRefused where a package that it needs is not installed."""
    try:
        return entry.open(settings)
    except ModuleNotFoundError as error:
        cure = f"pip install 'loramux[{entry.extra}]'" if entry.extra else "install them"
        raise SourceRefused(
            f"source {entry.name} needs packages that are not installed here ({error.name}): {cure}"
        ) from error
