"""OCI: artifacts and images of container registries.

https://github.com/opencontainers/distribution-spec (the API), https://github.com/modelpack/model-spec and ORAS
(a layer per file), https://kserve.github.io/website (modelcars: images with the files in `/models`). The digest
of the manifest is the revision: with it, everything below it is pinned.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, Final
from urllib.parse import urlencode

from loramux_shared.bundle.manifest import FileDigest, sha256_hex
from loramux_shared.deployment import Repository
from loramux_shared.faults import (
    BundleCorrupt,
    RepoGated,
    RepoNotFound,
    RevisionNotFound,
    SourceRefused,
    SourceUnavailable,
)
from loramux_shared.sources.archive import MAX_UNPACKED, Archive, inner_files
from loramux_shared.sources.base import MAX_FILES, Progress, Resolved, Room, SourceFile, unwatched
from loramux_shared.sources.entries import SourceSettings
from loramux_shared.sources.files import disk_errors, hash_pieces, inside, whole
from loramux_shared.sources.https import Challenged, Https
from loramux_shared.sources.listed import ListedSource
from loramux_shared.sources.public import AddressGuard
from loramux_shared.sources.remote_url import MAX_ARCHIVE
from loramux_shared.sources.retry import TimeLeft
from loramux_shared.untrusted_json import JsonInvalid, parse_json

MANIFESTS: Final = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
MAX_MANIFEST: Final = 4 << 20
"""Bytes of a manifest, as registries bound it."""
FILE_NAMES: Final = ("org.cncf.model.filepath", "org.opencontainers.image.title")
"""Annotations of a layer that is one file."""
UNPACKED: Final = "io.deis.oras.content.unpack"
"""Annotation of a layer that ORAS packed: a folder."""
MODELS: Final = "models/"
"""The folder of an image that holds a model."""
_HOSTS: Final = {"docker.io": "registry-1.docker.io"}
_ADDRESS: Final = re.compile(
    r"oci://(?P<host>[\w.-]+(?::[0-9]{1,5})?)/(?P<name>[a-z0-9]+(?:[._/-]+[a-z0-9]+)*)"
    r"(?::(?P<tag>\w[\w.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_CHALLENGE: Final = re.compile(r'(realm|service|scope)="([^"]*)"')
_DIGEST: Final = re.compile(r"(?:sha256:)?([0-9a-f]{64})")


@dataclass(frozen=True)
class Layer:
    """A part of an artifact: one file, or an archive of several."""

    digest: str
    """sha256 in hex."""
    size: int
    file: str
    """Name of the file; empty where the layer is an archive."""
    under: str
    """Folder of an archive that is the repository: the others of an image are its system."""


@dataclass(frozen=True)
class ResolvedArtifact(Resolved):
    """An artifact; archives among its layers are in one file without a name, until it is closed."""

    where: Mapping[str, tuple[Layer, str]]
    """Layer of each file, and its name there."""
    archives: Mapping[Layer, Archive]
    """Downloaded archives."""
    file: IO[bytes]
    """File that holds the archives."""

    def close(self) -> None:
        """Close the archives, which frees their space."""
        self.file.close()


@dataclass(frozen=True)
class Registry:
    """A repository of a registry, with the rights to read it."""

    label: str
    """For messages."""
    host: str
    name: str
    reference: str
    """Tag or digest."""
    basic: str
    """Header with the password that is for this host; empty without one."""

    def url(self, kind: str, reference: str) -> str:
        """Return the address of a manifest or a blob."""
        return f"https://{self.host}/v2/{self.name}/{kind}/{reference}"


class OciSource(ListedSource):
    """Reads artifacts over the registries' API; a file that is a layer is fetched alone."""

    cached_in = "oci"

    def resolve(
        self, repository: Repository, progress: Progress = unwatched, room: Room = unwatched
    ) -> ResolvedArtifact:
        """Read the manifest, and list its files; archives among them are downloaded for that."""
        registry = self._registry(repository)
        digest, manifest = self._manifest(registry, registry.reference, progress)
        if "manifests" in manifest:  # an index by platform, which all hold the same model
            chosen = _first_digest(registry, manifest)
            _, manifest = self._manifest(registry, f"sha256:{chosen}", progress)
        # A layer that comes again leaves the files of its last place.
        layers = list(dict.fromkeys(reversed(list(_layers(registry, manifest)))))
        if len(layers) > MAX_FILES:
            raise SourceRefused(f"{registry.label}: more than {MAX_FILES} layers")
        most = MAX_UNPACKED // max(1, sum(not layer.file for layer in layers))
        seen = _Overlay(registry.label)
        archives: dict[Layer, Archive] = {}
        with ExitStack() as opened:
            file = self._unnamed(opened)
            for layer in layers:
                if layer.file:
                    seen.add(layer, {layer.file: SourceFile(layer.size, layer.digest)})
                    continue
                start = self._download(registry, layer, file, progress, room)
                archives[layer] = Archive(file, registry.label, layer.size, most, plain=True, start=start)
                seen.add(layer, archives[layer].listing(progress, layer.under))
            files, where = seen.files, seen.where
            names = inner_files(files, repository.subfolder)
            if not names:
                inner = repository.subfolder
                place = f"no folder {inner!r}" if inner else "no file that is named, and no /models"
                raise RepoNotFound(f"{registry.label}: {place} in the artifact")
            opened.pop_all()
        return ResolvedArtifact(
            repository.model_copy(update={"revision": digest}),
            {short: files[name] for short, name in names.items()},
            {short: where[name] for short, name in names.items()},
            archives,
            file,
        )

    def fetch(
        self, resolved: Resolved, names: Iterable[str], into: Path, progress: Progress = unwatched
    ) -> dict[str, FileDigest]:
        """Write files; each is what the manifest, or the archive's listing, says."""
        artifact = _artifact(resolved)
        registry = self._registry(resolved.repository)
        fetched: dict[str, FileDigest] = {}
        packed: dict[Layer, dict[str, str]] = {}
        for name in names:
            layer, inner = artifact.where[name]
            if not layer.file:
                packed.setdefault(layer, {})[inner] = name
                continue
            with whole(inside(into, name)) as sink:
                fetched[name] = self._blob(registry, layer, sink, progress)
        for layer, inside_of in packed.items():
            for name, pieces in artifact.archives[layer].read(inside_of, progress):
                with whole(inside(into, name)) as sink:
                    fetched[name] = hash_pieces(pieces, progress, sink)
        return fetched

    def _registry(self, repository: Repository) -> Registry:
        label = f"OCI {repository.label}"
        found = _ADDRESS.fullmatch(repository.repo)
        if found is None:
            raise SourceRefused(f"{label}: expected oci://HOST/NAME:TAG or oci://HOST/NAME@sha256:DIGEST")
        revision = repository.revision
        pinned = _DIGEST.fullmatch(revision)
        reference = f"sha256:{pinned[1]}" if pinned else revision or found["digest"] or found["tag"] or "latest"
        if found["digest"] and pinned and reference != found["digest"]:
            raise RevisionNotFound(
                f"{label}: expected the revision {revision}, found another digest in the address"
            )
        host = _HOSTS.get(found["host"], found["host"])
        return Registry(label, host, found["name"], reference, self._password(repository, found["host"]))

    def _password(self, repository: Repository, host: str) -> str:
        """Return the header of a host's password, from a secret in the form of docker's config.json."""
        name = repository.runtime_secret_name
        text = self._secrets.get(name, default_variable="DOCKER_AUTH_CONFIG")
        if text is None:
            return ""
        try:
            auths = parse_json(text)["auths"]
            entry = auths.get(host) or auths.get(f"https://{host}") or {}
            if not entry and host == "docker.io":
                entry = auths.get("https://index.docker.io/v1/") or {}
            plain = base64.b64decode(entry.get("auth", ""), validate=True)
            plain = plain or ":".join((entry["username"], entry["password"])).encode() if entry else b""
        except (ValueError, KeyError, TypeError, AttributeError, binascii.Error):
            raise SourceRefused(
                f"secret {name or 'DOCKER_AUTH_CONFIG'!r}: expected docker's config.json with an object auths, "
                "and in it auth, or username and password, by host. Helpers of credentials are not called."
            ) from None
        return f"Basic {base64.b64encode(plain).decode()}" if plain else ""

    def _manifest(
        self, registry: Registry, reference: str, progress: Progress
    ) -> tuple[str, Mapping[str, Any]]:
        """Return a manifest with its digest."""
        body = self._patience.call(
            lambda deadline: b"".join(
                self._pieces(
                    registry,
                    "manifests",
                    reference,
                    deadline,
                    MAX_MANIFEST,
                    deadline.watch(registry.label, progress),
                )
            ),
            progress,
        )
        digest = sha256_hex(body)
        if reference.startswith("sha256:") and reference != f"sha256:{digest}":
            raise BundleCorrupt(f"{registry.label}: expected a manifest of {reference}, found sha256:{digest}")
        try:
            manifest = parse_json(body)
        except JsonInvalid:
            manifest = None
        if not isinstance(manifest, dict) or not ("layers" in manifest or "manifests" in manifest):
            raise SourceRefused(f"{registry.label}: its manifest has neither layers nor manifests")
        return digest, manifest

    def _download(
        self, registry: Registry, layer: Layer, file: IO[bytes], progress: Progress, room: Room
    ) -> int:
        """Append a layer to a file, and return its place there."""
        if layer.size > MAX_ARCHIVE:
            raise SourceRefused(
                f"{registry.label}: {layer.size} bytes, and an archive has at most {MAX_ARCHIVE}"
            )
        room(layer.size)
        with disk_errors():
            start = file.tell()
            self._blob(registry, layer, file, progress)
            file.flush()
        return start

    def _blob(self, registry: Registry, layer: Layer, sink: IO[bytes], progress: Progress) -> FileDigest:
        """Append a layer; another content than the manifest names is fetched once more."""
        problems: list[str] = []
        start = sink.tell()

        def attempt(deadline: TimeLeft) -> FileDigest:
            sink.seek(start)
            sink.truncate()
            watch = deadline.watch(registry.label, progress)
            pieces = self._pieces(registry, "blobs", f"sha256:{layer.digest}", deadline, layer.size, watch)
            found = hash_pieces(pieces, unwatched, sink)
            if found != FileDigest(size=layer.size, sha256=layer.digest):
                problems.append(f"{found.size} bytes of {found.sha256}")
                kind = SourceUnavailable if len(problems) == 1 else BundleCorrupt
                expected = f"{layer.size} bytes of {layer.digest}"
                raise kind(
                    f"{registry.label}: a layer: expected {expected}, found {problems[-1]}. Push it again."
                )
            return found

        return self._patience.call(attempt, progress)

    def _pieces(
        self, registry: Registry, kind: str, reference: str, deadline: TimeLeft, most: int, progress: Progress
    ) -> Iterator[bytes]:
        """Yield the bytes of a manifest or blob, with a token where the registry wants one, up to a bound."""
        get = partial(self._https.get, registry.url(kind, reference), deadline, accept=", ".join(MANIFESTS))
        with ExitStack() as opened:
            try:
                try:
                    download = opened.enter_context(get())
                except Challenged as fault:
                    header = self._authorization(registry, fault, deadline)
                    download = opened.enter_context(get((registry.host, header)))
            except RepoNotFound:
                raise RepoNotFound(f"{registry.label}: the registry has no {reference} of it") from None
            except Challenged:
                raise RepoGated(f"{registry.label}: the password does not open it") from None
            left = most
            for piece in download.pieces():
                left -= len(piece)
                if left < 0:
                    raise SourceRefused(
                        f"{registry.label}: expected at most {most} bytes of {reference}, found more"
                    )
                progress(len(piece))
                yield piece

    def _authorization(self, registry: Registry, fault: Challenged, deadline: TimeLeft) -> str:
        """Return the header that a registry wants: with the password, or with a token that its realm issues."""
        kind, _, rest = fault.challenge.partition(" ")
        if kind.lower() == "basic" and registry.basic:
            return registry.basic
        fields = dict(_CHALLENGE.findall(rest))
        if kind.lower() != "bearer" or "realm" not in fields:
            raise RepoGated(
                f"{registry.label}: it needs a password. Name a secret that holds docker's config.json for "
                f"{registry.host} with runtime_secret_name."
            ) from fault
        realm = fields.pop("realm")
        fields.setdefault("scope", f"repository:{registry.name}:pull")
        host = realm.partition("://")[2].partition("/")[0]
        password = (host, registry.basic) if registry.basic else None
        watch, body = deadline.watch(registry.label, unwatched), bytearray()
        with self._https.get(f"{realm}?{urlencode(fields)}", deadline, password) as download:
            for piece in download.pieces():
                watch(len(piece))
                body += piece
                if len(body) > MAX_MANIFEST:
                    raise SourceRefused(f"{registry.label}: {host}: more than {MAX_MANIFEST} bytes in a token")
        try:
            answer = parse_json(bytes(body))
            return f"Bearer {answer.get('token') or answer['access_token']}"
        except (ValueError, KeyError, AttributeError):
            raise SourceRefused(f"{registry.label}: {host} answered without a token") from None


