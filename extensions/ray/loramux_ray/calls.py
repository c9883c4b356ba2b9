"""The messages between a proxy and a replica."""

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc

from loramux_shared.faults import PermissionDenied

Metadata = Sequence[tuple[str, str | bytes]]
Messages = list[dict[str, Any]]
"""ASGI's, in the order in which they are sent."""

UNGUARDED: Final = (
    "this server requires no key, so it answers only this machine. Give the replicas LORAMUX_KEYS_FILE or "
    "LORAMUX_API_KEYS, or LORAMUX_INSECURE=1 where every client that reaches them may call."
)


@dataclass(frozen=True)
class RpcCall:
    """A call of gRPC."""

    method: str
    """``/PACKAGE.SERVICE/METHOD``."""
    request: bytes
    """Its message; nothing where messages follow with `BuilderReplica.send`."""
    metadata: Metadata
    timeout_s: float | None
    """Until its deadline."""
    peer: str
    """The host that it comes from."""
    upload: str = ""
    """Name by which messages follow, where they do."""


@dataclass(frozen=True)
class HttpCall:
    """A request of HTTP, body included."""

    scope: Mapping[str, Any]
    body: bytes
    peer: str


@dataclass(frozen=True)
class End:
    """The status of a call that failed."""

    code: int
    details: str
    trailing: Metadata

    @property
    def elsewhere(self) -> bool:
        """True where another replica may answer."""
        return self.code == int(grpc.StatusCode.UNAVAILABLE.value[0])


def host_of(peer: str) -> str:
    """Return the host of what gRPC calls a peer: ``ipv4:127.0.0.1:4711``, ``ipv6:[::1]:4711``."""
    address = peer.partition(":")[2].rpartition(":")[0]
    return address.replace("%5B", "").replace("%5D", "").strip("[]")


def require_local(peer: str) -> None:
    """Refuse a host that is not this machine.

    Raises:
        PermissionDenied: it is another one.
    """
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        raise PermissionDenied(UNGUARDED) from None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    if not (mapped or address).is_loopback:
        raise PermissionDenied(UNGUARDED)
