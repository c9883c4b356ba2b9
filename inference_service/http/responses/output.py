"""The items of an answer as they grow, and the events that tell it.

Every item is added, gets its parts or arguments, and is done before the next one begins.
Sources of the events: https://www.openresponses.org/specification, and
`openai.types.responses.ResponseStreamEvent`.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from typing import Final, Literal

from inference_service.chat.pieces import CallArguments, CallBegun, Piece, Said, Thought
from inference_service.core.sequence import Token
from inference_service.http.openai.logprobs import TokenNames, chat_logprobs
from inference_service.http.responses.items import carried
from inference_service.http.responses.tools import Offered
from inference_service.http.wire.reply import Json
from inference_service.text.text import Text

Status = Literal["in_progress", "completed", "incomplete"]
PART: Final = 0
"""Items have one part each."""


class _Item:
    """An item that is not done."""

    prefix: str
    """Of its id."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._id = f"{self.prefix}_{secrets.token_hex(16)}"
        self._texts: list[str] = []

    @property
    def _text(self) -> str:
        return "".join(self._texts)

    @property
    def _place(self) -> Json:
        return {"item_id": self._id, "output_index": self._index}

    def json(self, status: Status) -> Json:
        """Return the item with what it has so far."""
        raise NotImplementedError

    def added(self) -> list[Json]:
        """Return the events that begin it."""
        item = self.json("in_progress")
        return [{"type": "response.output_item.added", "output_index": self._index, "item": item}]

    def done(self, status: Status) -> list[Json]:
        """Return the events that end it."""
        item = self.json(status)
        return [{"type": "response.output_item.done", "output_index": self._index, "item": item}]


class _Parted(_Item):
    """An item whose text is that of a part."""

    kind: str
    """Of the part."""

    def _part(self) -> Json:
        return {"type": self.kind, "text": self._text}

    def _told(self, event: str, **more: object) -> Json:
        return {"type": f"response.{event}", **self._place, "content_index": PART, **more}

    def added(self) -> list[Json]:
        return [*super().added(), self._told("content_part.added", part=self._part())]

    def done(self, status: Status) -> list[Json]:
        text = self._told(f"{self.kind}.done", text=self._text)
        return [text, self._told("content_part.done", part=self._part()), *super().done(status)]


class _Message(_Parted):
    """What is said."""

    prefix, kind = "msg", "output_text"

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self._scores: list[Json] = []

    def json(self, status: Status) -> Json:
        content = [self._part()] if self._texts else []
        item: Json = {"id": self._id, "type": "message", "status": status, "role": "assistant"}
        return item | {"content": content}

    def _part(self) -> Json:
        return {"type": self.kind, "text": self._text, "annotations": [], "logprobs": [*self._scores]}

    def more(self, text: str, scores: list[Json]) -> list[Json]:
        """Return the events of more text, and of the log probabilities of its tokens."""
        self._texts.append(text)
        self._scores += scores
        return [self._told("output_text.delta", delta=text, logprobs=scores)]

    def done(self, status: Status) -> list[Json]:
        text, *rest = super().done(status)
        return [text | {"logprobs": [*self._scores]}, *rest]


class _Thoughts(_Parted):
    """What is thought."""

    prefix, kind = "rs", "reasoning_text"

    def __init__(self, index: int, *, carries: bool) -> None:
        super().__init__(index)
        self._carries = carries

    def json(self, status: Status) -> Json:
        content = [self._part()] if self._texts else []
        item: Json = {"id": self._id, "type": "reasoning", "status": status, "summary": [], "content": content}
        whole = self._carries and status != "in_progress"
        return item | ({"encrypted_content": carried(self._text)} if whole else {})

    def more(self, text: str) -> list[Json]:
        """Return the events of more reasoning."""
        self._texts.append(text)
        return [self._told("reasoning_text.delta", delta=text)]


