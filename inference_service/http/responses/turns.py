"""From items to the messages that chat templates know.

What the assistant did in one turn comes in several items, and is one message: reasoning, text and calls. So are
the instructions and what systems and developers say before anybody else: templates know one system message. A
compaction is part of that one too, and stands for what was said before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Final

from inference_service.http.openai.chat_schema import CalledFunction, ChatMessage, ToolCall
from inference_service.http.openai.mapping import refused
from inference_service.http.responses.carried import uncarried
from inference_service.http.responses.items import (
    CallItem,
    CompactionItem,
    Item,
    MessageItem,
    OutputItem,
    ReasoningItem,
)
from inference_service.http.responses.tools import qualified

SYSTEM: Final = ("system", "developer")
SUMMED_UP: Final = "What was said before, summed up:\n"
"""Stands before the summary of a compaction."""


def messages_of(instructions: str | None, told: str | Sequence[Item]) -> tuple[ChatMessage, ...]:
    """Return the messages of a text, or of items, behind the instructions.

    Raises:
        RequestInvalid: reasoning or a compaction is not ours.
    """
    said = [ChatMessage(role="user", content=told)] if isinstance(told, str) else [*_messages(told)]
    before = [*takewhile(lambda message: message.role in SYSTEM, said)]
    texts = [text for text in (instructions, *(message.content for message in before)) if text is not None]
    system = [ChatMessage(role="system", content="\n\n".join(texts))] if texts else []
    return (*system, *said[len(before) :])


def leading(items: Sequence[Item]) -> list[MessageItem]:
    """Return what systems and developers say before anybody else."""
    first = takewhile(lambda item: isinstance(item, MessageItem) and item.role in SYSTEM, items)
    return [item for item in first if isinstance(item, MessageItem)]


def _in_force(items: Sequence[Item]) -> Iterator[tuple[int, Item]]:
    """Yield the items that count, with their places: a compaction stands for all before it but the lead."""
    last = max((nth for nth, item in enumerate(items) if isinstance(item, CompactionItem)), default=0)
    yield from enumerate(leading(items[:last]))
    yield from enumerate(items[last:], last)


@dataclass
class _Turn:
    """What the assistant did, as far as it was read."""

    thought: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)

    @property
    def is_answer(self) -> bool:
        """True when more text or reasoning belongs to another turn; behind a call it belongs to this one."""
        return bool(self.said) and not self.calls

    def message(self) -> Iterator[ChatMessage]:
        """Yield the message of the turn; none where nothing was done."""
        if self.thought or self.said or self.calls:
            yield ChatMessage(
                role="assistant",
                content="\n".join(self.said) if self.said else None,
                tool_calls=tuple(self.calls) or None,
                reasoning_content="\n".join(self.thought) if self.thought else None,
            )


def _messages(items: Sequence[Item]) -> Iterator[ChatMessage]:
    turn = _Turn()
    for index, item in _in_force(items):
        theirs = isinstance(item, OutputItem) or (isinstance(item, MessageItem) and item.role != "assistant")
        if theirs or (turn.is_answer and not isinstance(item, CallItem)):
            yield from turn.message()
            turn = _Turn()
        match item:
            case CompactionItem(encrypted_content=content):
                yield ChatMessage(role="system", content=SUMMED_UP + _uncarried(content, index))
            case OutputItem():
                yield ChatMessage(role="tool", content=item.output, tool_call_id=item.call_id)
            case MessageItem() if theirs:
                yield ChatMessage(role=item.role, content=item.content)
            case MessageItem():
                turn.said.append(item.content)
            case CallItem():
                function = CalledFunction(name=qualified(item.namespace, item.name), arguments=item.arguments)
                turn.calls.append(ToolCall(id=item.call_id, type="function", function=function))
            case ReasoningItem():
                turn.thought += _thought(item, index)
    yield from turn.message()


def _thought(item: ReasoningItem, index: int) -> list[str]:
    """Return what was thought: the text itself, else what was carried, else its summary."""
    carried = None if item.encrypted_content is None else _uncarried(item.encrypted_content, index)
    thought = next((text for text in (item.content, carried, item.summary) if text), None)
    return [] if thought is None else [thought]


def _uncarried(content: str, index: int) -> str:
    text = uncarried(content)
    if text is None:
        raise refused(
            f"input[{index}].encrypted_content",
            "what this server gave; leave out the items of other servers",
            "another text",
        )
    return text
