"""S3: folders of buckets of Amazon, or of anything that speaks its protocol."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, Final

import boto3
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, CredentialRetrievalError, ProfileNotFound

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
from loramux_shared.sources.bucket import TIMEOUT_S, BucketSource
from loramux_shared.sources.entries import SourceSettings
from loramux_shared.sources.fields import fields_of
from loramux_shared.sources.retry import Busy
from loramux_shared.sources.secrets import Secrets, warn_unset

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_ADDRESS: Final = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.\-]{1,61}[a-z0-9])(?P<folder>/[^?#]*)?")
_GONE: Final = frozenset({"NoSuchKey", "PreconditionFailed"})
_ELSEWHERE: Final = frozenset(
    {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
)


class S3Bucket:
    """A bucket through boto3, without the tries and waits of its own."""

    def __init__(self, client: S3Client, bucket: str, hint: str) -> None:
        self._client = client
        self._bucket = bucket
        self._hint = hint

    def list(self, prefix: str) -> Iterator[tuple[str, SourceFile]]:
        """Yield the objects below a prefix, with their ETags."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix)
        with self._translated("its listing"):
            for page in pages:
                for item in page.get("Contents", ()):
                    yield item["Key"], SourceFile(item["Size"], version=item["ETag"])

    def read(self, key: str, version: str) -> Iterator[bytes]:
        """Yield an object's bytes where its ETag is that one."""
        with self._translated(key):
            answer = self._client.get_object(Bucket=self._bucket, Key=key, IfMatch=version)
            with closing(answer["Body"]) as body:
                # Also for stores that do not know the condition.
                if answer["ETag"] != version:
                    raise _changed(self._bucket, key)
                yield from body.iter_chunks(PIECE)

    def close(self) -> None:
        """Close the client's connections."""
        self._client.close()

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """Turn boto's failures into ours; their texts hold addresses, and are not repeated."""
        try:
            yield
        except ClientError as error:
            raise self._answered(error, what) from None
        except (CredentialRetrievalError, ProfileNotFound) as error:
            raise RepoGated(
                f"S3 {self._bucket}: no credentials ({type(error).__name__}). {self._hint}"
            ) from None
        except BotoCoreError as error:
            raise SourceUnavailable(
                f"S3 {self._bucket}: {what}: the transfer was not complete ({type(error).__name__})"
            ) from None

    def _answered(self, error: ClientError, what: str) -> Fault:
        answer: Any = error.response
        code = answer.get("Error", {}).get("Code", "")
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        plain = "".join(char for char in str(code) if char.isalnum()) or "an error"
        if code in _GONE:
            return _changed(self._bucket, what)
        if code == "NoSuchBucket":
            return RepoNotFound(f"S3 {self._bucket}: no such bucket. Correct the address.")
        if code in _ELSEWHERE or status == 301:
            return SourceRefused(
                f"S3 {self._bucket}: in another region. Name it in the secret, or AWS_DEFAULT_REGION."
            )
        if status in {400, 401, 403}:
            return RepoGated(f"S3 {self._bucket}: {what}: refused ({plain}). {self._hint}")
        headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        return Busy.until(f"S3 {self._bucket}: {what}: answered {plain} ({status})", headers.get("retry-after"))


def open_bucket(repository: Repository, secrets: Secrets) -> tuple[S3Bucket, str]:
    """Return a bucket at ``s3://bucket/folder``, and the folder.

    Without a secret, credentials, region and endpoint are those of the ``AWS_*`` variables. A secret stands
    for all of them: without endpoint_url it is Amazon's. Without any credentials nothing is signed.
    """
    match = _ADDRESS.fullmatch(repository.repo)
    if match is None:
        raise SourceRefused(f"S3 {repository.label!r}: expected s3://BUCKET/FOLDER")
    name = repository.runtime_secret_name
    secret = fields_of(
        secrets, name, ("access_key_id", "secret_access_key"), ("region", "session_token", "endpoint_url")
    )
    hint = secrets.hint(name, default_variable="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if name and not secret:
        warn_unset(repository)
    options: dict[str, Any] = {"ignore_configured_endpoint_urls": True} if secret else {}
    try:
        session = boto3.session.Session()
        if not secret and (name or session.get_credentials() is None):
            options["signature_version"] = UNSIGNED
        client = session.client(
            "s3",
            aws_access_key_id=secret.get("access_key_id"),
            aws_secret_access_key=secret.get("secret_access_key"),
            aws_session_token=secret.get("session_token"),
            region_name=secret.get("region"),
            endpoint_url=secret.get("endpoint_url"),
            config=Config(
                connect_timeout=TIMEOUT_S,
                read_timeout=TIMEOUT_S,
                retries={"total_max_attempts": 1},
                response_checksum_validation="when_supported",
                **options,
            ),
        )
    except (BotoCoreError, ValueError) as error:
        raise SourceRefused(f"S3: the AWS settings are not valid ({type(error).__name__}). {hint}") from None
    return S3Bucket(client, match["bucket"], hint), match["folder"] or ""


def open_source(settings: SourceSettings) -> BucketSource:
    """Return the source."""
    return BucketSource(open_bucket, settings.secrets)


def _changed(bucket: str, what: str) -> SourceChanged:
    return SourceChanged(f"S3 {bucket}: {what}: changed since it was listed. Build again.")
