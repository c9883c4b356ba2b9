"""Faults as OpenAI's clients expect them: a status, and ``{"error": {message, type, param, code}}``."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from typing_extensions import TypedDict

from loramux_shared.faults import Fault, Finding, RequestInvalid, Status
from loramux_shared.pages import page
from loramux_shared.routes import ROUTES
from loramux_shared.wording import MAX_FINDINGS, counted, expected_of, nearest

STATUSES: Final = {
    Status.INVALID_ARGUMENT: 400,
    Status.DEADLINE_EXCEEDED: 504,
    Status.NOT_FOUND: 404,
    Status.ALREADY_EXISTS: 409,
    Status.PERMISSION_DENIED: 403,
    Status.UNAUTHENTICATED: 401,
    Status.RESOURCE_EXHAUSTED: 429,
    Status.FAILED_PRECONDITION: 400,
    Status.ABORTED: 409,
    Status.UNIMPLEMENTED: 501,
    Status.INTERNAL: 500,
    Status.UNAVAILABLE: 503,
    Status.DATA_LOSS: 500,
}
TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
"""Other statuses below 500 are ``invalid_request_error``, those above ``server_error``."""
CODES: Final = {
    "PROMPT_TOO_LONG": "context_length_exceeded",
    "RATE_LIMITED": "rate_limit_exceeded",
    "UNAUTHENTICATED": "invalid_api_key",
    "E_UNKNOWN_FIELD": "unknown_parameter",
    "E_MISSING_FIELD": "missing_required_parameter",
    "E_UNSUPPORTED": "unsupported_parameter",
    "E_BAD_FIELD": "invalid_value",
    "E_MESSAGES": "invalid_value",
    "E_NO_TEMPLATE": "invalid_value",
    "E_CONSTRAINT": "invalid_schema",
}
"""Codes that OpenAI has a word of its own for; else the code is the reason in small letters."""
HTTP_CODES: Final = {
    404: "unknown_url",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_media_type",
}
AGAIN: Final = (429, 503, 529)
"""Statuses of what the same client may ask again."""
MAX_SHOWN: Final = 8
"""Findings that a message spells out."""
MAX_NUMBER: Final = 10**30
"""Numbers from here on are not spelled out."""
MAX_PLACE: Final = 256
"""Characters of a place in a body, of which a client's own names can be parts."""


class ErrorDetail(TypedDict):
    """An error: what was expected, what was found and what to do."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(TypedDict):
    """A request that failed."""

    error: ErrorDetail


def status_of(fault: Fault) -> int:
    """Return the HTTP status of a fault."""
    return STATUSES[fault.status]


def error_body(fault: Fault) -> Error:
    """Return the body of a fault."""
    first = fault.findings[0] if fault.findings else None
    reason = first.code if first and first.code in CODES else fault.reason
    param = first.where if first else ""
    if not param and fault.reason == "MODEL_NOT_FOUND":
        param = "model"
    return body_of(message_of(fault), status_of(fault), CODES.get(reason, reason.lower()), param or None)


def headers_of(fault: Fault, status: int) -> dict[str, str]:
    """Return the headers of a fault: when to retry, and with what kind of key."""
    headers = {}
    if status in AGAIN:
        headers["retry-after"] = f"{math.ceil(fault.retry_after_s or 1)}"
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers


def http_error(http: Request, error: HTTPException) -> tuple[str, str]:
    """Return message and code of a request that met no handler, or that HTTP itself refuses."""
    code, message = HTTP_CODES.get(error.status_code, "invalid_request"), error.detail
    if error.status_code in (404, 405):
        path = http.url.path
        served = error.headers["Allow"] if error.headers else _alike(path.rstrip("/"))
        but = f", but {served} {'are' if ',' in served else 'is'}" if served else ""
        message = f"{http.method} {path[:200]} is not served{but}; see {page('docs/reference/openai.md')}."
    return message, code


def _alike(path: str) -> str:
    """Return the path that a client with another base URL means; empty where there is none."""
    paths = [each.path for each in ROUTES] if path else []
    return min((each for each in paths if each.endswith(path) or path.endswith(each)), key=len, default="")


def body_of(message: str, status: int, code: str, param: str | None = None) -> Error:
    """Return the body of a refusal; param is the field that it is about."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def message_of(fault: Fault) -> str:
    """Return the message of a fault with its first findings."""
    details = [str(item.model_copy(update={"code": ""})) for item in fault.findings[:MAX_SHOWN]]
    left_out = len(fault.findings) - len(details)
    message = fault.message if not details or fault.message.endswith(".") else f"{fault.message}."
    return " ".join([message, "; ".join(details)]).strip() + (f" ({left_out} more)" if left_out > 0 else "")


