"""JSON on its way out, and what all answers have in common."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic_core import to_json
from starlette.responses import Response

from inference_service.serving.request import Started
from loramux_shared.routes import MODEL_HEADER

T_co = TypeVar("T_co", covariant=True)
Json = dict[str, Any]
"""An object, as it is written."""
DONE = b"data: [DONE]\n\n"
"""Ends a stream that did not fail."""


class Reply(Response, Generic[T_co]):
    """An answer that is one JSON object, whose type the OpenAPI document describes."""

    def __init__(self, body: T_co, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(to_json(body), status, headers, "application/json")


def event(body: Mapping[str, object]) -> bytes:
    """Return a server-sent event."""
    return b"data: " + to_json(body) + b"\n\n"


def named_event(body: Mapping[str, object]) -> bytes:
    """Return a server-sent event with a name: the body's ``type``."""
    return b"event: " + str(body["type"]).encode() + b"\n" + event(body)


@dataclass
class Head:
    """The identity of one answer: its id, its time, and what answers."""

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))
    fingerprint: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Headers that name the version, for proxies and logs."""

    def begin(self, started: Started) -> None:
        """Note what answers: the model, the deployment's generation, and the adapter's digest or the base."""
        self.model, digest = started.model.name, started.model.digest
        of_adapter = {"x-loramux-digest": digest} if digest else {}
        number = str(started.generation)
        self.headers = {MODEL_HEADER: self.model} | of_adapter | {"x-loramux-generation": number}
        self.fingerprint = f"fp_{started.generation}_{started.model.digest[:12] or 'base'}"
