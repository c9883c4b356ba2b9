"""The rules of a chat's messages and tools, over every API."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Final

from inference_service.serving.sizes import json_bytes

ROLES: Final = ("system", "user", "assistant", "tool")
"""Roles as templates know them; ``developer``, which clients also use, is system."""
MAX_TOOLS: Final = 128
NAME: Final = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
"""Pattern of a function's name."""
EXPECTED_NAME: Final = "1 to 64 letters, digits, _, . or -"

MAX_VARIABLES: Final = 32
MAX_VARIABLE_BYTES: Final = 64 * 1024
_VARIABLE: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
EXPECTED_VARIABLE: Final = "a letter and up to 63 letters, digits and _"
RESERVED: Final = frozenset(
    {
        *("messages", "tools", "add_generation_prompt", "continue_final_message"),
        *("raise_exception", "strftime_now", "namespace", "self"),
    }
)
"""Variables that a template gets in other ways; so are special tokens, whose names end with ``_token``."""

Rule = tuple[bool, str, str, object]
"""Whether it is broken, the field, the expected value, the found value."""


def role_of(role: str) -> str:
    """Return a role as templates know it."""
    return "system" if role == "developer" else role


def thought_of(text: str) -> dict[str, str]:
    """Return what an assistant thought, by the names that templates have for it."""
    return {"reasoning_content": text, "reasoning": text}


def rules_of_turns(messages: Sequence[Mapping[str, Any]]) -> Iterator[Rule]:
    """Yield the rules of messages, in the shape of `request.Message`."""
    for index, message in enumerate(messages):
        yield from _of_message(f"messages[{index}]", message)


def rules_of_tools(tools: Sequence[Mapping[str, Any]]) -> Iterator[Rule]:
    """Yield the rules of tools, in the shape of the OpenAI API."""
    yield len(tools) > MAX_TOOLS, "tools", f"at most {MAX_TOOLS}", len(tools)
    for index, tool in enumerate(tools if len(tools) <= MAX_TOOLS else ()):
        name = tool["function"]["name"]
        yield not NAME.fullmatch(name), f"tools[{index}].function.name", EXPECTED_NAME, repr(name)


def rules_of_the_end(messages: Sequence[Mapping[str, Any]], *, goes_on: bool, starts: bool) -> Iterator[Rule]:
    """Yield the rules of how rendered messages end: nothing stands behind what the answer continues with."""
    if not goes_on:
        return
    yield starts, "add_generation_prompt", "false, together with continue_final_message", "true"
    content = messages[-1]["content"] if messages else ""
    where = f"messages[{max(0, len(messages) - 1)}].content"
    yield not content, where, "text, which continue_final_message continues", "none"


def rules_of_variables(variables: Mapping[str, Any]) -> Iterator[Rule]:
    """Yield the rules of what a template reads beside messages, tools and the like."""
    where = "chat_template_kwargs"
    yield len(variables) > MAX_VARIABLES, where, f"at most {MAX_VARIABLES} names", len(variables)
    for name in islice(variables, MAX_VARIABLES):
        yield not _VARIABLE.fullmatch(name), where, EXPECTED_VARIABLE, repr(name)
        taken = name in RESERVED or name.endswith("_token")
        yield (
            taken,
            f"{where}.{name[:64]}",
            "a name that is not the template's own; use the request's field",
            name,
        )
    size, expected = json_bytes(variables), f"at most {MAX_VARIABLE_BYTES} bytes of JSON"
    yield size is None or size > MAX_VARIABLE_BYTES, where, expected, size or "more"


def _of_message(where: str, message: Mapping[str, Any]) -> Iterator[Rule]:
    role, calls = message["role"], message.get("tool_calls") or ()
    yield role not in ROLES, f"{where}.role", f"one of developer, {', '.join(ROLES)}", repr(role)
    thinks = message.get("reasoning_content") is not None
    yield (
        thinks and role != "assistant",
        f"{where}.reasoning_content",
        "reasoning only with role assistant",
        role,
    )
    unanswered = role == "tool" and not message.get("tool_call_id")
    yield unanswered, f"{where}.tool_call_id", "the id of a call, in a message with role tool", "none"
    yield bool(calls) and role != "assistant", f"{where}.tool_calls", "calls only with role assistant", role
    for index, call in enumerate(calls):
        name = call["function"]["name"]
        expected = "the name of a function"
        yield not name, f"{where}.tool_calls[{index}].function.name", expected, repr(name)