def invalid_body(error: ValidationError, known: Sequence[str]) -> RequestInvalid:
    """Return the fault of a body that pydantic refuses; known are the fields of the body."""
    found = error.errors(include_url=False)
    if found[0]["type"] == "json_invalid":
        return RequestInvalid(f"the body is not JSON: {found[0]['ctx']['error']}.")
    return _invalid("body", found, known)


def invalid_query(error: ValidationError, known: Sequence[str]) -> RequestInvalid:
    """Return the fault of a query that pydantic refuses; known are the names that it may have."""
    return _invalid("query", error.errors(include_url=False), known)


def refused_twice(repeated: Sequence[tuple[str, str]]) -> RequestInvalid:
    """Return the fault of a query in which a name comes twice."""
    names = [name for name, _ in repeated]
    where = next(name for name in names if names.count(name) > 1)[:MAX_PLACE]
    problem = "the query of the request is not valid."
    return RequestInvalid.of_field(problem, where, "one value", f"{names.count(where)}")


def _invalid(part: str, found: Sequence[Mapping[str, Any]], known: Sequence[str]) -> RequestInvalid:
    more = f" It has {len(found)} errors; these are the first." if len(found) > MAX_FINDINGS else ""
    findings = [_finding(item, known) for item in found[:MAX_FINDINGS]]
    return RequestInvalid(f"the {part} of the request is not valid.{more}", findings)


def _finding(item: Mapping[str, Any], known: Sequence[str]) -> Finding:
    where, kind = param_of(item["loc"]), item["type"]
    if kind == "missing":
        return Finding(code="E_MISSING_FIELD", where=where, expected="a value")
    if kind == "extra_forbidden":
        near = nearest(where, known)
        fix = f"Did you mean {near}?" if near else "Leave it out."
        return Finding(code="E_UNKNOWN_FIELD", where=where, found="an unknown parameter", fix=fix)
    if kind == "none_required":
        return Finding(code="E_UNSUPPORTED", where=where, fix="This is not served here: leave it out.")
    if kind == "unsupported":
        return Finding(code="E_UNSUPPORTED", where=where, found=item["ctx"]["found"], fix=item["msg"])
    return Finding(code="E_BAD_FIELD", where=where, expected=expected_of(item["msg"]), found=_found(item))


def _found(item: Mapping[str, Any]) -> str:
    """Return what a field has; of texts, which may be prompts, only those that should be a name or a number."""
    value, kind = item["input"], item["type"]
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):
        return "a larger number" if abs(value) >= MAX_NUMBER else f"{value}"
    if isinstance(value, str):
        short = re.search("literal_error|_parsing|_than", kind)
        return repr(value[:64]) if short else f"a text of {counted(len(value), 'character')}"
    if isinstance(value, list):
        return f"a list of {counted(len(value), 'item')}"
    return "an object" if kind.endswith("_type") else ""


def is_tag(part: str | int) -> bool:
    """True of what pydantic, or a union of ours, says of a place in a body beside where it is."""
    return isinstance(part, str) and part.startswith("[")


def param_of(loc: Sequence[str | int]) -> str:
    """Return a place in a body as OpenAI writes it: ``messages[0].content``."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc if not is_tag(part)]
    return "".join(parts).removeprefix(".")[:MAX_PLACE]
