"""The parts of a format of calls; each format has a file of this room, or shares one with its like."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from inference_service.chat.formats.frame import Block
from inference_service.chat.formats.lark import CallGrammar, OfferedTool, Spelling
from inference_service.chat.pieces import AnswerCalls, call_id
from inference_service.serving.request import Message
from loramux_shared.runtime import ToolParser


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

    parser: ToolParser
    """Its name."""
    marks: tuple[TemplateMarks, ...]
    """Any of these shows it."""
    blocks: Callable[[AnswerCalls], Mapping[str, Block]]
    """Returns the readers of what begins with a mark, by that."""
    grammar: Callable[[Sequence[OfferedTool], Spelling, bool], CallGrammar]
    """Returns what a call of tools may be, several of them where that is so.

    Raises:
        CannotSayError: the format cannot say what the schemas ask for; such a call is demanded as plain JSON.
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
