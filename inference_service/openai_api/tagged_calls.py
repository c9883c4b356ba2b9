"""Calls that a model makes of its own accord, in the form of the Hermes and Qwen templates.

::

    Let me look. <tool_call>
    {"name": "get_weather", "arguments": {"city": "Oslo"}}
    </tool_call>

A block that is no call of an offered tool is text.
Source: https://github.com/NousResearch/Hermes-Function-Calling
"""

from __future__ import annotations

import json
from collections.abc import Collection

from inference_service.openai_api.pieces import CallArguments, CallBegun, Piece, Said, call_id

BEGIN = "<tool_call>"
END = "</tool_call>"


class TaggedCalls:
    """Tells text from calls; holds back what may become a tag, and a block until it is whole."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held = ""
        self._calls = 0
        self._behind_call = False
        """True while nothing but space came behind the last call; that is left out."""

    def push(self, text: str) -> list[Piece]:
        """Return what became certain with more text."""
        self._held += text
        pieces: list[Piece] = []
        while BEGIN in self._held:
            before, _, block = self._held.partition(BEGIN)
            pieces += self._said(before)
            body, end, rest = block.partition(END)
            if not end:
                self._held = BEGIN + block
                return pieces
            pieces += self._call(body, BEGIN + body + END)
            self._held = rest
        certain = len(self._held) - _possible_tag(self._held)
        pieces += self._said(self._held[:certain])
        self._held = self._held[certain:]
        return pieces

    def finish(self) -> list[Piece]:
        """Return what is left; a call whose closing tag is missing, but whose JSON is whole, counts."""
        held, self._held = self._held, ""
        return self._call(held.removeprefix(BEGIN), held) if held.startswith(BEGIN) else self._said(held)

    def _said(self, text: str) -> list[Piece]:
        text = text.lstrip() if self._behind_call else text
        self._behind_call = self._behind_call and not text
        return [Said(text)] if text else []

    def _call(self, body: str, block: str) -> list[Piece]:
        try:
            call = json.loads(body)
        except (ValueError, RecursionError):
            call = None
        if not isinstance(call, dict) or call.get("name") not in self._names:
            return self._said(block)
        arguments = call.get("arguments", {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        index, self._calls, self._behind_call = self._calls, self._calls + 1, True
        return [CallBegun(index, call_id(), call["name"]), CallArguments(index, text)]


def _possible_tag(text: str) -> int:
    """Return how many characters at the end may be the beginning of a tag."""
    return next(
        (size for size in range(min(len(text), len(BEGIN) - 1), 0, -1) if BEGIN.startswith(text[-size:])), 0
    )
