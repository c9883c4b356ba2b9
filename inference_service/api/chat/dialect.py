"""The dialect of a model: that of its deployment, else that which its chat template shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from inference_service.api.chat.formats.gemma import FUNCTIONGEMMA, GEMMA4
from inference_service.api.chat.formats.harmony import HARMONY, MARKS, messages
from inference_service.api.chat.formats.json_formats import GRANITE, LLAMA3_JSON, MISTRAL, PHI4
from inference_service.api.chat.formats.python_calls import OLMO3, PYTHONIC, TOOL_CODE
from inference_service.api.chat.formats.reading import (
    AnswerReader,
    AnswerSource,
    ParsedAnswer,
    Reader,
    TemplateMarks,
    ThinkingMarks,
    ToolFormat,
    answer,
    nothing,
)
from inference_service.api.chat.formats.tagged import HERMES, QWEN3_CODER
from inference_service.api.chat.request import AnswerCalls, Plain
from inference_service.api.requests.service import GenerationService
from inference_service.core.request import Message
from inference_service.core.served_model import NO_DEFAULTS, ServedModel
from inference_service.text.chat_template import ChatTemplate
from inference_service.text.text import Text
from loramux_shared.ports import registered
from loramux_shared.runtime import Parsers, ReasoningParser, ToolParser

FORMATS: Final[Mapping[str, ToolFormat]] = {
    each.parser: each
    for each in (
        *(HARMONY, GEMMA4, FUNCTIONGEMMA, MISTRAL, OLMO3, PHI4, QWEN3_CODER, GRANITE, HERMES, TOOL_CODE),
        *(PYTHONIC, LLAMA3_JSON),
    )
} | registered("tool_format", ToolFormat)
"""Formats by their names; of those that a template shows the first one counts."""
THINK: Final = ThinkingMarks("<think>", "</think>")
REASONING: Final[Mapping[ReasoningParser, tuple[ThinkingMarks, ...]]] = {
    ReasoningParser.THINK: (THINK,),
    ReasoningParser.GRANITE: (
        THINK,
        *(
            ThinkingMarks(f"{here} my thought process:", f"{here} my response:")
            for here in ("Here is", "Here's")
        ),
    ),
    ReasoningParser.MISTRAL: (ThinkingMarks("[THINK]", "[/THINK]", anywhere=True), THINK),
    ReasoningParser.GEMMA4: (ThinkingMarks("<|channel>thought\n", "<channel|>", anywhere=True),),
}
REASONING_SHOWN: Final = (
    (ReasoningParser.HARMONY, TemplateMarks(("<|channel|>", "<|message|>"))),
    (ReasoningParser.GEMMA4, TemplateMarks(("<|channel>",))),
    (ReasoningParser.MISTRAL, TemplateMarks(("[THINK]",))),
    (ReasoningParser.GRANITE, TemplateMarks(("<|start_of_role|>", "<response>"))),
    (ReasoningParser.GRANITE, TemplateMarks(("my thought process:",))),
    (ReasoningParser.THINK, TemplateMarks(("<think>",))),
    (ReasoningParser.THINK, TemplateMarks(("</think>",))),
)
"""Marks of reasoning by the marks in a template; the first one counts."""
GRANITE_FRAME: Final = ("<response>", "</response>")
"""Around what Granite 3.3 says after it reasoned."""


@dataclass(frozen=True)
class Dialect:
    """The dialect of one model."""

    tool: str
    reasoning: ReasoningParser

    @property
    def form(self) -> ToolFormat:
        """The format of its calls; tags where its template shows none."""
        return FORMATS.get(self.tool, HERMES)

    @property
    def thinking(self) -> tuple[ThinkingMarks, ...]:
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
        """Marks that may be special tokens, without those of calls."""
        own = tuple(mark for each in self.thinking for mark in _special(each))
        return MARKS if self.is_harmony else own

    def turns(self, explicit: Sequence[Message]) -> list[Message]:
        """Return turns as the templates of its models want them."""
        return (HARMONY if self.is_harmony else self.form).turns(explicit)

    def opened(self, end_of_prompt: str) -> ThinkingMarks | None:
        """Return the reasoning that a prompt has opened, which the answer continues with."""
        end = end_of_prompt.rstrip()
        for each in self.thinking:
            if end.endswith(each.begin.rstrip()):
                return each
        return None

    def closed(self, end_of_prompt: str) -> bool:
        """True where a prompt says that there is no reasoning, by having ended it."""
        return any(end_of_prompt.rstrip().endswith(each.end) for each in self.thinking)

    @property
    def endings(self) -> tuple[str, ...]:
        """Ends of prompts that say of reasoning whether there is some: they have opened it, or closed it."""
        opened = [each.begin.rstrip() for each in self.thinking]
        return (*opened, *(each.end for each in self.thinking))

    def within(self, message: str) -> ThinkingMarks | None:
        """Return the reasoning that a message has opened and not closed."""
        for each in self.thinking:
            if message.rfind(each.begin) > message.rfind(each.end):
                return each
        return None

    def reading(self, calls: AnswerCalls, opened: ThinkingMarks | None) -> AnswerReader:
        """Return a reading of one answer."""
        if self.is_harmony:
            reasons = self.reasoning is not ReasoningParser.NONE
            return ParsedAnswer(lambda source: messages(source, calls, visible=reasons))
        if not calls.offered and not self.thinking:
            return Plain()
        return ParsedAnswer(lambda source: self._read(source, calls, opened))

    def _read(self, source: AnswerSource, calls: AnswerCalls, opened: ThinkingMarks | None) -> Reader[None]:
        reads = bool(calls.offered) and self.tool is not ToolParser.NONE
        blocks = dict(self.form.blocks(calls)) if reads else {}
        if self.reasoning is ReasoningParser.GRANITE:
            blocks |= dict.fromkeys(GRANITE_FRAME, nothing)
        leading = self.form.leading(calls) if reads and self.form.leading else None
        return answer(source, blocks, leading=leading, thinking=self.thinking, opened=opened)


def dialect_of(text: Text, template: ChatTemplate | None, explicit: Parsers) -> Dialect:
    """Return the dialect of a model with a text side, and perhaps a template of its own."""
    known = template or text.template
    parsers = parsers_of(known.source if known else "", explicit)
    return Dialect(parsers.tool, parsers.reasoning)


def dialect_of_model(service: GenerationService, model: ServedModel) -> Dialect | None:
    """Return the dialect of a model that is served; None of an adapter whose files nobody has read yet."""
    if model.defaults is None and model.name != service.driver.deployed.served_model_name:
        return None
    defaults = model.defaults or NO_DEFAULTS
    return dialect_of(defaults.text or service.text, defaults.template, service.parsers)


@lru_cache(maxsize=128)
def parsers_of(template: str, explicit: Parsers = Parsers()) -> Parsers:  # noqa: B008 - frozen
    """Return what is said, and where that is auto what a template's text shows; auto where it shows nothing."""
    tool: str = explicit.tool
    reasoning = explicit.reasoning
    if tool is ToolParser.AUTO:
        named = (name for name, each in FORMATS.items() if any(marks.by(template) for marks in each.shown_by))
        tool = next(named, tool)
    if reasoning is ReasoningParser.AUTO:
        reasoning = next((name for name, one in REASONING_SHOWN if one.by(template)), reasoning)
    return Parsers(tool, reasoning)


def _special(thinking: ThinkingMarks) -> tuple[str, ...]:
    return (thinking.begin.removesuffix("thought\n"), thinking.end)
