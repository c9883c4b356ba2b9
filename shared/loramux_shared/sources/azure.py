"""AZURE: folders of containers of Azure Blob Storage."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from azure.core import MatchConditions
from azure.core.exceptions import (
    AzureError,
    ClientAuthenticationError,
    HttpResponseError,
    ResourceModifiedError,
    ResourceNotFoundError,
)
from azure.storage.blob import ContainerClient

from loramux_shared.deployment import Repository
from loramux_shared.faults import RepoGated, RepoNotFound, SourceChanged, SourceRefused, SourceUnavailable
from loramux_shared.sources.base import SourceFile
from loramux_shared.sources.bucket import TIMEOUT_S, BucketSource, md5_of
from loramux_shared.sources.entries import SourceSettings
from loramux_shared.sources.fields import fields_of
from loramux_shared.sources.retry import Busy
from loramux_shared.sources.secrets import Secrets, warn_unset

CHUNK: Final = 16 << 20
"""Bytes of one request; every request names the ETag."""
_ADDRESS: Final = re.compile(
    r"azure://(?P<account>[a-z0-9]{3,24})/(?P<container>\$root|\$web|[a-z0-9][a-z0-9\-]{2,62})(?P<folder>/[^?#]*)?"
)


class AzureContainer:
    """A container through Azure's client, without the tries and waits of its own."""

    def __init__(self, client: ContainerClient, name: str, hint: str) -> None:
        self._client = client
        self._name = name
        self._hint = hint

    def list(self, prefix: str) -> Iterator[tuple[str, SourceFile]]:
        """Yield the blobs below a prefix, with their ETags."""
        with self._translated(""):
            for blob in self._client.list_blobs(name_starts_with=prefix):
                checksum = md5_of(blob.content_settings.content_md5)  # the uploader may set a checksum
                yield blob.name, SourceFile(blob.size, None, checksum, blob.etag)

    def read(self, key: str, version: str) -> Iterator[bytes]:
        """Yield a blob's bytes where its ETag is that one."""
        with self._translated(key):
            yield from self._client.download_blob(
                key, etag=version, match_condition=MatchConditions.IfNotModified
            ).chunks()

    def close(self) -> None:
        """Close the client's connections."""
        self._client.close()

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        """Turn Azure's failures into ours; their texts hold addresses, and are not repeated."""
        what = f"AZURE {self._name}" + (f": {key}" if key else "")
        try:
            yield
        except (ResourceModifiedError, ResourceNotFoundError) as error:
            if key:
                raise SourceChanged(f"{what}: changed since it was listed. Build again.") from None
            code = getattr(error, "error_code", None)
            raise RepoNotFound(f"{what}: no such container ({code}). {self._hint}") from None
        except ClientAuthenticationError:
            raise RepoGated(f"{what}: refused. {self._hint}") from None
        except HttpResponseError as error:
            status = error.status_code or 0
            if status in {400, 401, 403, 409}:  # 409: the account allows no public access
                raise RepoGated(f"{what}: refused ({status}). {self._hint}") from None
            headers = getattr(error.response, "headers", {})
            raise Busy.until(f"{what}: answered with status {status}", headers.get("Retry-After")) from None
        except (AzureError, OSError) as error:
            raise SourceUnavailable(f"{what}: the transfer was not complete ({type(error).__name__})") from None


def open_bucket(repository: Repository, secrets: Secrets) -> tuple[AzureContainer, str]:
    """Return a container at ``azure://account/container/folder``, and the folder.

    Without a secret the container must be public.
    """
    match = _ADDRESS.fullmatch(repository.repo)
    if match is None:
        raise SourceRefused(f"AZURE {repository.label!r}: expected azure://ACCOUNT/CONTAINER/FOLDER")
    account, name = match["account"], repository.runtime_secret_name
    secret = fields_of(secrets, name, ("account_key",), ("endpoint_url",))
    if name and not secret:
        warn_unset(repository)
    try:
        client = ContainerClient(
            secret.get("endpoint_url") or f"https://{account}.blob.core.windows.net",
            match["container"],
            {"account_name": account, "account_key": secret["account_key"]} if secret else None,
            retry_total=0,
            connection_timeout=TIMEOUT_S,
            read_timeout=TIMEOUT_S,
            max_single_get_size=CHUNK,
            max_chunk_get_size=CHUNK,
        )
    except (AzureError, ValueError):
        raise SourceRefused(f"secret {name!r}: account_key or endpoint_url is not valid") from None
    return AzureContainer(client, f"{account}/{match['container']}", secrets.hint(name)), match["folder"] or ""


def open_source(settings: SourceSettings) -> BucketSource:
    """Return the source."""
    return BucketSource(open_bucket, settings.secrets)
