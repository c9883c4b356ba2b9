"""MLFLOW: artifacts of registered models and runs, over the REST API of a tracking server.

https://mlflow.org/docs/latest/rest-api.html. The operator names the server; an address names what is on it.
"""

import re
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, unquote

import httpx

from loramux_shared.adapter_files import PIECE
from loramux_shared.bundle.manifest import FileDigest
from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.faults import (
    Fault,
    RepoGated,
    RepoNotFound,
    SourceChanged,
    SourceRefused,
    SourceUnavailable,
)
from loramux_shared.sources import s3
from loramux_shared.sources.base import MAX_FILES, Resolved, SourceFile
from loramux_shared.sources.bucket import TIMEOUT_S, Bucket, BucketSource
from loramux_shared.sources.entries import SourceSettings
from loramux_shared.sources.fields import fields_of
from loramux_shared.sources.files import inside, pin_content
from loramux_shared.sources.https import printable
from loramux_shared.sources.retry import Busy
from loramux_shared.sources.secrets import Secrets, warn_unset
from loramux_shared.untrusted_json import JsonInvalid, parse_json
from loramux_shared.wording import is_whole

MAX_ANSWER: Final = 4 << 20
"""Bytes of an answer that is not a file."""
MAX_DEPTH: Final = 64
"""Folders within folders of a store; a deeper listing has no end."""
URI_VARIABLE: Final = "MLFLOW_TRACKING_URI"
_RUN: Final = re.compile(r"(?:mlflow://runs|runs:)/+(?P<run>[\w-]+)/(?P<folder>[^?#]+)")
_MODEL: Final = re.compile(
    r"mlflow://(?P<name>[^/@?#\s]+)(?:/(?P<version>[1-9][0-9]*)|@(?P<alias>[^/@?#\s]+))/*"
)
_PROXIED: Final = re.compile(r"mlflow-artifacts:(?://(?P<host>[^/]*))?/*(?P<root>.*)", re.DOTALL)
_PINNED: Final = re.compile(r"([1-9][0-9]*)-[0-9a-f]{64}")
_ARTIFACTS: Final = "mlflow-artifacts/artifacts"
_ABSENT: Final = frozenset({"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"})
"""Codes of errors: an alias or a run's id that is not known is a parameter that is not valid."""


class TrackingServer:
    """A tracking server, which also hands out the artifacts that it stores."""

    def __init__(self, client: httpx.Client, label: str, hint: str) -> None:
        self.client = client
        self.label = label
        self._hint = hint

    def answer(self, path: str, /, **parameters: str) -> Mapping[str, Any]:
        """Return the object that the API answers."""
        body, started = bytearray(), time.monotonic()
        with self.get(path, parameters) as response:
            for piece in response.iter_raw():
                body += piece
                if len(body) > MAX_ANSWER:
                    raise SourceRefused(f"{self.label}: {path}: more than {MAX_ANSWER} bytes in an answer")
                if time.monotonic() - started > TIMEOUT_S:
                    raise SourceUnavailable(f"{self.label}: {path}: the answer is too slow. Try again.")
        try:
            answer = parse_json(bytes(body))
        except JsonInvalid:
            answer = None
        if not isinstance(answer, dict):
            raise self.unexpected(path, "a JSON object", "something else")
        return answer

    def text(self, path: str, /, *names: str, **parameters: str) -> str:
        """Return a text in what the API answers, below these names."""
        found: Any = self.answer(path, **parameters)
        for name in names:
            found = found.get(name) if isinstance(found, dict) else None
        if not isinstance(found, str) or not found:
            raise self.unexpected(path, ".".join(names), "none")
        return found

    def unexpected(self, path: str, expected: str, found: str) -> SourceRefused:
        """Return the fault for an answer that is not MLflow's."""
        return SourceRefused(
            f"{self.label}: {path}: expected {expected}, found {found}. Correct {URI_VARIABLE}: it names the "
            "root of an MLflow server."
        )

    @contextmanager
    def get(self, path: str, parameters: Mapping[str, str] | None = None) -> Iterator[httpx.Response]:
        """Yield a response with its status checked; texts of the server are not repeated."""
        try:
            with self.client.stream("GET", f"api/2.0/{path}", params=parameters) as response:
                if response.status_code != httpx.codes.OK:
                    raise self._refused(response, path)
                yield response
        except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError, OSError) as error:
            kind = type(error).__name__
            raise SourceUnavailable(
                f"{self.label}: {path}: the tracking server did not answer completely ({kind}). "
                f"Start it, or correct {URI_VARIABLE}."
            ) from None

    def _refused(self, response: httpx.Response, path: str) -> Fault:
        status, start = response.status_code, next(response.iter_raw(), b"")
        code = re.search(rb'"error_code": *"([A-Z_]+)"', start)
        name = code[1].decode() if code else str(status)
        if name in _ABSENT or (status == httpx.codes.NOT_FOUND and (code or _ARTIFACTS in path)):
            return RepoNotFound(f"{self.label}: {path}: not found ({name}). Correct the address.")
        if status == httpx.codes.NOT_FOUND:
            return self.unexpected(path, "MLflow's API", "status 404")
        if status in {401, 403}:
            return RepoGated(f"{self.label}: {path}: refused ({name}). {self._hint}")
        message = f"{self.label}: {path}: answered with status {status}"
        if status in {408, 425, 429} or status >= 500:
            return Busy.until(message, response.headers.get("Retry-After"))
        return SourceRefused(f"{message}. Redirects are not followed: {URI_VARIABLE} names the server itself.")


