"""The sources of repositories that are installed here, and what an entry of the port `source` says of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loramux_shared.ports import registered

if TYPE_CHECKING:  # which read deployments, and so this
    from loramux_shared.sources.base import Source
    from loramux_shared.sources.secrets import Secrets


class SourceKind(StrEnum):
    """A kind of source of repositories."""

    HF = "HF"
    S3 = "S3"
    GCS = "GCS"
    AZURE = "AZURE"
    REMOTE_URL = "REMOTE_URL"
    OCI = "OCI"
    MLFLOW = "MLFLOW"
    LOCAL = "LOCAL"
    PUSHED = "PUSHED"
    """Sent to the builder by PutAdapter; ``repo`` is the name under which it was."""
    BY_SCHEME = "BY_SCHEME"
    """Added by a package, and named by the scheme of the address: ``myhub://...``."""


@dataclass(frozen=True)
class SourceSettings:
    """What sources are opened with."""

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
    kind: SourceKind = SourceKind.BY_SCHEME
    """Its kind in deployments and messages; only ours have one of their own."""
    spellings: tuple[str, ...] = ()
    """Other tools' ways to begin its addresses."""
    pinned: str | None = None
    """A pattern of revisions that mean one content for ever, known without a request; None where none do."""
    extra: str = ""
    """The extra of loramux that installs its packages."""

    @property
    def name(self) -> str:
        """The name by which people know it: its kind, or the scheme of another package's."""
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


SHA256: Final = "[0-9a-f]{64}"
HUB: Final = SourceEntry(
    "hf:",
    _open_hub,
    SourceKind.HF,
    spellings=("hf://", "huggingface://", "huggingface:"),
    pinned=f"[0-9a-f]{{40}}|{SHA256}",
)
LOCAL: Final = SourceEntry("local:", _open_local, SourceKind.LOCAL)
ADDRESSED: Final = (
    SourceEntry("s3://", _open_s3, SourceKind.S3, extra="builder"),
    SourceEntry("gs://", _open_gcs, SourceKind.GCS, spellings=("gcs://",), extra="gcs"),
    SourceEntry("azure://", _open_azure, SourceKind.AZURE, extra="azure"),
    SourceEntry("https://", _open_remote_url, SourceKind.REMOTE_URL, pinned=SHA256, extra="builder"),
    SourceEntry("oci://", _open_oci, SourceKind.OCI, pinned=SHA256, extra="builder"),
    SourceEntry("mlflow://", _open_mlflow, SourceKind.MLFLOW, extra="mlflow"),
)
"""Our sources whose repositories are addresses."""
SCHEMES: Final = tuple(entry.scheme for entry in ADDRESSED)
SPELLINGS: Final = tuple(other for entry in (HUB, *ADDRESSED) for other in entry.spellings)
_SCHEME: Final = re.compile(r"[a-z][a-z0-9+.-]*://")


def addressed_sources() -> Iterator[SourceEntry]:
    """Yield the sources whose repositories are addresses; those of other packages come last."""
    yield from ADDRESSED
    yield from registered("source", SourceEntry).values()


def scheme_of(address: str) -> str:
    """Return the scheme of an address, ``myhub://``; empty where it has none."""
    found = _SCHEME.match(address)
    return found[0] if found else ""


def spelled(address: str) -> str:
    """Return an address that begins as loramux writes it."""
    for entry in chain((HUB,), addressed_sources()):
        if other := next(filter(address.startswith, entry.spellings), None):
            return entry.scheme + address.removeprefix(other)
    return address


def pinned_revision(source: str) -> str | None:
    """Return the pattern of revisions that mean one content for ever, of a named source; None for none."""
    entries = chain((HUB, LOCAL), addressed_sources())
    return next((entry.pinned for entry in entries if entry.name == source), None)
