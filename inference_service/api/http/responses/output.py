"""The items of an answer as they grow, and the events of a stream that write them.

Every item is added, gets its parts or arguments, and is done before the next one begins.
Sources of the events: https://www.openresponses.org/specification, and
`openai.types.responses.ResponseStreamEvent`.
"""

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any, Final, cast

from inference_service.api.chat.request import CallArguments, CallBegun, Piece, TextPiece, Thought
from inference_service.api.http.openai.answers import TokenLogprob
from inference_service.api.http.openai.logprobs import TokenNames, chat_logprobs
from inference_service.api.http.responses.answers import (
    AnsweredItem,
    CalledItem,
    ItemStatus,
    OutputMessage,
    OutputTextPart,
    ResponseEvent,
    ThoughtItem,
    ThoughtPart,
)
from inference_service.api.http.responses.items import CalledName, Offered, carried
from inference_service.core.sequence import Token
from inference_service.text.text import Text

Number = Callable[[], int]
"""Returns the number of the next event of a stream; events are made in the order in which they are sent."""
PART: Final = 0
"""The index of an item's part: items have one each."""


def event_of(kind: str, number: Number, **fields: Any) -> ResponseEvent:
    """Return the next event of a stream."""
    return cast(ResponseEvent, {"type": f"response.{kind}", "sequence_number": number(), **fields})


class _Item(ABC):
    """An item that is not done."""

    prefix: str
    """Prefix of its id."""

    def __init__(self, index: int, number: Number) -> None:
        self._index = index
        self._number = number
        self._id = f"{self.prefix}_{secrets.token_hex(16)}"
        self._texts: list[str] = []
        self._place: dict[str, Any] = {"item_id": self._id, "output_index": index}
        """Fields of events about the item."""

    @property
    def _text(self) -> str:
        return "".join(self._texts)

    @abstractmethod
    def item(self, status: ItemStatus) -> AnsweredItem:
        """Return the item with the text so far."""

    def added(self) -> list[ResponseEvent]:
        """Return the events that begin the item."""
        return [self._whole("added", "in_progress")]

    def done(self, status: ItemStatus) -> list[ResponseEvent]:
        """Return the events that end the item."""
        return [self._whole("done", status)]

    def _whole(self, kind: str, status: ItemStatus) -> ResponseEvent:
        item = self.item(status)
        return event_of(f"output_item.{kind}", self._number, output_index=self._index, item=item)

    def _event(self, kind: str, **fields: Any) -> ResponseEvent:
        event = {"type": f"response.{kind}", "sequence_number": self._number(), **self._place, **fields}
        return cast(ResponseEvent, event)


class _Parted(_Item):
    """An item whose text is that of a part."""

    kind: str
    """Kind of the text, in the names of its events."""

    def __init__(self, index: int, number: Number) -> None:
        super().__init__(index, number)
        self._place["content_index"] = PART

    def added(self) -> list[ResponseEvent]:
        return [*super().added(), self._event("content_part.added", part=self._part())]

    def done(self, status: ItemStatus) -> list[ResponseEvent]:
        text = self._event(f"{self.kind}.done", text=self._text, **self._scored())
        return [text, self._event("content_part.done", part=self._part()), *super().done(status)]

    def more(self, text: str) -> ResponseEvent:
        """Return the event of more text."""
        self._texts.append(text)
        return self._event(f"{self.kind}.delta", delta=text)

    @abstractmethod
    def _part(self) -> OutputTextPart | ThoughtPart: ...

    def _scored(self) -> dict[str, list[TokenLogprob]]:
        return {}


class _Message(_Parted):
    """The text of an answer, with the log probabilities of its tokens."""

    prefix, kind = "msg", "output_text"

    def __init__(self, index: int, number: Number) -> None:
        super().__init__(index, number)
        self._scores: list[TokenLogprob] = []

    def item(self, status: ItemStatus) -> OutputMessage:
        content = [self._part()] if self._texts else []
        return {"id": self._id, "type": "message", "status": status, "role": "assistant", "content": content}

    def scored(self, text: str, scores: list[TokenLogprob]) -> ResponseEvent:
        """Return the event of more text, and of the log probabilities of its tokens."""
        self._texts.append(text)
        self._scores += scores
        return self._event("output_text.delta", delta=text, logprobs=scores)

    def _part(self) -> OutputTextPart:
        return {"type": "output_text", "text": self._text, "annotations": [], "logprobs": [*self._scores]}

    def _scored(self) -> dict[str, list[TokenLogprob]]:
        return {"logprobs": [*self._scores]}