class _Call(_Item):
    """A call of a function."""

    prefix = "fc"

    def __init__(self, index: int, begun: CallBegun, function: Offered | None) -> None:
        super().__init__(index)
        self._begun = begun
        self._called: Json = function.called() if function else {"name": begun.name}

    def json(self, status: Status) -> Json:
        return {
            "id": self._id,
            "type": "function_call",
            "status": status,
            "call_id": self._begun.id,
            **self._called,
            "arguments": self._text,
        }

    def more(self, text: str) -> list[Json]:
        """Return the events of more arguments."""
        self._texts.append(text)
        return [{"type": "response.function_call_arguments.delta", **self._place, "delta": text}]

    def done(self, status: Status) -> list[Json]:
        event = "response.function_call_arguments.done"
        arguments = {"type": event, **self._place, "name": self._called["name"], "arguments": self._text}
        return [arguments, *super().done(status)]


class OutputItems:
    """Collects the items of an answer, and tells them in events."""

    def __init__(self, scored: Text | None, functions: Iterable[Offered], *, carries: bool) -> None:
        """Begin an answer without items.

        Text is given where log probabilities are to be told; carries: reasoning is to be given back unread.
        """
        self._scored = scored
        self._functions = {each.name: each for each in functions}
        self._carries = carries
        self._done: list[Json] = []
        self._open: _Message | _Thoughts | _Call | None = None
        self._space = ""
        """Space that is the beginning of a message, or of nothing."""
        self._tokens: list[Token] = []
        """Those of which no piece has come yet."""
        self.reasoning_tokens = 0

    def take(self, pieces: Sequence[Piece], tokens: Sequence[Token]) -> list[Json]:
        """Return the events of more of the answer, which was decoded from these tokens."""
        self._tokens += tokens
        return [event for piece in pieces for event in self._piece(piece)]

    def end(self, pieces: Sequence[Piece], status: Status) -> list[Json]:
        """Return the events of its end; the last item has the status of the whole."""
        events = self.take(pieces, ())
        nothing = self._open is None and not self._done
        if nothing or (isinstance(self._open, _Message) and self._tokens and self._scored):
            events += self._say("")
        return events + self._close(status)

    def items(self) -> list[Json]:
        """Return what there is; an item that is not done is incomplete."""
        return [*self._done, *([self._open.json("incomplete")] if self._open else [])]

    def _piece(self, piece: Piece) -> list[Json]:
        match piece:
            case Said(text):
                if isinstance(self._open, _Message) or text.strip():
                    return self._say(text)
                self._space += text
                return []
            case Thought(text):
                self.reasoning_tokens += len(self._tokens)
                self._tokens.clear()
                return self._think(text)
            case CallBegun():
                self._tokens.clear()
                events = self._close("completed")
                self._open = _Call(len(self._done), piece, self._functions.get(piece.name))
                return events + self._open.added()
            case CallArguments(_, text):
                self._tokens.clear()
                assert isinstance(self._open, _Call)  # noqa: S101 - the piece before began it
                return self._open.more(text)

    def _say(self, text: str) -> list[Json]:
        events: list[Json] = []
        if not isinstance(self._open, _Message):
            text = self._space + text
            events = self._close("completed")
            self._open = _Message(len(self._done))
            events += self._open.added()
        scores = chat_logprobs(self._tokens, TokenNames(self._scored))["content"] if self._scored else []
        self._tokens.clear()
        return events + self._open.more(text, scores)

    def _think(self, text: str) -> list[Json]:
        events: list[Json] = []
        self._space = ""
        if not isinstance(self._open, _Thoughts):
            events = self._close("completed")
            self._open = _Thoughts(len(self._done), carries=self._carries)
            events += self._open.added()
        return events + self._open.more(text)

    def _close(self, status: Status) -> list[Json]:
        """Return the events that end the item that is open, if one is; the next one begins without space."""
        self._space = ""
        if self._open is None:
            return []
        self._done.append(self._open.json(status))
        events, self._open = self._open.done(status), None
        return events
