"""The sources of this version, by kind."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

from loramux_shared.deployment import SCHEMES, Repository, SourceKind
from loramux_shared.faults import RepoNotFound, SourceRefused
from loramux_shared.sources.base import Source, about
from loramux_shared.sources.hub import HubSource
from loramux_shared.sources.local import LocalSource
from loramux_shared.sources.secrets import Secrets

Opener = Callable[[Collection[str], Secrets, Path | None], Source]
"""Opens a source with the hosts that it may reach, its secrets and a folder for what is not kept."""


class Sources:
    """Sources by the kind of a repository."""

    def __init__(
        self,
        sources: Mapping[SourceKind, Source],
        work_dir: Path | None = None,
        openers: Mapping[SourceKind, Callable[[], Source]] | None = None,
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
        if repository.source in self._openers and repository.source not in self._sources:
            with about(repository):
                self._sources[repository.source] = self._openers[repository.source]()
        source = self._sources.get(repository.source)
        if source is None:
            known = ", ".join(sorted({*self._sources, *self._openers}))
            raise SourceRefused(f"source {repository.source} is not supported here; supported: {known}")
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
    """Return the sources of this version.

    local_roots are the folders that LOCAL may read, allowed_hosts what REMOTE_URL and OCI may reach beside
    public addresses; hub_endpoint is for mirrors, and HF_ENDPOINT's value where it is not given. work_dir holds
    what is not kept; the system's temporary folder when not given.
    """
    secrets = Secrets(secrets_dir, environment)
    return Sources(
        {
            SourceKind.HF: HubSource(secrets, endpoint=hub_endpoint, work_dir=work_dir),
            SourceKind.LOCAL: LocalSource(local_roots, work_dir),
        },
        work_dir,
        {kind: partial(open_address, kind, allowed_hosts, secrets, work_dir) for kind in SCHEMES.values()},
    )


def open_address(
    kind: SourceKind, allowed_hosts: Collection[str], secrets: Secrets, work_dir: Path | None
) -> Source:
    """Return a source of few users; raise SourceRefused where a package that it needs is not installed."""
    try:
        return _opener(kind)(allowed_hosts, secrets, work_dir)
    except ModuleNotFoundError as error:
        extra = kind.lower() if kind in (SourceKind.GCS, SourceKind.AZURE, SourceKind.MLFLOW) else "builder"
        raise SourceRefused(
            f"source {kind} needs packages that are not installed here ({error.name}): "
            f"pip install 'loramux[{extra}]'"
        ) from error


def _opener(kind: SourceKind) -> Opener:
    """Import what opens sources of a kind: some need packages that not everybody has, or much time."""
    match kind:
        case SourceKind.S3:
            from loramux_shared.sources import s3

            return s3.open_source
        case SourceKind.GCS:
            from loramux_shared.sources import gcs

            return gcs.open_source
        case SourceKind.AZURE:
            from loramux_shared.sources import azure

            return azure.open_source
        case SourceKind.OCI:
            from loramux_shared.sources import oci

            return oci.open_source
        case SourceKind.MLFLOW:
            from loramux_shared.sources import mlflow

            return mlflow.open_source
        case _:
            from loramux_shared.sources import remote_url

            return remote_url.open_source
