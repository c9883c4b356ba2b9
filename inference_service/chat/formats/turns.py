"""Turns as templates of some families want them, which refuse those of others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from inference_service.chat.formats.calls import SHORT
from inference_service.serving.request import Message


def with_short_ids(messages: Sequence[Message]) -> list[Message]:
    """Return turns whose ids of calls have nine letters and digits; the same id becomes the same."""
    return [_with_short_ids(message) for message in messages]


def _with_short_ids(message: Message) -> Message:
    own = dict(message)
    if "tool_calls" in own:
        own["tool_calls"] = [{**call, "id": _short(call.get("id", ""))} for call in own["tool_calls"]]
    if "tool_call_id" in own:
        own["tool_call_id"] = _short(own["tool_call_id"])
    return own


def _short(own: str) -> str:
    if len(own) == SHORT and own.isascii() and own.isalnum():
        return own
    return hashlib.sha256(own.encode(errors="replace")).hexdigest()[:SHORT]


def call_by_call(messages: Sequence[Message]) -> list[Message]:
    """Return turns of one call each, what came of it behind it: gpt-oss's template shows the first alone.

    It calls reasoning `thinking`, and takes it beside a call without content only.
    """
    return list(_call_by_call(messages))


def _call_by_call(messages: Sequence[Message]) -> Iterator[Message]:
    at = 0
    while at < len(messages):
        message, at = messages[at], at + 1
        calls = message.get("tool_calls") or ()
        if not calls:
            yield message
            continue
        end = at
        while end < len(messages) and messages[end]["role"] == "tool":
            end += 1
        answers, at = list(messages[at:end]), end
        for nth, call in enumerate(calls):
            yield _of_call(message, call, first=not nth)
            own = [each for each in answers if each.get("tool_call_id") == call.get("id")]
            yield from own
            answers = [each for each in answers if each not in own]
        yield from answers


def _of_call(message: Message, call: Mapping[str, Any], *, first: bool) -> Message:
    own = {**message, "tool_calls": [call]}
    if not first:
        own |= {"content": ""}
    elif message.get("reasoning") and not message.get("content"):
        own |= {"thinking": message["reasoning"]}
    return own
