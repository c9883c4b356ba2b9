"""Addresses that a service listens on."""

from __future__ import annotations

import os
import socket
from typing import Final

from loramux_shared.faults import SettingsInvalid

BACKLOG: Final = 4096
"""Connections that wait to be accepted, as many as an endpoint may hold; Linux has its own bound, somaxconn."""


def listen(address: str) -> socket.socket:
    """Return a socket that listens on ``HOST:PORT``; port 0 draws a free one.

    Raises:
        SettingsInvalid: something else listens there, or it is no address of this machine.
    """
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        family = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0][0]
        both = family == socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server((host, int(port)), family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except (OSError, OverflowError, ValueError) as error:
        number = error.errno if isinstance(error, OSError) else None
        why = os.strerror(number) if number and number > 0 else str(error)  # below 0: of the resolver
        raise cannot_listen(address, why) from error


def require_free(address: str) -> None:
    """Raise where a service could not listen; a server that binds a Unix socket takes it over.

    Raises:
        SettingsInvalid: something else listens there, or it is no address of this machine.
    """
    if not address.startswith("unix:"):
        listen(address).close()


def cannot_listen(address: str, why: str) -> SettingsInvalid:
    """Return the fault of a service that cannot listen."""
    return SettingsInvalid(
        f"cannot listen on {address!r} ({why}): expected a free HOST:PORT of this machine. Stop what listens "
        "there, or choose another."
    )
