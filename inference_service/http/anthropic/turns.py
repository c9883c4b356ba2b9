"""The map from Anthropic's messages, whose contents are blocks, to turns of a conversation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

from inference_service.chat.request import Call, Turn
from inference_service.http.anthropic.blocks import (
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from inference_service.http.anthropic.schema import PromptBody
from inference_service.serving.bounds import refused

ROLES: Final = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "tool_use", "thinking", "redacted_thinking"),
    "system": ("text",),
}
"""Types of blocks by role."""
BILLING: Final = "x-anthropic-billing-header:"
"""Begins a line that Claude Code sends as the first block of the system prompt: it is not for the model, and
differs in every request, so that no prompt would be found in the cache."""
FAILED: Final = "Error: "
"""Begins the result of a call that failed, unless that says so itself: templates have no other place for it."""

AnyBlock = TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock | RedactedThinkingBlock


@dataclass(frozen=True)
class _Placed:
    """A block, who says it, and where it stands."""

    role: str
    block: AnyBlock
    place: str


def turns_of(body: PromptBody) -> list[Turn]:
    """Return the turns of a conversation; turns of one role that follow each other are one.

    Raises:
        RequestInvalid: a block is none of its role.
    """
    system = _turn("system", [block for block in body.system or () if not _is_bill(block.text)], "system")
    turns = [system] if system.content else []
    for role, placed in groupby(_placed(body), key=lambda each: each.role):
        parts = list(placed)
        turns += _assistants(parts) if role == "assistant" else _others(role, parts)
    return turns


def _is_bill(text: str) -> bool:
    return text.startswith(BILLING) and "\n" not in text.rstrip()


def _placed(body: PromptBody) -> Iterator[_Placed]:
    for index, message in enumerate(body.messages):
        for at, block in enumerate(message.content):
            place = f"messages[{index}].content[{at}]"
            if block.type not in ROLES[message.role]:
                one_of = f"a block of type {' or '.join(ROLES[message.role])}, in a turn of the {message.role}"
                raise refused(place, one_of, block.type)
            yield _Placed(message.role, block, place)
        if not message.content:
            yield _Placed(message.role, TextBlock(type="text", text=""), f"messages[{index}].content")


def _others(role: str, placed: list[_Placed]) -> Iterator[Turn]:
    """Yield what users, or the system, say; each result of a call is a message of its own."""
    for is_result, run in groupby(placed, key=lambda each: isinstance(each.block, ToolResultBlock)):
        if is_result:
            yield from (_result(each) for each in run)
        else:
            parts = list(run)
            yield _turn(role, [each.block for each in parts], parts[0].place)


def _turn(role: str, blocks: list[Any], place: str) -> Turn:
    return Turn(role, _joined(blocks), place=place)


def _joined(blocks: list[Any]) -> str:
    """Return the text of blocks as those of a chat are joined."""
    return "\n".join(block.text for block in blocks if isinstance(block, TextBlock))


def _result(placed: _Placed) -> Turn:
    block = placed.block
    assert isinstance(block, ToolResultBlock)  # noqa: S101 - grouped so
    text = _joined(list(block.content or ()))
    if block.is_error and not text.lower().startswith("error"):
        text = FAILED + text
    return Turn("tool", text, call_id=block.tool_use_id, place=placed.place)


def _assistants(placed: list[_Placed]) -> Iterator[Turn]:
    blocks = [each.block for each in placed]
    calls = tuple(_call(block) for block in blocks if isinstance(block, ToolUseBlock))
    thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlock) and block.thinking]
    thought = "\n".join(thoughts) if thoughts else None
    yield Turn("assistant", _joined(blocks), thought=thought, calls=calls, place=placed[0].place)


def _call(block: ToolUseBlock) -> Call:
    return Call(block.id, block.name, json.dumps(block.input, ensure_ascii=False))
