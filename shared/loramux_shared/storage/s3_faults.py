"""The meaning of an S3 store's refusal, and its cure."""

from __future__ import annotations

from urllib.parse import urlsplit

from botocore import exceptions as aws
from botocore.exceptions import BotoCoreError, ClientError

from loramux_shared.faults import StoreUnavailable

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
    (
        (aws.SSLError,),
        "no TLS connection to {at}. Check that the endpoint speaks https, and AWS_CA_BUNDLE.",
    ),
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
