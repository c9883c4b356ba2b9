"""What a request hears that fails, in the words of the API that its path belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from inference_service.http.wire import anthropic_errors as anthropic
from inference_service.http.wire import errors
from inference_service.http.wire.reply import Json, event, json_response, named_event
from loramux_shared.faults import Fault, InternalFault

REQUEST_ID: Final = "request_id"
"""Of a scope's state: what the request is called in answers and logs."""
FAILED: Final = "loramux failed inside; the server's log has the details. Please report it."


def request_id_of(scope: Mapping[str, Any]) -> str:
    """Return what a request is called; empty where nobody has named it."""
    return str(scope.get("state", {}).get(REQUEST_ID, ""))


def fault_body(scope: Mapping[str, Any], fault: Fault) -> Json:
    """Return the body that tells a fault to who asked."""
    if anthropic.is_here(scope["path"]):
        return anthropic.fault_body(fault, request_id_of(scope))
    return errors.error_body(fault)


def fault_event(scope: Mapping[str, Any], fault: Fault) -> bytes:
    """Return the last event of a stream that fails."""
    return (named_event if anthropic.is_here(scope["path"]) else event)(fault_body(scope, fault))


def fault_response(scope: Mapping[str, Any], fault: Fault) -> Response:
    """Return the answer to a request that failed."""
    status = (anthropic.fault_status if anthropic.is_here(scope["path"]) else errors.status_of)(fault)
    return json_response(fault_body(scope, fault), status, errors.headers_of(fault, status))


def refused_body(path: str, message: str, status: int, code: str, request_id: str = "") -> Json:
    """Return the body that tells why HTTP itself refuses a request."""
    if anthropic.is_here(path):
        return anthropic.refused_body(message, status, request_id)
    return errors.refused_body(message, status, code)


async def on_failure(http: Request, _: Exception) -> Response:
    """Starlette's handler of everything else; `front` logs it."""
    return fault_response(http.scope, InternalFault(FAILED))


async def on_fault(http: Request, fault: Exception) -> Response:
    """Starlette's handler of faults."""
    assert isinstance(fault, Fault)  # noqa: S101 - registered for Fault alone
    return fault_response(http.scope, fault)


async def on_http_error(http: Request, error: Exception) -> Response:
    """Starlette's handler of its own refusals: no such route or method, or a body that it does not take."""
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for HTTPException alone
    message, code = errors.told_http(http, error)
    body = refused_body(http.url.path, message, error.status_code, code, request_id_of(http.scope))
    return json_response(body, error.status_code, error.headers)
