"""Internals of uvicorn that the HTTP server uses: pyproject.toml bounds its release for them."""

from __future__ import annotations

import inspect

from uvicorn.protocols.http import httptools_impl
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

OVERRIDDEN = {
    "connection_lost",
    "connection_made",
    "on_body",
    "on_header",
    "on_headers_complete",
    "on_message_begin",
    "on_message_complete",
    "on_response_complete",
    "pause_writing",
    "_start_asgi_task",
}
CALLED = {"_unset_keepalive_if_required"}
SET_BY_THE_PROTOCOL = {"cycle", "flow", "headers", "loop", "parser", "pipeline", "scope", "transport"}
SET_BY_A_CYCLE = {"disconnected", "keep_alive", "message_event", "response_complete", "response_started"}


def test_what_is_overridden_and_called_is_there() -> None:
    """A method that a release renames would be called by nobody: answers would end without a word."""
    assert not {name for name in OVERRIDDEN | CALLED if not callable(getattr(HttpToolsProtocol, name, None))}
    assert httptools_impl.STATUS_LINE[200].startswith(b"HTTP/1.1 200")


def test_what_is_read_is_set() -> None:
    """The attributes that the connection reads are those that uvicorn sets."""
    protocol = set(HttpToolsProtocol.__init__.__code__.co_names)
    assert protocol >= SET_BY_THE_PROTOCOL
    assert set(RequestResponseCycle.__init__.__code__.co_names) >= SET_BY_A_CYCLE
    assert "write_paused" in FlowControl.__init__.__code__.co_names
    assert list(inspect.signature(HttpToolsProtocol._start_asgi_task).parameters) == ["self", "cycle", "app"]
