"""What the messages and tools of a chat may hold, whichever door they came through."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

ROLES: Final = ("system", "user", "assistant", "tool")
"""As templates know them; ``developer``, which clients also say, is system."""
MAX_TOOLS: Final = 128
_NAME: Final = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
EXPECTED_NAME: Final = "1 to 64 letters, digits, _, . or -"

Rule = tuple[bool, str, str, object]
"""Whether it is broken, the field, what is expected, what was found."""


def role_of(role: str) -> str:
    """Return a role as templates know it."""
    return "system" if role == "developer" else role


def rules_of_turns(messages: Sequence[Mapping[str, Any]]) -> Iterator[Rule]:
    """Yield the rules of messages, in the shape of `request.Message`."""
    for index, message in enumerate(messages):
        yield from _of_message(f"messages[{index}]", message)


def rules_of_tools(tools: Sequence[Mapping[str, Any]]) -> Iterator[Rule]:
    """Yield the rules of tools, in the shape of the OpenAI API."""
    yield len(tools) > MAX_TOOLS, "tools", f"at most {MAX_TOOLS}", len(tools)
    for index, tool in enumerate(tools if len(tools) <= MAX_TOOLS else ()):
        name = tool["function"]["name"]
        yield not _NAME.fullmatch(name), f"tools[{index}].function.name", EXPECTED_NAME, repr(name)


def rules_of_the_end(messages: Sequence[Mapping[str, Any]], *, goes_on: bool, starts: bool) -> Iterator[Rule]:
    """Yield the rules of how rendered messages end: nothing stands behind what the answer goes on with."""
    if not goes_on:
        return
    yield starts, "add_generation_prompt", "false, beside continue_final_message", "true"
    said = messages[-1]["content"] if messages else ""
    where = f"messages[{max(0, len(messages) - 1)}].content"
    yield not said, where, "text, which continue_final_message goes on with", "none"


def _of_message(where: str, message: Mapping[str, Any]) -> Iterator[Rule]:
    role, calls = message["role"], message.get("tool_calls") or ()
    yield role not in ROLES, f"{where}.role", f"one of developer, {', '.join(ROLES)}", repr(role)
    unanswered = role == "tool" and not message.get("tool_call_id")
    yield unanswered, f"{where}.tool_call_id", "the id of a call, in a message with role tool", "none"
    yield bool(calls) and role != "assistant", f"{where}.tool_calls", "calls only with role assistant", role
    for index, call in enumerate(calls):
        name = call["function"]["name"]
        expected = "the name of a function"
        yield not name, f"{where}.tool_calls[{index}].function.name", expected, repr(name)
