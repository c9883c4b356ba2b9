"""Status messages to the process that started a service: systemd, or ``loramux up``, with the same protocol.

Source: sd_notify(3). A message is a datagram of NAME=VALUE lines to the Unix socket that NOTIFY_SOCKET names.
"""

from __future__ import annotations

import os
import socket
from typing import Final

import structlog

SOCKET: Final = "NOTIFY_SOCKET"
READY: Final = "READY=1"
STOPPING: Final = "STOPPING=1"
STATUS: Final = "STATUS="
"""The prefix of a line for people."""

log = structlog.get_logger()


def report(doing: str) -> None:
    """Say what a start does now, in a few words."""
    notify(f"{STATUS}{doing}")


def notify(message: str) -> None:
    """Send a message if the service manager asked for it; a failure is logged."""
    path = os.environ.get(SOCKET, "")
    if not path:
        return
    # A name that begins with @ stands for one in Linux' abstract namespace, which begins with a zero byte.
    address = f"\0{path[1:]}" if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(message.encode(), address)
    except OSError as error:
        log.warning("notification could not be sent", message=message, variable=SOCKET, why=error.strerror)
