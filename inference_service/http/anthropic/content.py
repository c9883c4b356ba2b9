"""The content of a message: blocks of text, thinking and calls, and the events of a stream that write them."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable
from hashlib import sha256
from typing import Any

from pydantic_core import from_json

from inference_service.chat.pieces import CallArguments, CallBegun, Piece, TextPiece, Thought
from inference_service.http.anthropic.answers import (
    BlockDelta,
    BlockStart,
    BlockStop,
    ContentBlock,
    InputDelta,
    SignatureDelta,
    TextDelta,
    ThinkingDelta,
)

BlockEvent = BlockStart | BlockDelta | BlockStop


class Content:
    """Makes blocks of pieces, one after the other."""

    def __init__(self, *, shows_thinking: bool) -> None:
        """Begin an answer; where thinking is not shown, its blocks are empty."""
        self._shows_thinking = shows_thinking
        self.blocks: list[ContentBlock] = []
        """The blocks so far; the one that is open is still empty."""
        self._open: ContentBlock | None = None
        """The last block, while it continues."""
        self._texts: list[str] = []
        """The text of the open block so far."""
        self._space = ""
        """Space before a block of text that may come: no block consists of nothing else."""

    @property
    def calls(self) -> bool:
        """True when the answer calls something."""
        return any(block["type"] == "tool_use" for block in self.blocks)

    def take(self, pieces: Iterable[Piece]) -> list[BlockEvent]:
        """Return the events of more of the answer."""
        return [event for piece in pieces for event in self._take(piece)]

    def end(self) -> list[BlockEvent]:
        """Return the events of the end of the last block."""
        return self._close()

    def _take(self, piece: Piece) -> list[BlockEvent]:
        kind = self._open["type"] if self._open else ""
        match piece:
            case TextPiece() if kind == "text":
                return self._more(piece.text)
            case TextPiece():
                self._space += piece.text
                if not self._space.strip():
                    return []
                text = self._space
                return [*self._begin({"type": "text", "text": ""}), *self._more(text)]
            case Thought() if kind == "thinking":
                return self._more(piece.text)
            case Thought():
                begun = self._begin({"type": "thinking", "thinking": "", "signature": ""})
                return [*begun, *self._more(piece.text)]
            case CallBegun():
                return self._begin({"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}})
            case CallArguments():
                return self._more(piece.text)

    def _begin(self, block: ContentBlock) -> list[BlockEvent]:
        closed = self._close()
        self._open, self._texts, self._space = block, [], ""
        self.blocks.append(block)
        # The event has a copy: it is written before the block has its text.
        return [*closed, {"type": "content_block_start", "index": self._index, "content_block": block.copy()}]

    def _more(self, text: str) -> list[BlockEvent]:
        self._texts.append(text)
        kind = self._open["type"] if self._open else ""
        if kind == "text":
            return [self._delta({"type": "text_delta", "text": text})]
        if kind == "tool_use":
            return [self._delta({"type": "input_json_delta", "partial_json": text})]
        return [self._delta({"type": "thinking_delta", "thinking": text})] if self._shows_thinking else []

    def _close(self) -> list[BlockEvent]:
        if self._open is None:
            return []
        block, self._open = self._open, None
        text = "".join(self._texts)
        events: list[BlockEvent] = []
        if block["type"] == "tool_use":
            block["input"] = input_of(text)
        elif block["type"] == "text":
            block["text"] = text
        else:
            block["thinking"] = text if self._shows_thinking else ""
            block["signature"] = signature_of(text)
            events = [self._delta({"type": "signature_delta", "signature": block["signature"]})]
        return [*events, {"type": "content_block_stop", "index": self._index}]

    def _delta(self, delta: TextDelta | ThinkingDelta | SignatureDelta | InputDelta) -> BlockDelta:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    @property
    def _index(self) -> int:
        return len(self.blocks) - 1


def input_of(arguments: str) -> dict[str, Any]:
    """Return the input of a call as an object; a call that was cut off has the beginning of one.

    Text that is no object stands under the name that Anthropic's documentation has for it.
    """
    try:
        found = from_json(arguments or "{}", allow_partial=True)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"INVALID_JSON": arguments}


def signature_of(thinking: str) -> str:
    """Return a digest of the thinking: clients want some signature, and nothing here is proved by it."""
    return b64encode(sha256(thinking.encode()).digest()).decode()