class _Reasoning(_Parted):
    """The reasoning before an answer."""

    prefix, kind = "rs", "reasoning_text"

    def __init__(self, index: int, number: Number, *, carries: bool) -> None:
        super().__init__(index, number)
        self._carries = carries

    def item(self, status: ItemStatus) -> ThoughtItem:
        item: ThoughtItem = {
            "id": self._id,
            "type": "reasoning",
            "status": status,
            "summary": [],
            "content": [self._part()] if self._texts else [],
        }
        if self._carries and status != "in_progress":
            item["encrypted_content"] = carried(self._text)
        return item

    def _part(self) -> ThoughtPart:
        return {"type": "reasoning_text", "text": self._text}


class _Call(_Item):
    """A call of a function."""

    prefix = "fc"

    def __init__(self, index: int, number: Number, begun: CallBegun, function: Offered | None) -> None:
        super().__init__(index, number)
        self._call_id = begun.id
        self._called: CalledName = function.called() if function else {"name": begun.name}

    def item(self, status: ItemStatus) -> CalledItem:
        return {
            "id": self._id,
            "type": "function_call",
            "status": status,
            "call_id": self._call_id,
            **self._called,
            "arguments": self._text,
        }

    def more(self, text: str) -> ResponseEvent:
        """Return the event of more arguments."""
        self._texts.append(text)
        return self._event("function_call_arguments.delta", delta=text)

    def done(self, status: ItemStatus) -> list[ResponseEvent]:
        kind, name = "function_call_arguments.done", self._called["name"]
        return [self._event(kind, name=name, arguments=self._text), *super().done(status)]


class OutputItems:
    """Collects the items of an answer, and makes the events of a stream of them."""

    def __init__(
        self, scored: Text | None, functions: Iterable[Offered], *, carries: bool, number: Number | None = None
    ) -> None:
        """Begin an answer without items.

        Messages have log probabilities where a text is given; where `carries` is true, reasoning has a form
        that clients give back unread. Events are numbered from 0 where nothing else numbers them.
        """
        self._number = number or count().__next__
        self._scored = scored
        self._functions = {each.name: each for each in functions}
        self._carries = carries
        self._done: list[AnsweredItem] = []
        self._open: _Message | _Reasoning | _Call | None = None
        self._space = ""
        """Space that is the beginning of a message, or of nothing."""
        self._tokens: list[Token] = []
        """Those of which no piece has come yet."""
        self.reasoning_tokens = 0

    def take(self, pieces: Sequence[Piece], tokens: Sequence[Token]) -> list[ResponseEvent]:
        """Return the events of more of the answer, which was decoded from these tokens."""
        self._tokens += tokens
        return [event for piece in pieces for event in self._piece(piece)]

    def end(self, pieces: Sequence[Piece], status: ItemStatus) -> list[ResponseEvent]:
        """Return the events of its end; the last item has the status of the whole."""
        events = self.take(pieces, ())
        nothing = self._open is None and not self._done
        if nothing or (isinstance(self._open, _Message) and self._tokens and self._scored):
            events += self._say("")
        return events + self._close(status)

    def items(self) -> list[AnsweredItem]:
        """Return what there is; an item that is not done is incomplete."""
        return [*self._done, *([self._open.item("incomplete")] if self._open else [])]

    def _piece(self, piece: Piece) -> list[ResponseEvent]:
        match piece:
            case TextPiece(text):
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
                self._open = _Call(len(self._done), self._number, piece, self._functions.get(piece.name))
                return events + self._open.added()
            case CallArguments(_, text):
                self._tokens.clear()
                assert isinstance(self._open, _Call)  # noqa: S101 - the piece before began it
                return [self._open.more(text)]

    def _say(self, text: str) -> list[ResponseEvent]:
        events: list[ResponseEvent] = []
        if not isinstance(self._open, _Message):
            text = self._space + text
            events = self._close("completed")
            self._open = _Message(len(self._done), self._number)
            events += self._open.added()
        scores = chat_logprobs(self._tokens, TokenNames(self._scored))["content"] if self._scored else []
        self._tokens.clear()
        return [*events, self._open.scored(text, scores)]

    def _think(self, text: str) -> list[ResponseEvent]:
        events: list[ResponseEvent] = []
        self._space = ""
        if not isinstance(self._open, _Reasoning):
            events = self._close("completed")
            self._open = _Reasoning(len(self._done), self._number, carries=self._carries)
            events += self._open.added()
        return [*events, self._open.more(text)]

    def _close(self, status: ItemStatus) -> list[ResponseEvent]:
        """Return the events that end the item that is open, if one is; the next one begins without space."""
        self._space = ""
        if self._open is None:
            return []
        self._done.append(self._open.item(status))
        events, self._open = self._open.done(status), None
        return events
