"""Opening a store by its address."""

import re
from pathlib import Path

from loramux_shared.faults import SettingsInvalid
from loramux_shared.storage.base import Store, checked_key
from loramux_shared.storage.local import LocalStore

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")


def open_store(uri: str, *, s3_endpoint_url: str | None = None) -> Store:
    """Return the store at ``s3://bucket/prefix``, ``file:///dir`` or ``file://~/dir``; nothing is created.

    S3's endpoint, region and credentials are read from the standard ``AWS_*`` variables.

    Raises:
        SettingsInvalid: the address has another form, or the packages that it needs are not installed.
        StoreUnavailable: the configured AWS profile does not exist.
    """
    scheme, _, place = uri.partition("://")
    if scheme == "file" and place.startswith(("/", "~/")) and "\0" not in place:
        return LocalStore(_folder(place, uri))
    if scheme == "s3":
        bucket, _, prefix = place.partition("/")
        if _BUCKET.fullmatch(bucket) and _is_prefix(prefix.strip("/")):
            try:
                from loramux_shared.storage.s3 import S3Store  # half a second, and an extra
            except ModuleNotFoundError as error:
                raise SettingsInvalid(
                    f"store {uri!r} needs {error.name}, not installed here: pip install 'loramux[store]'"
                ) from error
            return S3Store(bucket, prefix, endpoint_url=s3_endpoint_url)
    raise SettingsInvalid(
        f"store {_without_credentials(uri)!r}: expected s3://BUCKET/PREFIX, file:///DIR or file://~/DIR. "
        "S3's endpoint and credentials are set by AWS_ENDPOINT_URL_S3, AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY."
    )


def _folder(place: str, uri: str) -> Path:
    try:
        return Path(place).expanduser()
    except RuntimeError as error:
        raise SettingsInvalid(f"store {uri!r}: this user has no home. Use file:///DIR.") from error


def _is_prefix(prefix: str) -> bool:
    if not prefix:
        return True
    try:
        checked_key(prefix)
    except ValueError:
        return False
    return not set("?#") & set(prefix)


def _without_credentials(uri: str) -> str:
    return re.sub(r"//.*@", "//***@", uri)
