"""An answer as text with blocks: text is said, a block is what its own reader makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from inference_service.chat.formats.source import AnswerSource, Marks, Reader, marks
from inference_service.chat.pieces import TextPiece, Thought

Block = Callable[[AnswerSource], Reader[bool]]
"""Reads what stands behind a mark, with its end; says whether it was what the mark promises. If not, it has
emitted nothing, and what it read is read again as text."""


@dataclass(frozen=True)
class ThinkingMarks:
    """Marks around reasoning."""

    begin: str
    end: str
    anywhere: bool = False
    """True where the marks are tokens that nothing else is; else reasoning only begins an answer."""


def answer(
    source: AnswerSource,
    blocks: Mapping[str, Block],
    *,
    leading: Block | None = None,
    thinking: Sequence[ThinkingMarks] = (),
    opened: ThinkingMarks | None = None,
) -> Reader[None]:
    """Read an answer.

    A block begins with its mark, and leading, which has none, where the answer does. Reasoning of any of the
    marks comes before all; opened: the prompt has begun it.
    """
    if opened is None:
        opened = yield from _opens(source, thinking)
    if opened is not None:
        yield from thoughts(source, opened.end)
    blocks = {**blocks, **{each.begin: _thought_block(each) for each in thinking if each.anywhere}}
    if leading is not None:
        yield from _leading(source, leading)
    known = marks(*blocks)
    while (mark := (yield from text_piece(source, known))) is not None:
        source.forget()
        source.at = len(mark)
        if (yield from blocks[mark](source)):
            yield from source.spaces()
        elif source.ended:
            source.at = 0
            yield TextPiece(source.take(len(source.text)))
        else:
            source.at = 0
            yield TextPiece(source.take(len(mark)))


def text_piece(source: AnswerSource, known: Marks) -> Reader[str | None]:
    """Tell text up to the first mark; return that, which is not read, or None at the end."""
    while True:
        found = known.find(source)
        if text := source.take(found.start() if found else known.certain(source)):
            yield TextPiece(text)
        if found or source.ended:
            return found[0] if found else None
        source.forget()
        yield None


def thoughts(source: AnswerSource, end: str) -> Reader[None]:
    """Tell reasoning to its end, without the space around it, and read the space behind."""
    yield from source.spaces()
    known = marks(end)
    while True:
        found = known.find(source)
        stop = found.start() if found else known.certain(source)
        text = source.text[source.at : stop].rstrip()
        if text:
            source.at += len(text)
            yield Thought(text)
        if found:
            source.at = found.end()
            yield from source.spaces()
            return
        if source.ended:
            source.at = len(source.text)
            return
        source.forget()
        yield None


def nothing(source: AnswerSource) -> Reader[bool]:
    """Read a block of a mark alone, which emits nothing."""
    del source
    return True
    yield


def _thought_block(thinking: ThinkingMarks) -> Block:
    def read(source: AnswerSource) -> Reader[bool]:
        yield from thoughts(source, thinking.end)
        return True

    return read


def _opens(source: AnswerSource, thinking: Sequence[ThinkingMarks]) -> Reader[ThinkingMarks | None]:
    """Read a mark of reasoning, and the space before it, where an answer begins with it; return which."""
    if thinking:
        yield from source.spaces()
    for each in thinking:
        if (yield from source.literal(each.begin)):
            return each
    source.at = 0
    return None


def _leading(source: AnswerSource, block: Block) -> Reader[None]:
    source.forget()
    yield from source.spaces()
    if (yield from block(source)):
        yield from source.spaces()
    else:
        source.at = 0
