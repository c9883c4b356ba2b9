"""The configuration of an Envoy before replicas: envoy.yaml, which compose uses, with other addresses."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from loramux_shared.faults import SettingsInvalid

FILE: Final = Path(__file__).with_name("envoy.yaml")
GRPC_PORT: Final = 50052
HTTP_PORT: Final = 8000
ADMIN_PORT: Final = 9901
_ADDRESS: Final = re.compile(
    r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.\-]+)(:(?P<grpc>[0-9]+)(:(?P<http>[0-9]+))?)?"
)
_EACH_REPLICA: Final = re.compile(
    r"(?P<first>^ *# replica inference$.*?)(?P<second>^ *# replica inference-2$.*?)(?=^ *# end of replicas$)",
    re.MULTILINE | re.DOTALL,
)
"""Both replicas of the file, at each place where it names them; the second one is repeated for more."""
_PLACE: Final = re.compile(r"inference(-2)?(?P<between>:|', port_value: )(?P<port>50052|8000)")
_TLS: Final = re.compile(r"^( *)# tls ", re.MULTILINE)


@dataclass(frozen=True)
class Replica:
    """The addresses of a replica."""

    host: str
    grpc: int = GRPC_PORT
    http: int = HTTP_PORT


@dataclass(frozen=True)
class Listen:
    """An address where Envoy listens."""

    host: str
    port: int


@dataclass(frozen=True)
class Tls:
    """Envoy's check of a replica: its certificate is signed by an authority of a file (PEM), for a name."""

    ca: str
    name: str


@dataclass(frozen=True)
class Fleet:
    """Replicas, and Envoy before them."""

    replicas: Sequence[Replica]
    grpc: Listen = Listen("127.0.0.1", GRPC_PORT)
    http: Listen = Listen("127.0.0.1", HTTP_PORT)
    admin_port: int = ADMIN_PORT
    tls: Tls | None = None


def render(fleet: Fleet) -> str:
    """Return the configuration; the same fleet has the same text.

    Raises:
        SettingsInvalid: an address is named twice.
    """
    _require_distinct(fleet)
    text = FILE.read_text(encoding="utf-8")
    first, *others = fleet.replicas
    text = _EACH_REPLICA.sub(
        lambda found: _named(found["first"], first) + "".join(_named(found["second"], each) for each in others),
        text,
    )
    for listen, port in ((fleet.grpc, GRPC_PORT), (fleet.http, HTTP_PORT)):
        text = text.replace(
            f"address: 0.0.0.0, port_value: {port}", f"address: '{listen.host}', port_value: {listen.port}"
        )
    text = text.replace(f"port_value: {ADMIN_PORT}", f"port_value: {fleet.admin_port}")
    text = text.replace(f"loramux-envoy-{ADMIN_PORT}-", f"loramux-envoy-{fleet.admin_port}-")
    if fleet.tls is not None:
        text = (
            _TLS.sub(r"\1", text)
            .replace("TLS_CA", _quoted(fleet.tls.ca))
            .replace("TLS_NAME", _quoted(fleet.tls.name))
        )
    return text


def _named(body: str, replica: Replica) -> str:
    ports = {str(GRPC_PORT): replica.grpc, str(HTTP_PORT): replica.http}
    body = _PLACE.sub(lambda found: f"{replica.host}{found['between']}{ports[found['port']]}", body)
    return re.sub(r"# replica inference.*", f"# replica {replica.host}", body)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def replica_of(text: str) -> Replica:
    """Return the replica of ``HOST``, ``HOST:GRPC_PORT`` or ``HOST:GRPC_PORT:HTTP_PORT``.

    Raises:
        SettingsInvalid: it is none of these.
    """
    found = _ADDRESS.fullmatch(text)
    if found is None:
        raise SettingsInvalid(
            f"{text!r} is not a replica: expected HOST, HOST:GRPC_PORT or HOST:GRPC_PORT:HTTP_PORT, like "
            "10.0.0.4."
        )
    grpc, http = found["grpc"] or GRPC_PORT, found["http"] or HTTP_PORT
    return Replica(found["host"].strip("[]"), _port(grpc, text), _port(http, text))


def listen_of(text: str) -> Listen:
    """Return the address ``HOST:PORT`` where Envoy is to listen.

    Raises:
        SettingsInvalid: it is no address.
    """
    found = _ADDRESS.fullmatch(text)
    if found is None or found["grpc"] is None or found["http"] is not None:
        raise SettingsInvalid(f"cannot listen on {text!r}: expected HOST:PORT, for example 0.0.0.0:50052.")
    host = found["host"].strip("[]")
    try:
        ip_address(host)
    except ValueError as error:
        raise SettingsInvalid(
            f"cannot listen on {text!r}: expected an IP address, not a name; 0.0.0.0 is all."
        ) from error
    return Listen(host, _port(found["grpc"], text))


def _port(port: str | int, text: str) -> int:
    if not 0 < int(port) < 2**16:
        raise SettingsInvalid(f"{text!r}: expected ports from 1 to 65535, found {port}.")
    return int(port)


def _require_distinct(fleet: Fleet) -> None:
    places = [(each.host, port) for each in fleet.replicas for port in (each.grpc, each.http)]
    for host, port in places:
        if places.count((host, port)) > 1:
            raise SettingsInvalid(f"{host}:{port} is named twice. Name each address once.")
    ports = (fleet.grpc.port, fleet.http.port, fleet.admin_port)
    if len(set(ports)) < len(ports):
        raise SettingsInvalid(
            f"gRPC, HTTP and the admin page need three ports, found {', '.join(map(str, ports))}."
        )
