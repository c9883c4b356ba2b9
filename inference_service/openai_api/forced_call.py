"""A call that the request demands: the answer is constrained to ``{"name": ..., "arguments": {...}}``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Final

from inference_service.core.constraint import Constraint
from inference_service.openai_api.chat_schema import Tool
from inference_service.openai_api.pieces import CallArguments, CallBegun, Piece, call_id

HEAD: Final = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\S)')
TOKEN: Final = re.compile(r'"(?:[^"\\]|\\.)*"|["{}\[\]]', re.DOTALL)
"""What decides where a JSON value ends: whole strings and brackets; a lone quote opens what goes on."""


def call_constraint(tools: Sequence[Tool]) -> Constraint:
    """Return the constraint to one call of one of these tools."""
    parameters = {tool.function.name: tool.function.parameters or {"type": "object"} for tool in tools}
    calls = [_call_schema(name) for name in parameters]
    definitions = {name: _moved(schema, f"#/$defs/{name}") for name, schema in parameters.items()}
    schema = {"$defs": definitions, "anyOf": calls}
    return Constraint("json_schema", json.dumps(schema, ensure_ascii=False), where="tools")


def _call_schema(name: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/{name}"}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, root: str) -> Any:
    """Return a schema whose references find their place below another root."""
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, root) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = root + reference[1:]
    return moved


class ForcedCall:
    """Reads the call as it comes: the name when it is whole, then the arguments piece by piece."""

    def __init__(self) -> None:
        self._text = ""
        self._sent: int | None = None
        """Where the arguments that were not sent yet begin; None before the name is whole."""
        self._read = 0
        self._depth = 0
        self._ended = False

    def push(self, text: str) -> list[Piece]:
        """Return what became certain with more text."""
        self._text += text
        pieces: list[Piece] = []
        if self._sent is None:
            head = HEAD.match(self._text)
            if head is None:
                return []
            self._sent = self._read = head.end()
            pieces.append(CallBegun(0, call_id(), json.loads(head[1])))
        if not self._ended and (arguments := self._more()):
            pieces.append(CallArguments(0, arguments))
        return pieces

    def finish(self) -> list[Piece]:
        """Return nothing: a call that was cut off stays as it is."""
        return []

    def _more(self) -> str:
        """Return arguments that were not sent yet, up to their closing brace."""
        begin, end = self._sent or 0, len(self._text)
        for token in TOKEN.finditer(self._text, self._read):
            if token[0] == '"':
                break
            self._read = token.end()
            self._depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(token[0], 0)
            if not self._depth:
                self._ended, end = True, token.end()
                break
        self._sent = end
        return self._text[begin:end]
