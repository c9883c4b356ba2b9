"""A store in a bucket of Amazon S3 or of anything that speaks its protocol."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore import exceptions as aws
from botocore.awsrequest import AWSPreparedRequest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, IncompleteReadError, ResponseStreamingError
from botocore.httpsession import URLLib3Session
from botocore.response import StreamingBody
from tenacity import retry, retry_if_exception_type, stop_after_attempt

from loramux_shared.faults import SettingsInvalid, StoreUnavailable
from loramux_shared.storage.base import (
    Entry,
    ObjectMissing,
    bound_of,
    bounded_keys,
    check_size,
    checked_key,
    checked_prefix,
    is_key,
    read_bounded,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PART_BYTES = 16 << 20
"""A larger object is uploaded in parts of this size, several at once; no reader sees a part."""
PARTS_AT_ONCE = 4
PIECE = 1 << 20
CONNECT_TIMEOUT_S = 5
ANSWER_BYTES = 8 << 20
"""A page of a listing with a thousand keys of the longest, or an error."""
READ_TIMEOUT_S = 20
"""Between two pieces. A store that accepts and says nothing is given up after twice as long."""

_TRANSFER = TransferConfig(
    multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=PARTS_AT_ONCE
)

# botocore retries requests, but not an answer whose body breaks off.
_unbroken = retry(
    retry=retry_if_exception_type((IncompleteReadError, ResponseStreamingError)),
    stop=stop_after_attempt(3),
    reraise=True,
)


class S3Store:
    """Objects below a prefix of a bucket.

    Credentials, region and endpoint are those of the standard ``AWS_*`` variables and files, unless given
    here. With an endpoint, botocore addresses the bucket by path, as MinIO and others want it.

    Raises:
        SettingsInvalid: the endpoint is no http address.
        StoreUnavailable: the configured AWS profile does not exist.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        endpoint_url: str | None = None,
        region: str | None = None,
        client: S3Client | None = None,
    ) -> None:
        self._bucket = bucket
        self._prefix = f"{checked_key(prefix.strip('/'))}/" if prefix.strip("/") else ""
        self.uri = f"s3://{bucket}/{self._prefix}".rstrip("/")
        self._client = client or _new_client(self.uri, endpoint_url, region)
        endpoint = self._client._endpoint  # type: ignore[attr-defined]  # botocore has no hook
        endpoint.http_session = _BoundedSession(self.uri, endpoint.http_session)

    def get(self, key: str, bound: int | None = None) -> bytes:
        """Return an object's bytes, or raise `ObjectMissing` or `RecordTooLarge`."""
        with self._translated():
            try:
                return self._read(key, bound_of(key, bound))
            except self._client.exceptions.NoSuchKey:
                raise ObjectMissing(f"{self.uri}: no object {key!r}") from None

    def put(self, key: str, data: bytes | Path) -> None:
        """Store bytes, or a file's content, under a key."""
        full_key = self._prefix + checked_key(key)
        if isinstance(data, Path):
            data.open("rb").close()  # a source that cannot be opened is no fault of the store
        else:
            check_size(self.uri, key, len(data), bound_of(key))
        # Parts of a named file are read as they are sent; parts of an open file are held in memory.
        source = str(data) if isinstance(data, Path) else io.BytesIO(data)
        with self._translated(), create_transfer_manager(self._client, _TRANSFER) as transfers:
            transfers.upload(source, self._bucket, full_key).result()

    def take(self, key: str, file: Path) -> None:
        """Store a file's content under a key, and remove the file."""
        self.put(key, file)
        file.unlink()

    def sha256(self, key: str) -> str | None:
        """Return the sha256 of an object in hex, read back in pieces, or None when there is none."""
        with self._translated():
            try:
                return self._hashed(self._prefix + checked_key(key))
            except self._client.exceptions.NoSuchKey:
                return None

    def list(self, prefix: str) -> Iterator[str]:
        """Yield the keys that begin with prefix, in lexicographic order."""
        for entry in self.entries(prefix):
            yield entry.key

    def entries(self, prefix: str) -> Iterator[Entry]:
        """Yield what `list` yields, with size and age."""
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix + checked_prefix(prefix)
        )
        with self._translated():
            items = (item for page in pages for item in page.get("Contents", ()))
            for item in bounded_keys(self.uri, prefix, items):
                key = item["Key"].removeprefix(self._prefix)
                if is_key(key):  # consoles mark folders by "/" at the end
                    yield Entry(key, item["Size"], item["LastModified"])

    def delete(self, key: str) -> None:
        """Remove an object; no error when there is none."""
        with self._translated():
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + checked_key(key))

    @_unbroken
    def _read(self, key: str, bound: int) -> bytes:
        answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + checked_key(key))
        with closing(answer["Body"]) as body:
            return read_bounded(self.uri, key, body.read, bound, answer.get("ContentLength"))

    @_unbroken
    def _hashed(self, full_key: str) -> str:
        digest = hashlib.sha256()
        with closing(self._client.get_object(Bucket=self._bucket, Key=full_key)["Body"]) as body:
            for piece in body.iter_chunks(PIECE):
                digest.update(piece)
        return digest.hexdigest()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (BotoCoreError, ClientError) as error:
            raise store_fault(error, self.uri, self._bucket, self._client.meta.endpoint_url) from error