def _first_digest(registry: Registry, index: Mapping[str, Any]) -> str:
    entries = index["manifests"] if isinstance(index["manifests"], list) else []
    for entry in entries:
        found = _DIGEST.fullmatch(str(entry.get("digest"))) if isinstance(entry, dict) else None
        attached = isinstance(entry, dict) and "vnd.docker.reference.type" in str(entry.get("annotations"))
        if found and not attached:
            return found[1]
    raise SourceRefused(f"{registry.label}: its index names no manifest")


@dataclass(frozen=True)
class _Descriptor:
    """A layer as a manifest describes it."""

    digest: str
    """sha256 in hex."""
    size: int
    media_type: str
    notes: Mapping[str, Any]
    """Annotations."""

    @classmethod
    def parse(cls, fields: Any) -> _Descriptor | None:
        """Return the descriptor of a manifest's entry; None where it has no valid digest or size."""
        try:
            digest = _DIGEST.fullmatch(fields["digest"])
            size, media_type = int(fields["size"]), str(fields.get("mediaType", ""))
            notes = dict(fields.get("annotations") or {})
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
            return None
        return None if digest is None or size < 0 else cls(digest[1], size, media_type, notes)

    @property
    def file(self) -> str:
        """Return the name of the file that the layer is; empty where its annotations have none."""
        return next((str(self.notes[name]) for name in FILE_NAMES if name in self.notes), "")

    @property
    def is_archive(self) -> bool:
        """Return True if the layer is a tar to unpack."""
        if self.notes.get(UNPACKED) == "true":
            return True
        # Clients of ORAS give the type of a tar to plain files too.
        misnamed = self.media_type.endswith("gzip") and not self.file.endswith("gz")
        packed = not self.file or misnamed or ".model." in self.media_type
        return packed and "tar" in re.split(r"[.+]", self.media_type)

    @property
    def folder(self) -> str:
        """Return the folder of the archive that is the repository; the others of an image are its system."""
        is_image = "image.layer" in self.media_type or "rootfs" in self.media_type
        return MODELS if is_image and not self.file else ""


