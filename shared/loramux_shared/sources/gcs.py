"""GCS: folders of buckets of Google Cloud Storage, over its JSON API."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import quote

import google.auth
import requests
from google.auth.credentials import AnonymousCredentials, Credentials
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError
from google.auth.transport.requests import AuthorizedSession
from google.oauth2 import service_account
from urllib3.exceptions import HTTPError

from loramux_shared.adapter_files import PIECE
from loramux_shared.deployment import Repository
from loramux_shared.faults import (
    Fault,
    RepoGated,
    RepoNotFound,
    SourceChanged,
    SourceRefused,
    SourceUnavailable,
)
from loramux_shared.sources.base import SourceFile
from loramux_shared.sources.bucket import TIMEOUT_S, BucketSource, md5_of
from loramux_shared.sources.entries import SourceSettings
from loramux_shared.sources.retry import Busy
from loramux_shared.sources.secrets import Secrets, warn_unset
from loramux_shared.untrusted_json import parse_json

ENDPOINT: Final = "https://storage.googleapis.com"
EMULATOR_VARIABLE: Final = "STORAGE_EMULATOR_HOST"
SCOPES: Final = ("https://www.googleapis.com/auth/devstorage.read_only",)
# google-auth is marked as typed, but these functions have no types.
_anonymous: Callable[[], Credentials] = AnonymousCredentials
_from_key: Callable[..., Credentials] = service_account.Credentials.from_service_account_info
_open_session: Callable[[Credentials], AuthorizedSession] = AuthorizedSession
_ADDRESS: Final = re.compile(r"gs://(?P<bucket>[a-z0-9][a-z0-9._\-]{1,220}[a-z0-9])(?P<folder>/[^?#]*)?")


class GcsBucket:
    """A bucket through an authorized session: a listing and a download are all that is needed of the API."""

    def __init__(self, session: AuthorizedSession, endpoint: str, bucket: str, hint: str) -> None:
        self._session = session
        self._bucket = bucket
        self._objects = f"{endpoint}/storage/v1/b/{bucket}/o"
        self._hint = hint

    def list(self, prefix: str) -> Iterator[tuple[str, SourceFile]]:
        """Yield the objects below a prefix, with their generations."""
        fields = "nextPageToken,items(name,size,generation,md5Hash)"
        parameters = {"prefix": prefix, "fields": fields}
        while True:
            with self._get(self._objects, parameters, "its listing") as answer:
                page = answer.json()
            for item in page.get("items", ()):
                checksum = md5_of(item.get("md5Hash"))  # composed objects have none
                yield item["name"], SourceFile(int(item["size"]), None, checksum, item["generation"])
            if not page.get("nextPageToken"):
                return
            parameters["pageToken"] = page["nextPageToken"]

    def read(self, key: str, version: str) -> Iterator[bytes]:
        """Yield an object's bytes, as they are stored, where its generation is that one."""
        address = f"{self._objects}/{quote(key, safe='')}"
        with self._get(address, {"alt": "media", "ifGenerationMatch": version}, key) as answer:
            yield from answer.raw.stream(PIECE, decode_content=False)

    def close(self) -> None:
        """Close the client's connections."""
        self._session.close()  # type: ignore[no-untyped-call]  # of requests, which has none here

    @contextmanager
    def _get(self, address: str, parameters: dict[str, str], what: str) -> Iterator[requests.Response]:
        """Turn what goes wrong into our failures; the texts of others are not repeated."""
        try:
            with self._session.get(
                address,
                params=parameters,
                headers={"Accept-Encoding": "gzip"},  # otherwise the server unpacks objects
                timeout=TIMEOUT_S,
                stream=True,
                allow_redirects=False,
            ) as answer:
                if answer.status_code != requests.codes.ok:
                    raise self._answered(answer, what)
                yield answer
        except GoogleAuthError as error:
            if isinstance(error, TransportError):
                raise SourceUnavailable(f"GCS {self._bucket}: the token endpoint does not answer") from None
            raise RepoGated(
                f"GCS {self._bucket}: no token for these credentials ({type(error).__name__}). {self._hint}"
            ) from None
        except (requests.RequestException, HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SourceUnavailable(
                f"GCS {self._bucket}: {what}: the transfer was not complete ({type(error).__name__})"
            ) from None

    def _answered(self, answer: requests.Response, what: str) -> Fault:
        status = answer.status_code
        if what != "its listing" and status in {404, 412}:
            return SourceChanged(f"GCS {self._bucket}: {what}: changed since it was listed. Build again.")
        if status == 404:
            return RepoNotFound(f"GCS {self._bucket}: no such bucket. Correct the address. {self._hint}")
        if status in {400, 401, 403}:
            return RepoGated(f"GCS {self._bucket}: {what}: refused ({status}). {self._hint}")
        return Busy.until(
            f"GCS {self._bucket}: {what}: answered with status {status}", answer.headers.get("Retry-After")
        )


def open_bucket(repository: Repository, secrets: Secrets) -> tuple[GcsBucket, str]:
    """Return a bucket at ``gs://bucket/folder``, and the folder.

    Without a secret the application default credentials are used, and where there are none, none.
    """
    match = _ADDRESS.fullmatch(repository.repo)
    if match is None:
        raise SourceRefused(f"GCS {repository.label!r}: expected gs://BUCKET/FOLDER")
    hint = secrets.hint(repository.runtime_secret_name, default_variable="GOOGLE_APPLICATION_CREDENTIALS")
    session = _open_session(_credentials(repository, secrets))
    endpoint = os.environ.get(EMULATOR_VARIABLE, "").rstrip("/") or ENDPOINT
    return GcsBucket(session, endpoint, match["bucket"], hint), match["folder"] or ""


def open_source(settings: SourceSettings) -> BucketSource:
    """Return the source."""
    return BucketSource(open_bucket, settings.secrets)


def _credentials(repository: Repository, secrets: Secrets) -> Credentials:
    name = repository.runtime_secret_name
    text = secrets.get(name) if name else None
    if text is not None:
        try:
            info: dict[str, Any] = parse_json(text)
            return _from_key(info, scopes=SCOPES)
        except (GoogleAuthError, ValueError, TypeError, AttributeError):
            raise SourceRefused(f"secret {name!r}: expected the JSON key of a service account") from None
    if name:
        warn_unset(repository)
        return _anonymous()
    try:
        return google.auth.default(scopes=SCOPES)[0]
    except DefaultCredentialsError:
        return _anonymous()