class _BoundedSession:
    """Bounds the answers that botocore itself reads into memory: listings and errors."""

    def __init__(self, uri: str, session: URLLib3Session) -> None:
        self._uri = uri
        self._session = session

    def send(self, request: AWSPreparedRequest) -> Any:
        """Send a request; raises `RecordTooLarge` of an answer that exceeds `ANSWER_BYTES`."""
        is_object, request.stream_output = request.stream_output, True
        answer: Any = self._session.send(request)  # the stubs of botocore know neither attribute
        if not is_object or answer.status_code >= HTTPStatus.MULTIPLE_CHOICES:
            no_length: Any = None  # the body of a HEAD is empty
            what, body = f"answer {answer.status_code}", StreamingBody(answer.raw, no_length)
            try:
                answer._content = read_bounded(self._uri, what, body.read, ANSWER_BYTES, None)
            except BaseException:
                body.close()
                raise
        return answer

    def close(self) -> None:
        """Close the connections."""
        self._session.close()


def _new_client(uri: str, endpoint_url: str | None, region: str | None) -> S3Client:
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        tcp_keepalive=True,
        max_pool_connections=32,
        retries={"mode": "standard", "total_max_attempts": 2},
        # Many stores other than Amazon's refuse the checksums that boto3 adds by itself.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        # A separate session: the default session is not safe for several threads.
        return boto3.session.Session().client(
            "s3", endpoint_url=endpoint_url, region_name=region, config=config
        )
    except ValueError as error:
        raise SettingsInvalid(
            f"{uri}: the S3 endpoint is not an address. Set AWS_ENDPOINT_URL_S3 to http(s)://HOST:PORT."
        ) from error
    except BotoCoreError as error:
        raise store_fault(error, uri, "", "") from error


# Keys are the error codes of answers; {bucket} and {at} (the endpoint) are filled in.
_ANSWERS = {
    "NoSuchBucket": "bucket {bucket!r} does not exist at {at}. Create it, or correct the store's address.",
    "InvalidBucketName": "{bucket!r} is not a valid bucket name. Correct the store's address.",
    "AccessDenied": "access denied by {at}. Allow these credentials to get, put, list and delete objects "
    "of bucket {bucket!r}.",
    "InvalidAccessKeyId": "{at} does not know the access key. Check AWS_ACCESS_KEY_ID.",
    "SignatureDoesNotMatch": "{at} refuses the signature: the secret does not belong to the access key. "
    "Check AWS_SECRET_ACCESS_KEY.",
    "ExpiredToken": "the credentials have expired. Renew them.",
    "InvalidToken": "{at} refuses the session token. Check AWS_SESSION_TOKEN.",
    "RequestTimeTooSkewed": "this machine's clock differs too much from that of {at}. Set it.",
    "PermanentRedirect": "bucket {bucket!r} is in another region. Set AWS_DEFAULT_REGION.",
    "AuthorizationHeaderMalformed": "bucket {bucket!r} is in another region. Set AWS_DEFAULT_REGION.",
}

_FAILURES: tuple[tuple[tuple[type[BotoCoreError], ...], str], ...] = (
    (
        (aws.NoCredentialsError, aws.PartialCredentialsError, aws.CredentialRetrievalError),
        "no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.",
    ),
    ((aws.ProfileNotFound,), "the AWS profile does not exist. Check AWS_PROFILE."),
    ((aws.SSLError,), "no TLS connection to {at}. Check that the endpoint speaks https, and AWS_CA_BUNDLE."),
    (
        (aws.EndpointConnectionError, aws.ConnectTimeoutError, aws.ProxyConnectionError),
        "cannot connect to {at}. Check AWS_ENDPOINT_URL_S3 and that the server runs.",
    ),
    (
        (aws.ReadTimeoutError,),
        "{at} accepts connections but does not answer. Check the server and the network.",
    ),
    (
        (aws.HTTPClientError, aws.IncompleteReadError),
        "the connection to {at} broke off. Try again; check the server and the network.",
    ),
)


def store_fault(error: BotoCoreError | ClientError, uri: str, bucket: str, endpoint: str) -> StoreUnavailable:
    """Return the fault for an error of botocore: one line, without anything secret."""
    text = _of_answer(error) if isinstance(error, ClientError) else _of_failure(error)
    return StoreUnavailable(f"{uri}: {text.format(bucket=bucket, at=_without_credentials(endpoint))}")


def _of_answer(error: ClientError) -> str:
    code = error.response.get("Error", {}).get("Code", "")
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    # The answer's own message is left out: it may repeat headers.
    plain = "".join(char for char in code if char.isalnum())
    return _ANSWERS.get(code, f"{{at}} answered {plain or 'an error'} ({status}) to {error.operation_name}.")


def _of_failure(error: BotoCoreError) -> str:
    for kinds, text in _FAILURES:
        if isinstance(error, kinds):
            return text
    return f"the S3 client failed with {type(error).__name__}. Check the AWS_* settings."


def _without_credentials(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
