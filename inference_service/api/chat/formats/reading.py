"""The reading of answers: their text as it comes, with blocks in it, by the parts of a format of calls.

A reader is written as if all of the text were there. It is a generator: it yields pieces, and None where it
needs more text than there is. What it decides depends on the text alone, never on how that was cut, as long as
it takes nothing that more text could change. Text is said, and a block is what its own reader makes of it.
Each format has a file of this room, or shares one with its like.
"""

import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, TypeVar

from inference_service.api.chat.formats.lark import CallGrammar, OfferedTool, Spelling
from inference_service.api.chat.request import AnswerCalls, Piece, Plain, TextPiece, Thought, call_id
from inference_service.core.request import Message

T = TypeVar("T")
Reader = Generator[Piece | None, None, T]
"""Yields pieces, and None to be called again when there is more text; returns what it read."""
_SPACES: Final = re.compile(r"\s*")


class AnswerSource:
    """The text so far; `at` is the position of the reader."""

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.ended = False
        """True when the text is complete."""

    @property
    def left(self) -> int:
        """Return the number of characters that were not read yet."""
        return len(self.text) - self.at

    def add(self, text: str) -> None:
        """Take more text."""
        self.text += text

    def forget(self) -> None:
        """Let go of what was read: nobody will go back to it."""
        self.text, self.at = self.text[self.at :], 0

    def take(self, end: int) -> str:
        """Read up to a place."""
        taken, self.at = self.text[self.at : end], end
        return taken

    def spaces(self) -> Reader[None]:
        """Read spaces and line breaks, to the first of something else."""
        while True:
            found = _SPACES.match(self.text, self.at)
            self.at = found.end() if found else self.at
            if self.left or self.ended:
                return
            yield None

    def literal(self, word: str) -> Reader[bool]:
        """Read a word, if it is next; say whether it was."""
        while not self.text.startswith(word, self.at):
            if self.ended or not word.startswith(self.text[self.at :]):
                return False
            yield None
        self.at += len(word)
        return True

    def upto(self, mark: str, most: int = 256) -> Reader[str | None]:
        """Read to a mark, and return what stood before; None where it is not within so many characters."""
        while (found := self.text.find(mark, self.at, self.at + most + len(mark))) < 0:
            if self.ended or self.left >= most + len(mark):
                return None
            yield None
        before = self.take(found)
        self.at += len(mark)
        return before

    def match(self, pattern: re.Pattern[str]) -> Reader[re.Match[str] | None]:
        """Read what a pattern matches, if it is next; its first character must decide whether it does.

        The pattern must have bounds: it is tried again with all that it matched.
        """
        while True:
            found = pattern.match(self.text, self.at)
            if self.ended or (found and found.end() < len(self.text)) or (not found and self.left):
                break
            yield None
        if found:
            self.at = found.end()
        return found

    def search(self, pattern: re.Pattern[str], place: int, limit: int) -> Reader[re.Match[str] | None]:
        """Find what a pattern matches from a place on, and wait for the character behind a backslash.

        Nothing is read. None: it is not there, and the text ended or went beyond the limit.
        """
        while True:
            found = pattern.search(self.text, place)
            if found is not None and (found[0] != "\\" or found.end() < len(self.text)):
                return found
            if self.ended or len(self.text) > limit:
                return None
            place = len(self.text) if found is None else found.start()
            yield None


class Marks:
    """Some words, of which the first in a text is looked for."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = tuple(words)
        longest_first = sorted(words, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._firsts = frozenset(word[0] for word in words)
        self._longest = max(map(len, words), default=1) - 1

    def find(self, source: AnswerSource) -> re.Match[str] | None:
        """Return the first mark of what was not read yet."""
        return self._pattern.search(source.text, source.at)

    def certain(self, source: AnswerSource) -> int:
        """Return how far a text without a mark surely has none, whatever comes."""
        end = len(source.text)
        if source.ended:
            return end
        longest = min(source.left, self._longest)
        tail = source.text[end - longest :]
        if self._firsts.isdisjoint(tail):
            return end
        sizes = range(longest, 0, -1)
        return end - next(
            (size for size in sizes if any(word.startswith(tail[longest - size :]) for word in self._words)), 0
        )


@lru_cache(maxsize=256)
def marks(*words: str) -> Marks:
    """Return marks; the same for the same words."""
    return Marks(words)


class ParsedAnswer:
    """Reads an answer into the pieces that a generator yields."""

    def __init__(self, reader: Callable[[AnswerSource], Reader[None]]) -> None:
        self._source = AnswerSource()
        self._steps = reader(self._source)

    def push(self, text: str) -> list[Piece]:
        """Return what became certain with more text."""
        self._source.add(text)
        return self._read()

    def finish(self) -> list[Piece]:
        """Return what is left when the answer has ended."""
        self._source.ended = True
        return self._read()

    def _read(self) -> list[Piece]:
        pieces: list[Piece] = []
        for piece in self._steps:
            if piece is None:
                break
            pieces.append(piece)
        return pieces


AnswerReader = Plain | ParsedAnswer
"""Reads the text of one answer as it comes."""
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


@dataclass(frozen=True)
class TemplateMarks:
    """Texts by which a chat template shows what its models write."""

    words: tuple[str, ...]
    """All of them stand in it."""
    without: str = ""
    """Text that the template must not have."""

    def by(self, template: str) -> bool:
        """True where the text of a template shows it."""
        return all(word in template for word in self.words) and not (self.without and self.without in template)


@dataclass(frozen=True)
class ToolFormat:
    """The form in which some models write calls."""

    parser: str
    """Its name; one that a package registers is known by the name of its entry point."""
    shown_by: tuple[TemplateMarks, ...]
    """Marks of it in a template; any of them."""
    blocks: Callable[[AnswerCalls], Mapping[str, Block]]
    """Returns the readers of what begins with a mark, by that."""
    grammar: Callable[[Sequence[OfferedTool], Spelling, bool], CallGrammar]
    """Returns what a call of tools may be, several of them where that is so.

    Raises:
        SchemaUnsupportedError: the format cannot say what the schemas ask for; plain JSON is demanded then.
    """
    leading: Callable[[AnswerCalls], Block] | None = None
    """Returns the reader of calls without a mark, where an answer begins with them."""
    tokens: tuple[str, ...] = ()
    """Marks that may be special tokens, which a text has only where it is asked to."""
    end: str = ""
    """Stands behind a call; empty where nothing does."""
    new_id: Callable[[], str] = call_id
    """Returns an id that templates take."""
    turns: Callable[[Sequence[Message]], list[Message]] = list
    """Returns turns as templates want them, which may refuse those of others."""