class ProxiedArtifacts:
    """The artifacts that a tracking server stores itself, by their paths in its store."""

    def __init__(self, server: TrackingServer) -> None:
        self._server = server

    def list(self, prefix: str) -> Iterator[tuple[str, SourceFile]]:
        """Yield the files and folders below a folder; nothing tells whether a file was written again."""
        folders, count = [prefix.strip("/")], 0
        while folders:
            folder = folders.pop()
            entries = self._server.answer(_ARTIFACTS, path=folder).get("files", [])
            for entry in entries if isinstance(entries, list) else [None]:
                count += 1
                if count > MAX_FILES:
                    raise SourceRefused(
                        f"{self._server.label}: more than {MAX_FILES} files and folders; name a folder in it"
                    )
                path, size = self._entry(folder, entry)
                if size is None:
                    folders.append(path)
                    yield f"{path}/", SourceFile(0)
                else:
                    yield path, SourceFile(size, settled=False)

    def _entry(self, folder: str, entry: Any) -> tuple[str, int | None]:
        """Return the path of an entry, and its size; None for a folder."""
        label = self._server.label
        try:
            name, size = str(entry["path"]), None if entry.get("is_dir") else int(entry["file_size"])
        except (TypeError, KeyError, ValueError, OverflowError, AttributeError):
            raise self._server.unexpected(_ARTIFACTS, "files with path and file_size", "others") from None
        if folder.count("/") > MAX_DEPTH:
            raise SourceRefused(f"{label}: more than {MAX_DEPTH} folders within folders")
        if "/" in name or name == "." or (size is not None and size < 0):
            raise SourceRefused(f"{label}: {name[:200]!r}: not the name and size of a file in a folder")
        inside(Path(), name)
        return f"{folder}/{name}".lstrip("/"), size

    def read(self, key: str, version: str) -> Iterator[bytes]:
        """Yield the bytes of a file as it is now."""
        del version
        try:
            with self._server.get(f"{_ARTIFACTS}/{quote(key)}") as response:
                yield from response.iter_raw(PIECE)
        except RepoNotFound:
            raise SourceChanged(
                f"{self._server.label}: {key}: was deleted since it was listed. Build again."
            ) from None

    def close(self) -> None:
        """Leave the connections to the caller."""


