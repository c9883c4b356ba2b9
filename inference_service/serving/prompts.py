"""Rules of what a request holds, over every API: sizes of prompts and of JSON, messages and tools of a chat."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any, Final

import numpy as np

from loramux_shared.faults import PromptTooLong, RequestInvalid

COUNTED: Final = 128 * 1024
"""Tokens that are made of a text that may have more than what is served: it is counted, or cut."""


def countable(max_seq_len: int) -> int:
    """Return how many tokens a text may have that is counted, or cut to its end."""
    return max(COUNTED, max_seq_len)


def check_ids(ids: Sized, max_seq_len: int) -> None:
    """Look at how many token ids there are, before they are copied or looked at one by one.

    Raises:
        PromptTooLong: more than fit.
    """
    if len(ids) > max_seq_len:
        raise prompt_too_long(len(ids), max_seq_len)


def prompt_too_long(tokens: int, max_seq_len: int) -> PromptTooLong:
    """Return the fault of a prompt of so many tokens."""
    return PromptTooLong(
        f"the prompt has {tokens} tokens, and at most {max_seq_len - 1} leave room for an answer. "
        "Shorten the prompt."
    )


MAX_VALUES: Final = 1024 * 1024
"""256 prompts of 4096 token ids."""
MAX_NAMES: Final = 32_768
"""Names, objects and lists, together."""


def unfolds_to(data: bytes) -> str:
    """Say what a JSON text has too much of, before it is parsed; empty where nothing."""
    if not _too_much(data):  # counts characters in strings too: nearly always enough
        return ""
    unescaped = data.replace(rb"\\", b"  ").replace(rb"\"", b"  ")
    text = np.frombuffer(unescaped, np.uint8)
    outside = np.cumsum(text == ord('"'), dtype=np.uint8) & 1 == 0  # parity survives the overflow
    return _too_much(text[outside].tobytes())


def _too_much(data: bytes) -> str:
    if data.count(b":") + data.count(b"{") + data.count(b"[") > MAX_NAMES:
        return f"more than {MAX_NAMES} names, objects and lists"
    return f"more than {MAX_VALUES} values" if data.count(b",") > MAX_VALUES else ""


def json_bytes(value: object) -> int | None:
    """Return how many bytes a value has as JSON; None where it is nested too deeply."""
    try:
        return len(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
    except RecursionError:
        return None


def check_texts(texts: Iterable[str]) -> None:
    """Look at all JSON texts inside a request together.

    Raises:
        RequestInvalid: they have too much in them.
    """
    if much := unfolds_to(",".join(texts).encode(errors="replace")):
        raise RequestInvalid(f"the JSON texts of the request have {much}. Send less.")


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
