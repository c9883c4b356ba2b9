"""What Envoy answers by itself at OpenAI's door: errors in the shape that they all have there."""

from __future__ import annotations

from typing import Any, Final

from loramux_shared.rpc.options import MAX_REQUEST_BYTES

Json = dict[str, Any]


def _error(status: int, message: str, kind: str, code: str, **more: Any) -> Json:
    return {
        "filter": {
            "status_code_filter": {
                "comparison": {"op": "EQ", "value": {"default_value": status, "runtime_key": "unused"}}
            }
        },
        "body_format_override": {
            "json_format": {"error": {"message": message, "type": kind, "param": None, "code": code}}
        },
        **more,
    }


AGAIN: Final = {"header": {"key": "retry-after", "value": "1"}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
LOCAL_REPLIES: Final = {
    "mappers": [
        _error(
            503,
            "no replica answered (%RESPONSE_CODE_DETAILS%). Retry; then see which are SERVING: loramux health.",
            "server_error",
            "server_unavailable",
            headers_to_add=[AGAIN],
        ),
        _error(
            504,
            "no replica had a token in time (%RESPONSE_CODE_DETAILS%). Retry; then see why they are slow.",
            "server_error",
            "deadline_exceeded",
            headers_to_add=[AGAIN],
        ),
        _error(
            413,
            f"the body is larger than {MAX_REQUEST_BYTES} bytes. Send less.",
            "invalid_request_error",
            "request_too_large",
        ),
        _error(
            408,
            "the request did not arrive in time. Send it without pauses.",
            "invalid_request_error",
            "client_stalled",
        ),
    ]
}
"""What Envoy answers by itself, in the shape of all errors of that door."""
