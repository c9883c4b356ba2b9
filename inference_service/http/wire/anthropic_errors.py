"""Faults as Anthropic's clients expect them.

A status, and ``{"type": "error", "error": {type, message}, request_id}``.
"""

from __future__ import annotations

from typing import Final

from inference_service.http.wire.errors import message_of, status_of
from inference_service.http.wire.reply import Json
from loramux_shared.faults import Fault, QueueFull
from loramux_shared.routes import MESSAGES

PATH: Final = MESSAGES.path
OVERLOADED: Final = 529
"""Anthropic's own status of a server that has too much to do."""
TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    OVERLOADED: "overloaded_error",
}
"""Other statuses below 500 are ``invalid_request_error``, those above ``api_error``."""
CODES: Final = {"thread": "thread_unsupported_request"}
"""Codes of fields that are refused, where a client goes on without the field when it reads the code."""


def is_here(path: str) -> bool:
    """True of the paths that speak this API."""
    return path == PATH or path.startswith(f"{PATH}/")


def fault_status(fault: Fault) -> int:
    """Return the HTTP status of a fault: 503 for what another replica can do, as proxies know it, and 529."""
    return OVERLOADED if isinstance(fault, QueueFull) else status_of(fault)


def fault_body(fault: Fault, request_id: str) -> Json:
    """Return the body that tells a fault."""
    body = refused_body(message_of(fault), fault_status(fault), request_id)
    codes = [CODES[each.where] for each in fault.findings if each.where in CODES]
    if codes:
        body["error"]["details"] = {"error_code": codes[0]}
    return body


def refused_body(message: str, status: int, request_id: str) -> Json:
    """Return the body that tells a refusal."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id or None}
