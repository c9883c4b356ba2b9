"""gRPC's options of connections, for servers and for clients."""

import os
import socket
from typing import Final

from loramux_shared.faults import SettingsInvalid

MAX_REQUEST_BYTES = 8 * 1024 * 1024
"""Largest request, unpacked, of either API: eight bytes for each token of the longest prompts."""
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
"""Largest message of an answer."""

PING_S = 30
"""A connection with open calls that is silent so long is asked whether the other side is there ..."""
PING_TIMEOUT_S = 10
"""... and closed without an answer in this time: what it had open is freed."""
LEAST_PING_S = 1
"""Clients that ask more often are sent away. gRPC's default of 300 s is too long for common proxies."""

HANDSHAKE_S = 10
"""Seconds from a connection to its first settings, TLS included; gRPC's default is 120 s."""
IDLE_S = 120
"""A connection without calls is closed after this time; clients open another when they call again."""
MAX_STREAMS = 1024
"""Calls of one connection at once; its client holds more back. Those that it resets count until they are
cleared away, so that nobody fills the server by opening and resetting; more are reset themselves."""
MAX_WAITING = 32 * MAX_STREAMS
"""Calls of a method that wait for its handler. Above gRPC's default of 1000, which a flood reaches at once, it
cancels calls of others."""


def server_options(connections: int, *, shared: bool = False) -> tuple[tuple[str, int], ...]:
    """Return the options of a server that takes so many connections at once; processes may share its port."""
    return (
        ("grpc.so_reuseport", int(shared)),  # a second server on the same port must fail, not share it
        ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", PING_S * 1000),
        ("grpc.keepalive_timeout_ms", PING_TIMEOUT_S * 1000),
        ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_S * 1000),  # otherwise a minute, whatever the other timeout
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", LEAST_PING_S * 1000),
        ("grpc.max_allowed_incoming_connections", connections),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_S * 1000),
        ("grpc.http2.settings_timeout", HANDSHAKE_S * 1000),
        ("grpc.max_connection_idle_ms", IDLE_S * 1000),
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        ("grpc.server.max_pending_requests", MAX_WAITING),
        ("grpc.server.max_pending_requests_hard_limit", 2 * MAX_WAITING),
    )


CLIENT_OPTIONS = (
    ("grpc.enable_http_proxy", 0),  # an http_proxy of the environment is for the web, not for these services
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", PING_S * 1000),
    ("grpc.keepalive_timeout_ms", PING_TIMEOUT_S * 1000),
    ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_S * 1000),  # otherwise a minute, whatever the other timeout
    ("grpc.http2.max_pings_without_data", 0),  # a long queue is silent
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
)


BACKLOG: Final = 4096
"""Connections that wait to be accepted, as many as an endpoint may hold; Linux has its own bound, somaxconn."""


def listen(address: str) -> socket.socket:
    """Return a socket that listens on ``HOST:PORT``; port 0 draws a free one. Raise SettingsInvalid where
    something else listens there, or it is no address of this machine.
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
    """Raise SettingsInvalid where a service cannot listen; one that binds a Unix socket takes it over."""
    if not address.startswith("unix:"):
        listen(address).close()


def cannot_listen(address: str, why: str) -> SettingsInvalid:
    """Return the fault of a service that cannot listen."""
    return SettingsInvalid(
        f"cannot listen on {address!r} ({why}): expected a free HOST:PORT of this machine. Stop what listens "
        "there, or choose another."
    )


def reserve(address: str) -> tuple[socket.socket | None, str]:
    """Keep an address from everybody but processes of this user that share it; return it with its port.

    A Unix socket is nobody's before it is listened on, and None is returned for it. Raise SettingsInvalid where
    something else listens there, or it is no address of this machine.
    """
    if address.startswith("unix:"):
        return None, address
    with listen(address) as first:
        family, place = first.family, first.getsockname()
        both = family == socket.AF_INET6 and not first.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    kept = socket.socket(family, socket.SOCK_STREAM)
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if family == socket.AF_INET6:
        kept.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(not both))
    try:
        kept.bind(place)
    except OSError as error:
        kept.close()
        raise cannot_listen(address, error.strerror or str(error)) from error
    return kept, f"{address.rpartition(':')[0]}:{place[1]}"
