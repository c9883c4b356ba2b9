"""When the call that is being answered arrived."""

from __future__ import annotations

import socket
import struct
import sys
import time
from contextvars import ContextVar
from typing import Any, Final

ARRIVED_S: Final[ContextVar[float | None]] = ContextVar("arrived_s", default=None)
"""On the clock of ``time.monotonic``; None where no door noted it."""
_LAST_DATA_RECV: Final = 52
"""Where struct tcp_info holds how many ms ago data came. Source: linux/tcp.h."""


def arrived_at(sock: Any) -> float:
    """Return when the last data came to a TCP socket, on the clock of ``time.monotonic``.

    Linux knows it to some ms, however late anybody reads; elsewhere it is now.
    """
    now = time.monotonic()
    if sock is None or sys.platform != "linux":
        return now
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAST_DATA_RECV + 4)
    except OSError:  # it was closed, or is none of TCP
        return now
    [ago_ms] = struct.unpack_from("=I", info, _LAST_DATA_RECV)
    return now - int(ago_ms) / 1e3
