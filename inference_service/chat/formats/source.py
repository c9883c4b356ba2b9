"""Text of an answer as it comes, for readers that are written as if all of it were there.

A reader is a generator: it yields pieces, and None where it needs more text than there is. What it decides
depends on the text alone, never on how that was cut, as long as it takes nothing that more text could change.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from functools import lru_cache
from typing import Final, TypeVar

from inference_service.chat.pieces import Piece

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
    """An `AnswerReader` of the pieces that a generator yields."""

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
