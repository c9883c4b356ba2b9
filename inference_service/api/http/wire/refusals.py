"""The answer to a request that fails, in the form of the API that its path belongs to."""

from collections.abc import Mapping
from typing import Any, Final, Literal, NotRequired

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope
from typing_extensions import TypedDict

from inference_service.api.http.wire import errors
from inference_service.api.http.wire.errors import Error, message_of, status_of
from inference_service.api.http.wire.reply import Reply, event, named_event
from loramux_shared.faults import Fault, QueueFull
from loramux_shared.routes import MESSAGES

REQUEST_ID: Final = "request_id"
"""Key of a scope's state: the request's id in answers and logs."""
FAILED: Final = "internal error; the server's log has the details. Please report it."
PATH: Final = MESSAGES.path
OVERLOADED: Final = 529
"""Anthropic's own status of a server that has too much to do."""
MESSAGE_TYPES: Final = {
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
MESSAGE_CODES: Final = {"thread": "thread_unsupported_request"}
"""Codes of fields that are refused, where a client continues without the field when it reads the code."""


class FailureDetails(TypedDict):
    """The field names by which clients know what to leave out."""

    error_code: str


class MessageFailure(TypedDict):
    """Why a request failed."""

    type: str
    message: str
    details: NotRequired[FailureDetails]


class MessageError(TypedDict):
    """A failure."""

    type: Literal["error"]
    error: MessageFailure
    request_id: str | None


def is_messages(path: str) -> bool:
    """True of the paths that speak Anthropic's API."""
    return path == PATH or path.startswith(f"{PATH}/")


def message_status(fault: Fault) -> int:
    """Return the HTTP status of a fault: 503 for what another replica can do, as proxies know it, and 529."""
    return OVERLOADED if isinstance(fault, QueueFull) else status_of(fault)


def message_fault(fault: Fault, request_id: str) -> MessageError:
    """Return the body of a fault as Anthropic's clients expect it."""
    body = message_refusal(message_of(fault), message_status(fault), request_id)
    codes = [MESSAGE_CODES[each.where] for each in fault.findings if each.where in MESSAGE_CODES]
    if codes:
        body["error"]["details"] = {"error_code": codes[0]}
    return body


def message_refusal(message: str, status: int, request_id: str) -> MessageError:
    """Return the body of a refusal as they do: ``{"type": "error", "error": {type, message}, request_id}``."""
    kind = MESSAGE_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id or None}


def request_id_of(scope: Mapping[str, Any]) -> str:
    """Return the id of a request; empty if it has none."""
    return str(scope.get("state", {}).get(REQUEST_ID, ""))


def fault_body(scope: Mapping[str, Any], fault: Fault) -> Error | MessageError:
    """Return the body of a fault for the client."""
    if is_messages(scope["path"]):
        return message_fault(fault, request_id_of(scope))
    return errors.error_body(fault)


def fault_event(scope: Mapping[str, Any], fault: Fault) -> bytes:
    """Return the last event of a stream that fails."""
    return (named_event if is_messages(scope["path"]) else event)(fault_body(scope, fault))


def fault_response(scope: Mapping[str, Any], fault: Fault) -> Response:
    """Return the answer to a request that failed."""
    status = (message_status if is_messages(scope["path"]) else status_of)(fault)
    return Reply(fault_body(scope, fault), status, errors.headers_of(fault, status))


def refused_body(path: str, message: str, status: int, code: str, request_id: str = "") -> Error | MessageError:
    """Return the body of a request that HTTP itself refuses."""
    if is_messages(path):
        return message_refusal(message, status, request_id)
    return errors.body_of(message, status, code)


def http_error_response(scope: Scope, error: HTTPException) -> Response:
    """Return the answer to what Starlette refuses: no such route or method, or a body that it does not take."""
    http = Request(scope)
    message, code = errors.http_error(http, error)
    body = refused_body(http.url.path, message, error.status_code, code, request_id_of(scope))
    return Reply(body, error.status_code, error.headers)
