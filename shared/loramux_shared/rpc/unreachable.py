"""Why a server cannot be reached, and what to do: gRPC tells it in words of OpenSSL, and in no other way."""

from __future__ import annotations

from typing import Final

_CLOSED: Final = (
    "it closed the connection. Where it asks clients for a certificate, set LORAMUX_CLIENT_CERT and "
    "LORAMUX_CLIENT_KEY to one that its authority signed."
)
_TLS: Final = (
    (
        "certificate has expired",
        "its certificate has expired. Renew it there, or set this machine's clock.",
    ),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "its certificate is not signed by an authority that is trusted here. Name the file of the right one: "
        "LORAMUX_TLS_CA=ca.pem.",
    ),
    (
        "Hostname Verification Check failed",
        "its certificate is for other names. Use a name that is in it, or the right server.",
    ),
    (
        "WRONG_VERSION_NUMBER",
        "it does not speak TLS. Leave grpcs:// out, if the way to it is safe.",
    ),
    (
        "Socket closed",
        _CLOSED,
    ),
    (
        "Connection reset",
        _CLOSED,
    ),
)


def unreachable(target: str, message: str) -> str:
    """Return the cause, in one line with its cure, of gRPC's message about an address."""
    if target.startswith("grpcs://"):
        for words, cure in _TLS:
            if words in message:
                return cure
    elif "Failed parsing HTTP/2" in message:
        return (
            "it does not speak gRPC. If that is the HTTP door: gRPC has a port of its own, 50052 of an "
            "inference service and 50051 of a builder unless said otherwise."
        )
    elif "Socket closed" in message and "Stream removed" not in message:  # then it has spoken
        return f"{message}. Does it speak TLS? Then its address is grpcs://{target}"
    return f"{message}. Is it running?"
