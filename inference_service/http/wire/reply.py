"""JSON on its way out, and what all answers have in common."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response

from inference_service.core.sequence import FinishReason
from inference_service.serving.request import Delta, Event, Finished, Started
from loramux_shared.routes import MODEL_HEADER

Json = dict[str, Any]
"""An object, as it is written."""
DONE = b"data: [DONE]\n\n"
"""Ends a stream that did not fail."""
REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


def json_response(
    body: Mapping[str, object], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return an answer that is one JSON object."""
    return Response(to_json(body), status, headers, "application/json")


def event(body: Json) -> bytes:
    """Return a server-sent event."""
    return b"data: " + to_json(body) + b"\n\n"


def named_event(body: Json) -> bytes:
    """Return a server-sent event with a name: the body's ``type``."""
    return b"event: " + str(body["type"]).encode() + b"\n" + event(body)


@dataclass
class Head:
    """What every object of one answer begins with."""

    id: str
    kind: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))
    fingerprint: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Which version answers, for proxies and logs."""

    def begin(self, started: Started) -> None:
        """Note what answers: the model, the deployment's generation, and the adapter's digest or the base."""
        self.model, digest = started.model.name, started.model.digest
        of_adapter = {"x-loramux-digest": digest} if digest else {}
        number = str(started.generation)
        self.headers = {MODEL_HEADER: self.model} | of_adapter | {"x-loramux-generation": number}
        self.fingerprint = f"fp_{started.generation}_{started.model.digest[:12] or 'base'}"

    def body(self, choices: list[Json]) -> Json:
        """Return an object with choices."""
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }


def ended_by(finished: Finished, stops: Collection[str]) -> str | int | None:
    """Return vLLM's ``stop_reason``: the one of stops or of the request's stop tokens that ended it, if any."""
    return finished.stop_text if finished.stop_text in stops else finished.stop_token_id


def usage(finished: Iterable[Finished], reasoning: int = 0) -> Json:
    """Return the tokens of the answers to one or more prompts; a prompt counts once, whatever its answers.

    Those of reasoning are told where there are any.
    """
    ends = list(finished)
    prompt = sum(end.prompt_tokens for end in ends if not end.index)
    completion = sum(end.completion_tokens for end in ends)
    details = {"completion_tokens_details": {"reasoning_tokens": reasoning}} if reasoning else {}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        **details,
        "prompt_tokens_details": {"cached_tokens": sum(end.cached_tokens for end in ends if not end.index)},
    }


@dataclass
class Tally:
    """Tokens of a prompt, and of each of its answers so far."""

    prompt: int = 0
    completion: Counter[int] = field(default_factory=Counter)
    """By the answer's index."""

    def see(self, event: Event) -> None:
        """Count what an event brings."""
        if isinstance(event, Started):
            self.prompt = event.prompt_tokens
        elif isinstance(event, Delta):
            self.completion[event.index] += len(event.tokens)

    def usage(self, index: int) -> Json:
        """Return the tokens of the prompt and of one answer."""
        completion = self.completion[index]
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": completion,
            "total_tokens": self.prompt + completion,
        }
