"""The content of an answer: blocks of text, thinking and calls, and the events that tell them as they come."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable
from hashlib import sha256
from typing import Final

from pydantic_core import from_json

from inference_service.chat.pieces import CallArguments, CallBegun, Piece, Said, Thought
from inference_service.http.wire.reply import Json

FIELDS: Final = {"text": "text", "thinking": "thinking", "tool_use": "partial_json"}
"""By the type of a block: where its deltas have what is new."""
DELTAS: Final = {"text": "text_delta", "thinking": "thinking_delta", "tool_use": "input_json_delta"}


class Content:
    """Makes blocks of pieces, one after the other."""

    def __init__(self, *, shows_thinking: bool) -> None:
        """Begin an answer; where thinking is not shown, its blocks are empty."""
        self._shows_thinking = shows_thinking
        self.blocks: list[Json] = []
        """Those that are closed are whole."""
        self._open = ""
        """The type of the last block, while it goes on."""
        self._told: list[str] = []
        """Its text so far."""
        self._space = ""
        """Before a block of text that may come: none consists of nothing else."""

    @property
    def calls(self) -> bool:
        """True when the answer calls something."""
        return any(block["type"] == "tool_use" for block in self.blocks)

    def take(self, pieces: Iterable[Piece]) -> list[Json]:
        """Return the events that tell more of the answer."""
        return [event for piece in pieces for event in self._take(piece)]

    def end(self) -> list[Json]:
        """Return the events that tell the end of the last block."""
        return self._close()

    def _take(self, piece: Piece) -> list[Json]:
        match piece:
            case Said() if self._open == "text":
                return self._more(piece.text)
            case Said():
                self._space += piece.text
                if not self._space.strip():
                    return []
                text = self._space
                return [*self._begin({"type": "text", "text": ""}), *self._more(text)]
            case Thought():
                block = {"type": "thinking", "thinking": "", "signature": ""}
                return [*([] if self._open == "thinking" else self._begin(block)), *self._more(piece.text)]
            case CallBegun():
                return self._begin({"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}})
            case CallArguments():
                return self._more(piece.text)

    def _begin(self, block: Json) -> list[Json]:
        closed = self._close()
        self._open, self._told, self._space = block["type"], [], ""
        self.blocks.append(block)
        # What is told of the beginning is never what the block becomes.
        return [*closed, {"type": "content_block_start", "index": self._index, "content_block": dict(block)}]

    def _more(self, text: str) -> list[Json]:
        self._told.append(text)
        if self._open == "thinking" and not self._shows_thinking:
            return []
        return [self._delta({"type": DELTAS[self._open], FIELDS[self._open]: text})]

    def _close(self) -> list[Json]:
        if not self._open:
            return []
        kind, self._open = self._open, ""
        block, told, events = self.blocks[-1], "".join(self._told), []
        if kind == "tool_use":
            block["input"] = input_of(told)
        elif kind == "text":
            block["text"] = told
        else:
            block |= {"thinking": told if self._shows_thinking else "", "signature": signature_of(told)}
            events = [self._delta({"type": "signature_delta", "signature": block["signature"]})]
        return [*events, {"type": "content_block_stop", "index": self._index}]

    def _delta(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    @property
    def _index(self) -> int:
        return len(self.blocks) - 1


def input_of(arguments: str) -> Json:
    """Return the input of a call: an object, of which a call that was cut off has the beginning.

    What is none is under the name that Anthropic's documentation has for it.
    """
    try:
        found = from_json(arguments or "{}", allow_partial=True)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"INVALID_JSON": arguments}


def signature_of(thinking: str) -> str:
    """Return a digest of what was thought: clients want some signature, and nothing here is proved by it."""
    return b64encode(sha256(thinking.encode()).digest()).decode()