def _layers(registry: Registry, manifest: Mapping[str, Any]) -> Iterator[Layer]:
    """Yield the layers that hold files of a model.

    Raises:
        SourceRefused: a layer cannot be read.
    """
    layers = manifest.get("layers")
    for fields in layers if isinstance(layers, list) else ():
        described = _Descriptor.parse(fields)
        if described is None:
            raise SourceRefused(f"{registry.label}: a layer of its manifest has no valid digest or size")
        if described.is_archive:
            if described.media_type.endswith("zstd"):
                raise SourceRefused(
                    f"{registry.label}: layers packed with zstd are not read. Pack them with gzip."
                )
            yield Layer(described.digest, described.size, "", described.folder)
        elif described.file:
            inside(Path(), described.file)
            yield Layer(described.digest, described.size, described.file.removeprefix("./"), "")


class _Overlay:
    """The files of layers over each other, which are added from the last to the first."""

    def __init__(self, label: str) -> None:
        self.files: dict[str, SourceFile] = {}
        self.where: dict[str, tuple[Layer, str]] = {}
        self._label = label
        self._removed: set[str] = set()
        """Files and folders, each after a slash, that whiteouts of later layers name."""

    def add(self, layer: Layer, listing: Mapping[str, SourceFile]) -> None:
        """Add the layer under those that are there: it may lose files to them, and its whiteouts hold for the
        next; raise SourceRefused for too many names.
        """
        removed: set[str] = set()
        for long, file in listing.items():
            short = long.removeprefix(layer.under)
            folder, _, name = short.rpartition("/")
            if name.startswith(".wh."):
                hidden = "" if name == ".wh..wh..opq" else name.removeprefix(".wh.")
                removed.add(f"{_above(folder)[-1]}/{hidden}".rstrip("/"))
            elif short not in self.files and self._removed.isdisjoint(_above(short)):
                self.files[short], self.where[short] = file, (layer, long)
        self._removed |= removed
        if len(self.files) + len(self._removed) > MAX_FILES:
            raise SourceRefused(f"{self._label}: more than {MAX_FILES} files")


def _above(path: str) -> list[str]:
    """Return a path and the folders above it, each after a slash; the root is empty."""
    return list(accumulate(path.split("/") if path else (), "{}/{}".format, initial=""))


def _artifact(resolved: Resolved) -> ResolvedArtifact:
    if not isinstance(resolved, ResolvedArtifact):
        raise TypeError(f"expected what resolve returned, found {type(resolved).__name__}")
    return resolved


def open_source(settings: SourceSettings) -> OciSource:
    """Return the source."""
    return OciSource(Https(AddressGuard(settings.allowed_hosts)), settings.secrets, settings.work_dir)