class MlflowArtifacts:
    """The artifacts of a model's version or of a folder of a run, in the store that the server names."""

    def __init__(self, server: TrackingServer, repository: Repository, secrets: Secrets) -> None:
        self._server = server
        self._repository = repository
        self._secrets = secrets

    def list(self, prefix: str) -> Iterator[tuple[str, SourceFile]]:
        """Yield the artifacts below a folder; their versions begin with that of the model, or the run's id."""
        with self._located() as (identity, store, root):
            for key, file in store.list(root + prefix):
                yield key.removeprefix(root), replace(file, version=f"{identity} {file.version}")

    def read(self, key: str, version: str) -> Iterator[bytes]:
        """Yield an artifact's bytes, or raise `SourceChanged` where an alias names another version by now."""
        listed, _, stored = version.partition(" ")
        with self._located() as (identity, store, root):
            if identity != listed:
                raise SourceChanged(
                    f"{self._server.label}: expected version {listed}, found {identity}: the alias moved. "
                    "Build again."
                )
            yield from store.read(root + key, stored)

    def close(self) -> None:
        """Close the client's connections."""
        self._server.client.close()

    @contextmanager
    def _located(self) -> Iterator[tuple[str, Bucket, str]]:
        """Yield the id of the version or run, the store of its artifacts, and their folder there."""
        identity, uri = self._identified
        if run := _RUN.fullmatch(uri):
            uri = self._of_run(run)
        label = self._server.label
        store: Bucket
        if proxied := _PROXIED.fullmatch(uri):
            if proxied["host"] not in {None, "", self._server.client.base_url.netloc.decode()}:
                raise SourceRefused(
                    f"{label}: its artifacts are at another server, {proxied['host']!r}. Name that server with "
                    f"{URI_VARIABLE}, or in the secret."
                )
            store, root = ProxiedArtifacts(self._server), proxied["root"].strip("/")
            inside(Path(), root)
        elif uri.startswith("s3://"):
            store, root = s3.open_bucket(Repository(source=SourceKind.S3, repo=uri), self._secrets)
            root = root.strip("/")
        else:
            scheme, colon, _ = uri.partition(":")
            raise SourceRefused(
                f"{label}: its artifacts are at {scheme if colon else 'file'}:, which is not read through "
                "MLflow: expected mlflow-artifacts: or s3:. Start the server with --serve-artifacts, or name "
                "the folder itself as GCS, AZURE or LOCAL."
            )
        with closing(store):
            yield identity, store, f"{root}/" if root else ""

    @cached_property
    def _identified(self) -> tuple[str, str]:
        """Id of what the address names, and the address of its artifacts, which is looked up once."""
        repository = self._repository
        if run := _RUN.fullmatch(repository.repo):
            return run["run"], self._of_run(run)
        model = _MODEL.fullmatch(repository.repo)
        if model is None:
            raise SourceRefused(
                f"{self._server.label}: expected mlflow://MODEL/VERSION, mlflow://MODEL@ALIAS or "
                "mlflow://runs/RUN/PATH"
            )
        name, pinned = unquote(model["name"]), _PINNED.fullmatch(repository.revision)
        version = model["version"] or (pinned[1] if pinned else "")
        if not version:
            path = "mlflow/registered-models/alias"
            alias = unquote(model["alias"])
            version = self._server.text(path, "model_version", "version", name=name, alias=alias)
            if not is_whole(version):
                raise self._server.unexpected(path, "the number of a version", repr(version[:40]))
        uri = self._server.text(
            "mlflow/model-versions/get-download-uri", "artifact_uri", name=name, version=version
        )
        return version, uri

    def _of_run(self, run: re.Match[str]) -> str:
        """Return the address of a folder of a run."""
        root = self._server.text("mlflow/runs/get", "run", "info", "artifact_uri", run_id=run["run"])
        folder = unquote(run["folder"])
        inside(Path(), folder)
        return f"{root.rstrip('/')}/{folder.strip('/')}"


class MlflowSource(BucketSource):
    """A bucket whose revision also names the model's version or the run."""

    def pin(self, resolved: Resolved, files: Mapping[str, FileDigest]) -> Repository:
        """Return the repository with the id of its version or run, and the digest of its files, as revision."""
        identity = next(iter(resolved.files.values())).version.partition(" ")[0]
        repository = resolved.repository
        digest = repository.revision.removeprefix(f"{identity}-")
        pinned = pin_content(repository.model_copy(update={"revision": digest}), files)
        return pinned.model_copy(update={"revision": f"{identity}-{pinned.revision}"})


def open_bucket(repository: Repository, secrets: Secrets) -> tuple[MlflowArtifacts, str]:
    """Return the artifacts that an address names, as a bucket.

    Without a secret, the server and its credentials are those of MLflow's own variables. A secret stands for
    all credentials, and for the server where it names one: no credential is for two servers.
    """
    label, name = f"MLFLOW {repository.label}", repository.runtime_secret_name
    secret = fields_of(secrets, name, (), ("tracking_uri", "token", "username", "password"))
    if name and not secret:
        warn_unset(repository)

    def of(field: str) -> str:
        variable = f"MLFLOW_TRACKING_{field.upper()}"
        return secret.get(field, "") if name else secrets.get("", default_variable=variable) or ""

    uri = secret.get("tracking_uri") or secrets.get("", default_variable=URI_VARIABLE) or ""
    try:
        url = httpx.URL(uri.rstrip("/") + "/")
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in {"http", "https"} or not url.host or url.userinfo or url.query:
        raise SourceRefused(
            f"{label}: expected the address of a tracking server, http://HOST:PORT without a name or password, "
            f"in {URI_VARIABLE}, found {'another one' if uri else 'none'}. Set it where the server runs."
        )
    token, username = of("token"), of("username")
    headers = {"Accept-Encoding": "identity", "User-Agent": "loramux"}
    client = httpx.Client(
        base_url=url,
        headers=headers
        | ({"Authorization": printable(f"Bearer {token}", label)} if token and not username else {}),
        auth=httpx.BasicAuth(username, of("password")) if username else None,
        timeout=TIMEOUT_S,
        trust_env=False,  # no proxy and no netrc is between the server and its credentials
        verify=ssl.create_default_context() if url.scheme == "https" else False,  # http has none
    )
    hint = secrets.hint(name, default_variable="MLFLOW_TRACKING_TOKEN or MLFLOW_TRACKING_USERNAME")
    return MlflowArtifacts(TrackingServer(client, label, hint), repository, secrets), ""


def open_source(settings: SourceSettings) -> MlflowSource:
    """Return the source."""
    return MlflowSource(open_bucket, settings.secrets)
