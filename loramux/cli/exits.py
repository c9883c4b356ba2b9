"""The exit codes of the ``loramux`` command."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import grpc

from loramux_shared.faults import Fault, SettingsInvalid, Status
from loramux_shared.rpc.status import CallFailed


class Exit(IntEnum):
    """The exit status of a command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNAVAILABLE = 3
    DENIED = 4
    BROKEN = 5
    INTERRUPTED = 130
    PIPE_CLOSED = 141


MEANINGS: Final = {
    Exit.OK: "success",
    Exit.FAILED: "refused or failed: a retry will not help",
    Exit.USAGE: "a wrong flag, argument or setting",
    Exit.UNAVAILABLE: "a service does not answer, is busy or restarts: a retry may succeed",
    Exit.DENIED: "missing API key, scope, secret or licence",
    Exit.BROKEN: "of `serve`: the device or the engine failed; start it again",
    Exit.INTERRUPTED: "Ctrl-C",
    Exit.PIPE_CLOSED: "its output was closed, as `head -1` does",
}

_DENIED = (Status.UNAUTHENTICATED, Status.PERMISSION_DENIED)


def exit_of(fault: Fault) -> Exit:
    """Return the exit code of a command that ends with a fault."""
    if isinstance(fault, SettingsInvalid):
        return Exit.USAGE
    late = isinstance(fault, CallFailed) and fault.code is grpc.StatusCode.DEADLINE_EXCEEDED
    if late or fault.retry_after_s is not None:
        return Exit.UNAVAILABLE
    return Exit.DENIED if fault.status in _DENIED else Exit.FAILED
