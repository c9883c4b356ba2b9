"""The keys that open a server, read again when their file changes."""

import hmac
from base64 import b64decode
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import structlog

from loramux_shared.access.keys import Access, KeyEntry, Scope, digest, parse_keys
from loramux_shared.adapter_files import read_small
from loramux_shared.faults import PermissionDenied, SettingsInvalid, Unauthenticated


class Watch:
    """Detect changes of files by inode, size and time of change: one ``stat`` each, 5 us, needs no task."""

    def __init__(self, *paths: Path) -> None:
        self._paths = paths
        self._seen: tuple[tuple[int, int, int] | None, ...] | None = None

    def changed(self) -> bool:
        """True at the first call, and when a file is not what it was at the last call; then read them."""
        now = tuple(map(_mark, self._paths))
        changed = now != self._seen
        self._seen = now
        return changed


def _mark(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


VARIABLE = "LORAMUX_API_KEYS"

log = structlog.get_logger()


class Keyring:
    """The keys of a file and of a variable. The file is read again at the first use after a change."""

    def __init__(self, file: Path | None = None, text: str = "") -> None:
        self._file = file
        self._text = text
        self._watch = Watch(*([file] if file else []))
        self._watch.changed()
        self._entries = self._read()

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Keyring({len(self)} keys, file={self._file})"

    def authorize(self, presented: str | None, scope: Scope | None) -> Access:
        """Return the rights of a key that has a scope; scope None: any key will do. Raise Unauthenticated for
        no key of ours, and PermissionDenied for one without the scope.
        """
        if self._watch.changed():
            self._reload()
        if presented is None:
            raise Unauthenticated(
                "this server requires an API key: send it once, as `authorization: Bearer KEY`, or over "
                "HTTP as `x-api-key: KEY` (loramux reads LORAMUX_API_KEY)."
            )
        # Neither step tells anything by its time: the search compares hashes of a digest, which a caller cannot
        # steer towards another, and what it finds is compared in constant time.
        hashed = digest(presented)
        entry = self._entries.get(hashed)
        if entry is None or not hmac.compare_digest(bytes.fromhex(entry.sha256), hashed):
            raise Unauthenticated("this server does not know the API key; it may have been removed.")
        access = entry.access
        if scope is not None and not access.may(scope):
            raise PermissionDenied(
                f"the API key {access.key_id!r} has the scopes {', '.join(sorted(access.scopes))}, and this "
                f"call needs the scope {scope}. Use a key that has it."
            )
        return access

    def rights_of(self, key_id: str) -> Access | None:
        """Return the rights of a key that may infer, by its id; None where there is none."""
        if self._watch.changed():
            self._reload()
        found = (entry.access for entry in self._entries.values() if entry.id == key_id)
        return next((access for access in found if access.may(Scope.INFER)), None)

    def _reload(self) -> None:
        try:
            self._entries = self._read()
        except SettingsInvalid as fault:
            log.warning("keys file is invalid, the previous keys stay", file=str(self._file), why=fault.message)
        else:
            log.info("keys file read again", file=str(self._file), keys=len(self))

    def _read(self) -> Mapping[bytes, KeyEntry]:
        lines = [self._text] if self._file is None else [self._text, read_keys_file(self._file)]
        places = (VARIABLE, str(self._file))
        entries = [
            entry for text, where in zip(lines, places, strict=False) for entry in parse_keys(text, where)
        ]
        return {bytes.fromhex(entry.sha256): entry for entry in entries}


def read_keys_file(path: Path) -> str:
    """Return the text of a keys file; raise SettingsInvalid where it cannot be read."""
    try:
        return read_small(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise SettingsInvalid(
            f"keys file {path}: {why}. `loramux keys new --scope infer --file {path}` makes one."
        ) from error


def key_of(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """Return the key that HTTP headers show: ``authorization`` as `bearer` reads it, or ``x-api-key``.

    Both may say the same; None where they say two things, or nothing.
    """
    values: dict[bytes, list[str]] = {}
    for name, value in headers:
        values.setdefault(name, []).append(value.decode("latin-1"))
    keys = {bearer(values[b"authorization"])} if b"authorization" in values else set()
    keys |= {each.strip() or None for each in values.get(b"x-api-key", ())}
    return keys.pop() if len(keys) == 1 else None


def bearer(headers: Sequence[str]) -> str | None:
    """Return the key of the ``authorization`` headers of a call; None unless one alone has it.

    It is what Bearer shows, or the password of Basic (RFC 7617), which clients make of ``https://:KEY@HOST``.
    """
    if len(headers) != 1:
        return None
    scheme, _, key = headers[0].partition(" ")
    match scheme.lower():
        case "bearer":
            return key.strip() or None
        case "basic":
            try:
                named = b64decode(key.strip(), validate=True).decode()
            except ValueError:
                return None
            return named.partition(":")[2] or None
        case _:
            return None
