"""The fleet of a configuration: replicas, and Envoy's own addresses."""

import re
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

from loramux_shared.faults import SettingsInvalid

_REPLICA: Final = re.compile(
    r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.\-]+)(:(?P<grpc>[0-9]+)(:(?P<http>[0-9]+))?)?"
)
_LISTEN: Final = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.\-]+):(?P<port>[0-9]+)")
DNS: Final = "dns:///"


@dataclass(frozen=True)
class Place:
    """An address, as a socket takes it."""

    host: str
    port: int

    @property
    def is_name(self) -> bool:
        """True when it has to be resolved."""
        try:
            ip_address(self.host)
        except ValueError:
            return True
        return False


@dataclass(frozen=True)
class Replica:
    """The addresses of a replica."""

    grpc: Place
    http: Place
    all_of_name: bool = False
    """Its host is a name that resolves to all replicas."""

    @property
    def ring_key(self) -> str | None:
        """Return its name on both hash rings, so that a model has one replica; None: its addresses are used."""
        return None if self.all_of_name else f"{self.grpc.host}:{self.grpc.port}"


@dataclass(frozen=True)
class Tls:
    """Envoy's check of a replica: its certificate is signed by an authority of a file (PEM), for a name."""

    ca: str
    name: str


@dataclass(frozen=True)
class Fleet:
    """Replicas, and Envoy before them."""

    replicas: tuple[Replica, ...]
    grpc: Place
    http: Place
    admin_port: int = 9901
    """Admin port on loopback."""
    tls: Tls | None = None
    first_token_s: float = 120.0
    """Then a streamed request that has no token is sent to another replica; 0: never."""

    @property
    def is_watched(self) -> bool:
        """True when each replica has its own address: one that stands still is then found over HTTP too."""
        return not any(replica.all_of_name for replica in self.replicas)


def replica_of(text: str, grpc_port: int, http_port: int) -> Replica:
    """Return the replica of ``HOST``, ``HOST:GRPC`` or ``HOST:GRPC:HTTP``; behind ``dns:///``, all of a name.

    Raises:
        SettingsInvalid: it is none of these.
    """
    found = _REPLICA.fullmatch(text.removeprefix(DNS))
    if found is None:
        raise SettingsInvalid(
            f"{text!r} is not a replica: expected HOST, HOST:GRPC_PORT or HOST:GRPC_PORT:HTTP_PORT, like "
            "10.0.0.4 or dns:///replicas."
        )
    host = found["host"].strip("[]")
    grpc, http = (
        Place(host, _port(int(found[name] or usual), text))
        for name, usual in (("grpc", grpc_port), ("http", http_port))
    )
    return Replica(grpc, http, all_of_name=text.startswith(DNS))


def listen_of(text: str) -> Place:
    """Return the place of ``HOST:PORT`` where Envoy is to listen.

    Raises:
        SettingsInvalid: it is no address.
    """
    found = _LISTEN.fullmatch(text)
    if found is None:
        raise SettingsInvalid(f"cannot listen on {text!r}: expected HOST:PORT, for example 0.0.0.0:50052.")
    place = Place(found["host"].strip("[]"), _port(int(found["port"]), text))
    if place.host == "localhost":
        return Place("127.0.0.1", place.port)
    if place.is_name:
        raise SettingsInvalid(f"cannot listen on {text!r}: expected an IP address, not a name; 0.0.0.0 is all.")
    return place


def require_distinct(fleet: Fleet) -> None:
    """Raise where two things are to be at one place.

    Raises:
        SettingsInvalid: a replica is named twice, or Envoy is to listen twice on one port.
    """
    seen: set[Place] = set()
    for replica in fleet.replicas:
        for place in (replica.grpc, replica.http):
            if place in seen:
                raise SettingsInvalid(f"{place.host}:{place.port} is named twice. Name each address once.")
            seen.add(place)
    ports = (fleet.grpc.port, fleet.http.port, fleet.admin_port)
    if len(set(ports)) < len(ports):
        raise SettingsInvalid(
            f"gRPC, HTTP and the admin page need three ports, found {', '.join(map(str, ports))}."
        )


def _port(port: int, text: str) -> int:
    if not 0 < port < 2**16:
        raise SettingsInvalid(f"{text!r}: expected ports from 1 to 65535, found {port}.")
    return port
