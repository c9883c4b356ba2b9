"""Addresses of replicas: one address, a list of them, or a name that stands for many.

``HOST:PORT``, ``HOST:PORT,HOST:PORT`` and ``dns:///NAME:PORT``, each with ``grpcs://`` before it where it has
TLS.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Final

from loramux_shared.faults import SettingsInvalid
from loramux_shared.wording import is_whole

TLS_SCHEME: Final = "grpcs://"
DNS_SCHEME: Final = "dns:///"
EXPECTED: Final = "expected HOST:PORT, a list of them, or dns:///NAME:PORT; with TLS, grpcs:// before each"


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
    return "," in words or is_name(words)


def is_name(part: str) -> bool:
    """Return True for a name that is looked up."""
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
