"""When the call that is being answered arrived, and what the system holds of a connection."""

import fcntl
import socket
import struct
import sys
import termios
import time
from contextvars import ContextVar
from typing import Any, Final

ARRIVED_S: Final[ContextVar[float | None]] = ContextVar("arrived_s", default=None)
"""The arrival time on the clock of ``time.monotonic``; None where no server noted it."""
_LAST_DATA_RECV: Final = 52
"""Offset in struct tcp_info of the milliseconds since data last came. Source: linux/tcp.h."""


def arrived_at(sock: Any) -> float:
    """Return when the last data came to a TCP socket, on the clock of ``time.monotonic``.

    Linux knows it to some ms, however late the read is; elsewhere it is now.
    """
    now = time.monotonic()
    if sock is None or sys.platform != "linux":
        return now
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAST_DATA_RECV + 4)
    except OSError:  # a closed socket, or no TCP socket
        return now
    [ago_ms] = struct.unpack_from("=I", info, _LAST_DATA_RECV)
    return now - int(ago_ms) / 1e3


def unread_bytes(sock: Any) -> int:
    """Return the number of unread bytes of a socket; 0 where the system does not say."""
    return _held_bytes(sock, termios.FIONREAD)


def unsent_bytes(sock: Any) -> int:
    """Return how many bytes of a socket its peer has not taken yet; 0 where the system does not say."""
    return _held_bytes(sock, termios.TIOCOUTQ)


def _held_bytes(sock: Any, which: int) -> int:
    try:
        [held] = struct.unpack("=i", fcntl.ioctl(sock.fileno(), which, bytes(4)))
    except (AttributeError, OSError, ValueError):  # no socket, or a closed one
        return 0
    return int(held)
