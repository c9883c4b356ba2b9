"""Addresses of replicas: one address, a list of them, or a name that stands for many.

``HOST:PORT``, ``HOST:PORT,HOST:PORT`` and ``dns:///NAME:PORT``, each with ``grpcs://`` before it where it has
TLS.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from loramux_shared.faults import ServerUnavailable, SettingsInvalid
from loramux_shared.wording import is_whole

TLS_SCHEME: Final = "grpcs://"
DNS_SCHEME: Final = "dns:///"
EXPECTED: Final = "expected HOST:PORT, a list of them, or dns:///NAME:PORT; with TLS, grpcs:// before each"
EVERY_S: Final = 10.0
"""A name is looked up again after this time."""
DOUBT_S: Final = 1.0
"""The shortest time between two look-ups after failures."""


@dataclass(frozen=True)
class Address:
    """The address of one replica."""

    target: str
    """``HOST:PORT``, with ``grpcs://`` before it where it has TLS."""
    name: str = ""
    """Name that its certificate must have, where it was found by one."""


def split(words: str) -> tuple[str, ...]:
    """Return the parts of a list of addresses, each once.

    Raises:
        SettingsInvalid: there is none, or one has no port.
    """
    parts = tuple(dict.fromkeys(each.strip() for each in words.split(",") if each.strip()))
    for each in parts or ("nothing",):
        host, _, port = each.removeprefix(TLS_SCHEME).removeprefix(DNS_SCHEME).rpartition(":")
        if not host or not is_whole(port) or "/" in host or int(port) > 65535:
            raise SettingsInvalid(f"{each}: {EXPECTED}.")
    return parts


def is_many(words: str) -> bool:
    """Return True if there may be several replicas behind these words."""
    return "," in words or _is_name(words)


def _is_name(part: str) -> bool:
    return part.removeprefix(TLS_SCHEME).startswith(DNS_SCHEME)


def look_up(part: str) -> tuple[Address, ...]:
    """Return the replicas behind one part.

    Raises:
        SettingsInvalid: the name does not resolve.
    """
    scheme = TLS_SCHEME if part.startswith(TLS_SCHEME) else ""
    rest = part.removeprefix(TLS_SCHEME)
    if not rest.startswith(DNS_SCHEME):
        return (Address(part),)
    host, _, port = rest.removeprefix(DNS_SCHEME).rpartition(":")
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise SettingsInvalid(f"{part}: expected dns:///NAME:PORT of a name that resolves.") from None
    hosts = dict.fromkeys(str(address[4][0]) for address in found)
    name = host if scheme else ""
    bracketed = (f"[{each}]" if ":" in each else each for each in hosts)
    return tuple(Address(f"{scheme}{each}:{port}", name) for each in bracketed)


def resolve(words: str) -> tuple[Address, ...]:
    """Return the replicas behind a list, each once.

    Raises:
        SettingsInvalid: there is none, one has no port, or a name does not resolve.
    """
    found = (address for part in split(words) for address in look_up(part))
    return tuple({each.target: each for each in found}.values())


class Members:
    """The replicas of a fleet; names among them are looked up again while they are used, in a thread."""

    def __init__(
        self,
        parts: Sequence[str],
        look: Callable[[str], Iterable[Address]] = look_up,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._parts, self._look, self._clock = parts, look, clock
        self._fixed = not any(map(_is_name, parts))
        self._lock = threading.Lock()
        self._known: tuple[Address, ...] = ()
        self._looked = self._due = 0.0
        self._looking = False

    @property
    def known(self) -> bool:
        """Return True if `now` answers at once."""
        return bool(self._known) or self._fixed

    def now(self) -> tuple[Address, ...]:
        """Return the replicas; the first time this waits for a name server.

        Raises:
            ServerUnavailable: no name resolves.
        """
        with self._lock:
            if not self._known:
                self._known = self._all()
                self._looked = self._clock()
                self._due = self._looked + EVERY_S
            elif not self._fixed and not self._looking and self._clock() >= self._due:
                self._looking = True
                threading.Thread(target=self._look_again, name="loramux-names", daemon=True).start()
            return self._known

    def doubt(self) -> None:
        """Look names up soon: a replica failed."""
        with self._lock:
            self._due = min(self._due, self._looked + DOUBT_S)

    def _look_again(self) -> None:
        try:
            found = self._all()
        except ServerUnavailable:  # the name server's bad moment: those that were known may well be there
            found = self._known
        with self._lock:
            self._known, self._looking = found, False
            self._looked = self._clock()
            self._due = self._looked + EVERY_S

    def _all(self) -> tuple[Address, ...]:
        found: dict[str, Address] = {}
        missing: SettingsInvalid | None = None
        for part in self._parts:
            try:
                found |= {each.target: each for each in self._look(part)}
            except SettingsInvalid as fault:
                missing = fault
        if not found:
            raise ServerUnavailable(missing.message if missing else "there are no replicas.")
        return tuple(found.values())
