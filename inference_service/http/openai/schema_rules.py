"""Rules between the fields of bodies, as JSON Schema tells them to readers of `openapi`; validators judge them.

Null is "not set" everywhere.
"""

from __future__ import annotations

from typing import Any, Final

NOT_NULL: Final[dict[str, Any]] = {"not": {"type": "null"}}
OF_MESSAGES: Final = ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")
"""Fields of rendering messages."""


def _only(name: str, value: dict[str, Any]) -> dict[str, Any]:
    return {"required": [name], "properties": {name: value}}


ONE_STRUCTURE: Final[dict[str, Any]] = {
    "oneOf": [_only(name, NOT_NULL) for name in ("json", "regex", "choice", "grammar")]
    + [_only("json_object", {"const": True})]
}
WITHOUT_CALLS: Final[dict[str, Any]] = {"tool_calls": {"maxItems": 0}}
"""Schema of no calls, or null."""
BY_ROLE: Final[dict[str, Any]] = {
    "oneOf": [
        {"properties": {"role": {"const": "assistant"}}},
        {
            "required": ["tool_call_id"],
            "properties": {"role": {"const": "tool"}, "tool_call_id": {"type": "string", "minLength": 1}}
            | WITHOUT_CALLS,
        },
        {"properties": {"role": {"enum": ["developer", "system", "user"]}} | WITHOUT_CALLS},
    ]
}
SAYS_SOMETHING: Final[dict[str, Any]] = {
    "anyOf": [
        {"required": ["content"], "properties": {"content": NOT_NULL}},
        {"required": ["refusal"], "properties": {"refusal": NOT_NULL}},
        {"required": ["tool_calls"], "properties": {"tool_calls": {"type": "array", "minItems": 1}}},
    ]
}
SCHEMA_WHERE_SAID: Final[dict[str, Any]] = {
    "oneOf": [
        {
            "required": ["json_schema"],
            "properties": {"type": {"const": "json_schema"}, "json_schema": NOT_NULL},
        },
        {"properties": {"type": {"enum": ["text", "json_object"]}, "json_schema": {"type": "null"}}},
    ]
}
GOES_ON: Final[dict[str, Any]] = {
    "if": {"required": ["continue_final_message"], "properties": {"continue_final_message": {"const": True}}},
    "then": {"required": ["add_generation_prompt"], "properties": {"add_generation_prompt": {"const": False}}},
}
ONE_OF_TWO: Final[dict[str, Any]] = {
    "oneOf": [
        {
            "required": ["prompt"],
            "properties": {"prompt": NOT_NULL}
            | {name: {"type": "null"} for name in ("messages", *OF_MESSAGES)},
        },
        {"required": ["messages"], "properties": {"messages": NOT_NULL, "prompt": {"type": "null"}}},
    ]
}
