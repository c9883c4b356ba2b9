"""Calls as JSON behind one mark: of Granite 3, Phi-4 mini, Mistral 7B, Nemo and Small 3.1.

::

    <|tool_call|>[{"name": "weather", "arguments": {"city": "Oslo"}}]             Granite 3
    <|tool_call|>[{"name": "weather", "arguments": {"city": "Oslo"}}]<|/tool_call|>    Phi-4 mini
    functools[{"name": "weather", "arguments": {"city": "Oslo"}}]                 Phi-4 mini, too
    [TOOL_CALLS][{"name": "weather", "arguments": {"city": "Oslo"}}]              Mistral

Newer models of Mistral name each call behind a mark of its own, some with an id::

    [TOOL_CALLS]weather[ARGS]{"city": "Oslo"}[TOOL_CALLS]news[CALL_ID]a1b2c3d4e[ARGS]{}

Source: chat templates of granite-3.3-2b-instruct, Phi-4-mini-instruct, Mistral-Nemo-Instruct-2407,
Mistral-Small-3.2-24B-Instruct-2506 and Ministral-3-8B-Instruct-2512.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from inference_service.chat.formats.calls import Calls
from inference_service.chat.formats.frame import Block
from inference_service.chat.formats.json_calls import json_arguments, json_calls
from inference_service.chat.formats.source import Reader, Source

GRANITE: Final = "<|tool_call|>"
PHI_END: Final = "<|/tool_call|>"
PHI_WORD: Final = "functools"
MISTRAL: Final = "[TOOL_CALLS]"
ID: Final = "[CALL_ID]"
ARGS: Final = "[ARGS]"
_NAME: Final = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
_ID: Final = re.compile(r"[A-Za-z0-9_\-]{0,64}")


def list_of_calls(calls: Calls, *ends: str) -> Block:
    """Return the reader of calls as JSON, behind which one of some marks may stand."""

    def read(source: Source) -> Reader[bool]:
        yield from source.spaces()
        if not (yield from json_calls(source, calls)):
            return False
        yield from source.spaces()
        for end in ends:
            if (yield from source.literal(end)):
                break
        return True

    return read


def granite_blocks(calls: Calls) -> Mapping[str, Block]:
    """Return the readers of Granite's calls; Granite 3.1 spells the mark as a tag, Granite 4 closes it."""
    return {GRANITE: list_of_calls(calls), "<tool_call>": list_of_calls(calls, "</tool_call>")}


def phi_blocks(calls: Calls) -> Mapping[str, Block]:
    """Return the readers of Phi's calls."""
    return {GRANITE: list_of_calls(calls, PHI_END), PHI_WORD: list_of_calls(calls)}


def mistral_blocks(calls: Calls) -> Mapping[str, Block]:
    """Return the reader of Mistral's calls, in both forms."""
    listed = list_of_calls(calls)

    def read(source: Source) -> Reader[bool]:
        yield from source.spaces()
        if source.text.startswith(("[", "{"), source.at):
            return (yield from listed(source))
        name = yield from source.match(_NAME)
        if name is None or name[0] not in calls.offered:
            return False
        if (yield from source.literal(ID)):
            yield from source.match(_ID)
        yield from source.literal(ARGS)
        yield from source.spaces()
        if not source.text.startswith("{", source.at):
            return False
        yield calls.begin(name[0])
        yield from json_arguments(source, calls)
        return True

    return {MISTRAL: read}
