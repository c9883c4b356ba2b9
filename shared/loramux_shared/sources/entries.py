"""The sources of repositories that are installed here: entries of the port `source`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loramux_shared.deployment import SCHEMES, SourceKind
from loramux_shared.ports import registered

if TYPE_CHECKING:  # with packages that a client may lack
    from loramux_shared.sources.base import Source
    from loramux_shared.sources.secrets import Secrets


@dataclass(frozen=True)
class SourceSettings:
    """The settings with which sources are opened."""

    secrets: Secrets
    allowed_hosts: Collection[str] = ()
    """Hosts that may be reached though their addresses are not public."""
    work_dir: Path | None = None
    """Holds what is not kept; the system's temporary folder when not given."""
    local_roots: Sequence[Path] = ()
    """Folders that LOCAL may read."""
    hub_endpoint: str | None = None
    """A mirror of the hub; HF_ENDPOINT's value when not given."""


@dataclass(frozen=True)
class SourceEntry:
    """A source as it is known before it is opened."""

    scheme: str
    """Beginning of its addresses: ``myhub://``."""
    open: Callable[[SourceSettings], Source]
    """May import packages that are not installed everywhere, or take much time."""
    pinned: str | None = None
    """A pattern of revisions that mean one content for ever, known without a request; None where none do."""
    extra: str = ""
    """The extra of loramux that installs its packages."""

    @property
    def kind(self) -> SourceKind:
        """Return its kind in deployments and messages."""
        return KINDS.get(self.scheme, SourceKind.BY_SCHEME)

    @property
    def name(self) -> str:
        """Return its name for people: its kind, or its scheme where that names it."""
        return self.scheme if self.kind is SourceKind.BY_SCHEME else self.kind


def _open_hub(settings: SourceSettings) -> Source:
    from loramux_shared.sources.hub import HubSource

    return HubSource(settings.secrets, endpoint=settings.hub_endpoint, work_dir=settings.work_dir)


def _open_local(settings: SourceSettings) -> Source:
    from loramux_shared.sources.local import LocalSource

    return LocalSource(settings.local_roots, settings.work_dir)


def _open_s3(settings: SourceSettings) -> Source:
    from loramux_shared.sources import s3

    return s3.open_source(settings)


def _open_gcs(settings: SourceSettings) -> Source:
    from loramux_shared.sources import gcs

    return gcs.open_source(settings)


def _open_azure(settings: SourceSettings) -> Source:
    from loramux_shared.sources import azure

    return azure.open_source(settings)


def _open_remote_url(settings: SourceSettings) -> Source:
    from loramux_shared.sources import remote_url

    return remote_url.open_source(settings)


def _open_oci(settings: SourceSettings) -> Source:
    from loramux_shared.sources import oci

    return oci.open_source(settings)


def _open_mlflow(settings: SourceSettings) -> Source:
    from loramux_shared.sources import mlflow

    return mlflow.open_source(settings)


KINDS: Final = {"hf:": SourceKind.HF, "local:": SourceKind.LOCAL, **SCHEMES}
SHA256: Final = "[0-9a-f]{64}"
HUB: Final = SourceEntry("hf:", _open_hub, pinned=f"[0-9a-f]{{40}}|{SHA256}", extra="builder")
LOCAL: Final = SourceEntry("local:", _open_local)
ADDRESSED: Final = (
    SourceEntry("s3://", _open_s3, extra="builder"),
    SourceEntry("gs://", _open_gcs, extra="gcs"),
    SourceEntry("azure://", _open_azure, extra="azure"),
    SourceEntry("https://", _open_remote_url, pinned=SHA256, extra="builder"),
    SourceEntry("oci://", _open_oci, pinned=SHA256, extra="builder"),
    SourceEntry("mlflow://", _open_mlflow, extra="mlflow"),
)
"""Our sources whose repositories are addresses."""


def addressed_sources() -> Iterator[SourceEntry]:
    """Yield the sources whose repositories are addresses; those of other packages come last."""
    yield from ADDRESSED
    yield from registered("source", SourceEntry).values()


def pinned_revision(source: str) -> str | None:
    """Return the pattern of revisions that mean one content for ever, of a named source; None for none."""
    entries = chain((HUB, LOCAL), addressed_sources())
    return next((entry.pinned for entry in entries if entry.name == source), None)
