"""Envoy's own answers to HTTP clients: errors in the shapes of the APIs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from loramux_shared.routes import MESSAGES
from loramux_shared.rpc.options import MAX_REQUEST_BYTES

Json = dict[str, Any]
AGAIN: Final = {"header": {"key": "retry-after", "value": "1"}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}


@dataclass(frozen=True)
class _Reply:
    """One error of Envoy's own."""

    status: int
    message: str
    code: str
    """OpenAI's word for it; the type follows from the status."""
    anthropic: str
    """Anthropic's type of it."""
    again: bool = False

    def openai(self) -> Json:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": None, "code": self.code}
        return self._mapper(self._has_status(), {"error": error})

    def messages(self) -> Json:
        here = {"header_filter": {"header": {"name": ":path", "string_match": {"prefix": MESSAGES.path}}}}
        error = {"type": self.anthropic, "message": self.message}
        body = {"type": "error", "error": error, "request_id": "%REQ(X-REQUEST-ID)%"}
        return self._mapper({"and_filter": {"filters": [self._has_status(), here]}}, body)

    def _has_status(self) -> Json:
        value = {"default_value": self.status, "runtime_key": "unused"}
        return {"status_code_filter": {"comparison": {"op": "EQ", "value": value}}}

    def _mapper(self, when: Json, body: Json) -> Json:
        more = {"headers_to_add": [AGAIN]} if self.again else {}
        return {"filter": when, "body_format_override": {"json_format": body}, **more}


REPLIES: Final = (
    _Reply(
        503,
        "no replica answered (%RESPONSE_CODE_DETAILS%). Retry; then see which are SERVING: loramux health.",
        "server_unavailable",
        "overloaded_error",
        again=True,
    ),
    _Reply(
        504,
        "no replica had a token in time (%RESPONSE_CODE_DETAILS%). Retry; then see why they are slow.",
        "deadline_exceeded",
        "timeout_error",
        again=True,
    ),
    _Reply(
        413,
        f"the body is larger than {MAX_REQUEST_BYTES} bytes. Send less.",
        "request_too_large",
        "request_too_large",
    ),
    _Reply(
        408,
        "the request did not arrive in time. Send it without pauses.",
        "client_stalled",
        "invalid_request_error",
    ),
)


def _mappers() -> Iterator[Json]:
    """Yield them in the order in which Envoy asks them: the first whose filter fits tells the error."""
    yield from (reply.messages() for reply in REPLIES)
    yield from (reply.openai() for reply in REPLIES)


LOCAL_REPLIES: Final = {"mappers": list(_mappers())}
"""Envoy's own answers, in the shapes of the APIs' errors."""
