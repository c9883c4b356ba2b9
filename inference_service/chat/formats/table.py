"""Which dialect a model writes: what its deployment says, else what its chat template shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from inference_service.chat.formats import gemma, harmony, listed, llama, tagged
from inference_service.chat.formats.calls import Calls
from inference_service.chat.formats.frame import Block, Thinking, answer, nothing
from inference_service.chat.formats.source import Answer, Reader, Source
from inference_service.chat.formats.turns import call_by_call, with_short_ids
from inference_service.chat.pieces import Plain, Reading
from inference_service.serving.parsers import parsers_of
from inference_service.serving.request import Message
from inference_service.text.chat_template import ChatTemplate
from inference_service.text.text import Text
from loramux_shared.parsers import Parsers, ReasoningParser, ToolParser

Blocks = Callable[[Calls], Mapping[str, Block]]


@dataclass(frozen=True)
class ToolForm:
    """A form of calls."""

    blocks: Blocks
    leading: Callable[[Calls], Block] | None = None
    """Reads calls without a mark, where an answer begins with them."""
    tokens: tuple[str, ...] = ()
    """Marks that may be special tokens, which a text has only where it is asked to."""
    end: str = ""
    """Stands behind a call; empty where nothing does."""
    short_ids: bool = False
    """True where templates take ids of nine letters and digits alone."""


TAGGED: Final = ToolForm(tagged.tagged_blocks, tokens=(tagged.BEGIN, tagged.END), end=tagged.END)
TOOLS: Final[Mapping[ToolParser, ToolForm]] = {
    ToolParser.HERMES: TAGGED,
    ToolParser.QWEN3_CODER: TAGGED,
    ToolParser.LLAMA3_JSON: ToolForm(llama.llama_blocks, llama.llama_leading, (llama.PYTHON_TAG,)),
    ToolParser.PYTHONIC: ToolForm(llama.pythonic_blocks, llama.pythonic_leading, (llama.PYTHON_TAG,)),
    ToolParser.OLMO3: ToolForm(llama.olmo_blocks, tokens=(llama.OLMO, llama.OLMO_END)),
    ToolParser.TOOL_CODE: ToolForm(llama.fenced_blocks),
    ToolParser.MISTRAL: ToolForm(
        listed.mistral_blocks, tokens=(listed.MISTRAL, listed.ID, listed.ARGS), short_ids=True
    ),
    ToolParser.GRANITE: ToolForm(listed.granite_blocks, tokens=(listed.GRANITE, tagged.BEGIN, tagged.END)),
    ToolParser.PHI4: ToolForm(listed.phi_blocks, tokens=(listed.GRANITE, listed.PHI_END)),
    ToolParser.GEMMA4: ToolForm(
        gemma.gemma_blocks, tokens=(gemma.GEMMA.begin, gemma.GEMMA.end, gemma.GEMMA.quote), end=gemma.GEMMA.end
    ),
    ToolParser.FUNCTIONGEMMA: ToolForm(
        gemma.function_blocks,
        tokens=(gemma.FUNCTION.begin, gemma.FUNCTION.end, gemma.FUNCTION.quote),
        end=gemma.FUNCTION.end,
    ),
    ToolParser.HARMONY: ToolForm(lambda _: {}, tokens=harmony.MARKS),
}
THINK: Final = Thinking("<think>", "</think>")
REASONING: Final[Mapping[ReasoningParser, tuple[Thinking, ...]]] = {
    ReasoningParser.THINK: (THINK,),
    ReasoningParser.GRANITE: (
        THINK,
        *(Thinking(f"{here} my thought process:", f"{here} my response:") for here in ("Here is", "Here's")),
    ),
    ReasoningParser.MISTRAL: (Thinking("[THINK]", "[/THINK]", anywhere=True), THINK),
    ReasoningParser.GEMMA4: (Thinking("<|channel>thought\n", "<channel|>", anywhere=True),),
}
GRANITE_FRAME: Final = ("<response>", "</response>")
"""Around what Granite 3.3 says after it reasoned."""


@dataclass(frozen=True)
class Dialect:
    """How one model writes."""

    tool: ToolParser
    reasoning: ReasoningParser

    @property
    def form(self) -> ToolForm:
        """The form of its calls; tags where its template shows none."""
        return TOOLS.get(self.tool, TAGGED)

    @property
    def thinking(self) -> tuple[Thinking, ...]:
        """The marks of its reasoning; any of them."""
        return REASONING.get(self.reasoning, ())

    @property
    def is_harmony(self) -> bool:
        """True where an answer consists of messages."""
        return ToolParser.HARMONY is self.tool or ReasoningParser.HARMONY is self.reasoning

    @property
    def tokens(self) -> tuple[str, ...]:
        """Marks that may be special tokens."""
        return (*self.form.tokens, *self.thinking_tokens)

    @property
    def thinking_tokens(self) -> tuple[str, ...]:
        """Those of them that are not about calls."""
        own = tuple(mark for each in self.thinking for mark in _special(each))
        return harmony.MARKS if self.is_harmony else own

    def turns(self, messages: Sequence[Message]) -> list[Message]:
        """Return turns as the templates of its models want them."""
        if self.is_harmony:
            return call_by_call(messages)
        return with_short_ids(messages) if self.form.short_ids else list(messages)

    def opened(self, end_of_prompt: str) -> Thinking | None:
        """Return the reasoning that a prompt has opened, which the answer goes on with."""
        end = end_of_prompt.rstrip()
        for each in self.thinking:
            if end.endswith(each.begin.rstrip()):
                return each
        return None

    def closed(self, end_of_prompt: str) -> bool:
        """True where a prompt says that there is no reasoning, by having ended it."""
        return any(end_of_prompt.rstrip().endswith(each.end) for each in self.thinking)

    def within(self, message: str) -> Thinking | None:
        """Return the reasoning that a message has opened and not closed."""
        for each in self.thinking:
            if message.rfind(each.begin) > message.rfind(each.end):
                return each
        return None

    def reading(self, calls: Calls, opened: Thinking | None) -> Reading:
        """Return a reading of one answer."""
        if self.is_harmony:
            shown = self.reasoning is not ReasoningParser.NONE
            return Answer(lambda source: harmony.messages(source, calls, shown=shown))
        if not calls.offered and not self.thinking:
            return Plain()
        return Answer(lambda source: self._read(source, calls, opened))

    def _read(self, source: Source, calls: Calls, opened: Thinking | None) -> Reader[None]:
        reads = bool(calls.offered) and self.tool is not ToolParser.NONE
        blocks = dict(self.form.blocks(calls)) if reads else {}
        if self.reasoning is ReasoningParser.GRANITE:
            blocks |= dict.fromkeys(GRANITE_FRAME, nothing)
        leading = self.form.leading(calls) if reads and self.form.leading else None
        return answer(source, blocks, leading=leading, thinking=self.thinking, opened=opened)


def dialect_of(text: Text, template: ChatTemplate | None, said: Parsers) -> Dialect:
    """Return the dialect of a model with a text side, and perhaps a template of its own."""
    parsers = parsers_of(template or text.template, said)
    return Dialect(parsers.tool, parsers.reasoning)


def _special(thinking: Thinking) -> tuple[str, ...]:
    return (thinking.begin.removesuffix("thought\n"), thinking.end)
