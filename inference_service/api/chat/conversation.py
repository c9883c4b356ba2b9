"""A chat between its request and its answers: what the model's dialect makes of both.

`Demand` makes the constraints of answers: calls that must come or be right, reasoning first.
"""

import json
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, NamedTuple

from inference_service.api.chat.dialect import FORMATS, Dialect, dialect_of
from inference_service.api.chat.formats import harmony
from inference_service.api.chat.formats.lark import ANYTHING, CallGrammar, OfferedTool, Spelling, calls_schema
from inference_service.api.chat.formats.reading import AnswerReader, ThinkingMarks
from inference_service.api.chat.formats.values import SchemaUnsupportedError
from inference_service.api.chat.request import (
    ANY_ARGUMENTS,
    AnswerCalls,
    CallArguments,
    CallBegun,
    ChatRequest,
    ChatTool,
    Piece,
    TextPiece,
    Thought,
    naming,
)
from inference_service.api.requests.service import GenerationService
from inference_service.core.constraint import ByEnding, Constraint
from inference_service.core.request import (
    AnswerDelta,
    AnswerFinished,
    AnswerStarted,
    Message,
    PromptScores,
    Request,
)
from inference_service.driver.delivery import Sink
from inference_service.text.text import Text
from loramux_shared.faults import Finding, RequestInvalid
from loramux_shared.runtime import ReasoningParser, ToolParser

ConstraintAt = Callable[[str], Constraint | None]
"""Makes the constraint of answers to a prompt that ends with a text."""
WHERE = "tools"
"""The field by which a constraint of calls is refused."""
_GAP = 'gap: "\\n"{0,4}\n'


@dataclass(frozen=True)
class Demand:
    """The constraints of a request on the answers of a model."""

    dialect: Dialect
    text: Text

    def form(self, tools: Sequence[OfferedTool], *, several: bool) -> CallGrammar | None:
        """Return the grammar of calls of these tools in the model's own form.

        None: nobody knows that, or it cannot say what their schemas ask for.
        """
        try:
            return self._grammar(self.dialect.tool, tools, several=several)
        except SchemaUnsupportedError:
            return None

    def calls(
        self, tools: Sequence[OfferedTool], grammar: CallGrammar | None, end_of_prompt: str
    ) -> Constraint:
        """Return the constraint to calls of these tools behind reasoning; without a grammar, to one as JSON."""
        if grammar is None:
            plain = Constraint("json_schema", json.dumps(calls_schema(tools), ensure_ascii=False), WHERE)
            return self.behind_reasoning(plain, end_of_prompt)
        thought, rules = self._thought(end_of_prompt)
        text = f"start: {thought} {self._calls(grammar)}\n{rules}{grammar.rules}"
        return Constraint("lark", text, WHERE, composed=True)

    def constrain_text(self, tools: Sequence[OfferedTool], strict: Sequence[str]) -> ConstraintAt:
        """Return what makes the constraint to any text, in which what begins as a call is one of these tools.

        That is None where calls are not read; or no tool is strict, and the form has no mark that a call begins
        with, or models write more than its grammar says. Raise RequestInvalid where calls in the form of the
        model cannot be held to the schema of a strict tool.
        """
        try:
            grammar = self._grammar(self._form, tools, several=True)
        except SchemaUnsupportedError as error:
            if strict:
                raise self._fault_of_schema(error, "strict") from None
            return _no_constraint
        if grammar is None or not (strict or (grammar.begin and not grammar.narrow)):
            return _no_constraint
        around = self._around(grammar)

        def constraint(end_of_prompt: str) -> Constraint:
            thought, rules = ("", "") if self.dialect.is_harmony else self._thought(end_of_prompt)
            text = f"start: {thought} {around}{rules}{grammar.rules}"
            return Constraint("lark", text, WHERE, composed=True, optional=not strict)

        return constraint

    def constrain_to_calls_or(
        self, constraint: Constraint, tools: Sequence[OfferedTool], several: bool
    ) -> ConstraintAt:
        """Return what makes the constraint to calls of these tools or else to another one, behind reasoning.

        Raise RequestInvalid where calls cannot be held to the schemas.
        """
        try:
            grammar = self._grammar(self._form, tools, several=several)
        except SchemaUnsupportedError as error:
            raise self._fault_of_schema(error, constraint.where) from None
        if grammar is None:
            return partial(self.behind_reasoning, constraint)
        choice = f"({self._final} @answer | {self._calls(grammar)})"

        def either(end_of_prompt: str) -> Constraint:
            thought, rules = self._thought(end_of_prompt)
            return replace(constraint, around=f"start: {thought} {choice}\n{rules}{grammar.rules}")

        return either

    def behind_reasoning(self, constraint: Constraint, end_of_prompt: str) -> Constraint:
        """Return a constraint that the model may reason before, where it does."""
        thought, rules = self._thought(end_of_prompt)
        before = f"{thought} {self._final}".strip()
        return replace(constraint, around=f"start: {before} @answer\n{rules}") if before else constraint

    def _grammar(self, form: str, tools: Sequence[OfferedTool], *, several: bool) -> CallGrammar | None:
        """Return the grammar of calls in a format, None where none is known.

        Raise SchemaUnsupportedError for schemas without one.
        """
        known = FORMATS.get(form)
        return known.grammar(tools, self._spelling, several) if known else None

    @property
    def _form(self) -> str:
        return ToolParser.HERMES if self.dialect.tool is ToolParser.AUTO else self.dialect.tool

    @property
    def _final(self) -> str:
        """Return the beginning of an answer outside the model's notes; empty where it has none."""
        return self._spelling(f"{harmony.CHANNEL}final{harmony.MESSAGE}") if self.dialect.is_harmony else ""

    def _calls(self, grammar: CallGrammar) -> str:
        """Return what writes one block of calls, or as many as may follow each other."""
        begin = self._spelling(grammar.begin)
        between = f"({self._spelling(grammar.between)})? " if grammar.between else ""
        more = f" ({between}{begin} call){{0,{grammar.most - 1}}}" if grammar.most > 1 else ""
        return f"{begin} call{more}"

    def _fault_of_schema(self, error: SchemaUnsupportedError, asks: str) -> RequestInvalid:
        finding = Finding(
            code="E_CONSTRAINT",
            where=WHERE,
            expected=f"schemas that calls in the form {self._form} can follow",
            found=str(error),
            fix=f"Leave out {asks}, or what the schema asks for there.",
        )
        return RequestInvalid("the schemas of the tools cannot be enforced.", [finding])

    @property
    def _spelling(self) -> Spelling:
        return Spelling(self.text, self.dialect.tokens)

    def _thought(self, end_of_prompt: str) -> tuple[str, str]:
        """Return what writes reasoning, and its rules; both empty where there is none to be."""
        spelling = self._spelling
        if self.dialect.is_harmony:
            head, foot = spelling(f"{harmony.CHANNEL}analysis{harmony.MESSAGE}"), _next_message(spelling)
            ends, rule = spelling.until(harmony.END, "thought")
            return "thinks?", f"thinks: {head} {ends} {foot}\n{rule}"
        opened = self.dialect.opened(end_of_prompt)
        if opened is not None:
            ends, rule = spelling.until(opened.end, "thought")
            return f"{ends} gap", f"{rule}{_GAP}"
        if not self.dialect.thinking or self.dialect.closed(end_of_prompt):
            return "", ""
        each = [
            _thinks(thinking, f"thought{at}", spelling) for at, thinking in enumerate(self.dialect.thinking)
        ]
        thinks = " | ".join(words for words, _ in each)
        return "thinks?", f"thinks: ({thinks}) gap\n{''.join(rule for _, rule in each)}{_GAP}"

    def _around(self, grammar: CallGrammar) -> str:
        """Return text with calls in it, and its rules."""
        spelling = self._spelling
        if self.dialect.is_harmony:
            notes = f'{spelling(harmony.CHANNEL)} ("analysis" | "commentary") {spelling(harmony.MESSAGE)}'
            ends, rule = spelling.until(harmony.END, "noted")
            final = f'"final" {spelling(harmony.MESSAGE)} any'
            note = f"note: {notes} {ends} {_next_message(spelling)}\n{rule}any: {ANYTHING}\n"
            return f"note* {spelling(harmony.CHANNEL)} ({final} | call)\n{note}"
        if not grammar.begin:
            return '(call | prose)\nprose: /[^{\\[\\s](?s:.*)/ | ""\n'
        if spelling.is_special(grammar.begin):
            again = "".join(
                f" | {_anywhere(each, spelling)}" for each in self.dialect.thinking if each.anywhere
            )
            return f"(any ({spelling(grammar.begin)} call{again}))* any\nany: {ANYTHING}\n"
        ends, rule = spelling.until(grammar.begin, "until")
        return f"({ends} call)* any\n{rule}any: {ANYTHING}\n"


def _no_constraint(_end_of_prompt: str) -> None:
    return None


def _next_message(spelling: Spelling) -> str:
    return spelling(f"{harmony.START}assistant")


def _thinks(thinking: ThinkingMarks, name: str, spelling: Spelling) -> tuple[str, str]:
    ends, rule = spelling.until(thinking.end, name)
    return f"{spelling(thinking.begin)} {ends}", rule


def _anywhere(thinking: ThinkingMarks, spelling: Spelling) -> str:
    return f"{spelling(thinking.begin)} any {spelling(thinking.end)}"


UNKNOWN: Final = Dialect(ToolParser.AUTO, ReasoningParser.AUTO)


class AnswerPart(NamedTuple):
    """More of an answer, or its end, and what that says."""

    event: AnswerDelta | AnswerFinished
    pieces: list[Piece]


class Conversation:
    """One request and its n answers; faults name fields as the client does."""

    def __init__(self, service: GenerationService, chat: ChatRequest) -> None:
        self._service = service
        self._chat = chat
        self._tools = chat.callable_tools
        self._dialect = UNKNOWN
        """Dialect of the model that answers, once that is known."""
        self.request = chat.request()

    async def events(
        self, sink: Sink[AnswerPart] | None = None
    ) -> AsyncGenerator[AnswerStarted | PromptScores | AnswerPart]:
        """Yield what `GenerationService.generate` does, with the answers read; a sink takes parts as there.

        Raises:
            Fault: as it does.
        """
        readings: list[AnswerReader] = []

        def read(delta: AnswerDelta) -> AnswerPart:
            return AnswerPart(delta, self._released(readings[delta.index].push(delta.text)))

        deltas = None if sink is None else sink.mapped(read)
        with naming(self._chat.place):
            request, begin = await self._looked_up()
            with self._service.following_to_its_end(request):
                constraint = self._constraint(begin)
            if constraint is not None:
                request = replace(request, output=replace(request.output, constraint_by_ending=constraint))
            async with aclosing(self._service.generate(request, deltas)) as events:
                async for event in events:
                    match event:
                        case AnswerStarted():
                            opened = self._opened(event)
                            readings = [self._reading(opened) for _ in range(request.output.n)]
                            yield event
                        case PromptScores():
                            yield event
                        case AnswerDelta():
                            yield read(event)
                        case AnswerFinished():
                            yield AnswerPart(event, self._released(readings[event.index].finish()))

    async def prompt_tokens(self) -> int:
        """Return how many tokens the prompt has, also one that leaves no room for an answer.

        Raises:
            Fault: as `GenerationService.tokenize` does.
        """
        with naming(self._chat.place):
            request, _ = await self._looked_up()
            return len(await self._service.tokenize(request))

    async def _looked_up(self) -> tuple[Request, Callable[[], ConstraintAt] | None]:
        """Return the request as the model that answers it wants it, and what begins with its constraint."""
        served, defaults = await self._service.look_up(self.request)
        text = defaults.text or self._service.text
        self._dialect = dialect_of(text, defaults.template, self._service.parsers)
        begin = self._choose_constraint(text)
        end = self._dialect.form.end if self._chat.one_call and not self._chat.forced else ""
        original, sampling, output = self.request, self.request.sampling, self.request.output
        messages: list[Message] = [turn for turn in original.prompt.content if isinstance(turn, Mapping)]
        if end:
            sampling = replace(sampling, stop=(*sampling.stop, end))
        if special := self._dialect.tokens if self._tools else self._dialect.thinking_tokens:
            output = replace(output, shown_special_tokens=special)
        request = replace(
            original,
            model=replace(original.model, served=served),
            prompt=replace(original.prompt, content=self._dialect.turns(messages)),
            sampling=sampling,
            output=output,
        )
        return request, begin

    def _choose_constraint(self, text: Text) -> Callable[[], ConstraintAt] | None:
        """Return what begins with the constraint of the answers; None: there is none."""
        demand, several = Demand(self._dialect, text), not self._chat.one_call
        if self._chat.forced:
            tools = [_tool_for_grammar(tool) for tool in self._tools]
            grammar = demand.form(tools, several=several)
            if grammar is None:
                self._dialect = replace(self._dialect, tool=ToolParser.LLAMA3_JSON)  # which has no marks
            return lambda: partial(demand.calls, tools, grammar)
        strict = [tool.name for tool in self._tools if tool.strict]
        tools = [_tool_for_grammar(tool, any_arguments=not tool.strict) for tool in self._tools]
        constraint = self._chat.constraint
        if tools:
            if constraint is not None:
                return partial(demand.constrain_to_calls_or, constraint, tools, several)
            sampling = self.request.sampling
            restricted = sampling.allowed_token_ids is not None or sampling.bad_words
            return partial(demand.constrain_text, tools, strict) if strict or not restricted else None
        return None if constraint is None else lambda: partial(demand.behind_reasoning, constraint)

    def _constraint(self, begin: Callable[[], ConstraintAt] | None) -> ByEnding | None:
        """Return the constraint for each way in which a prompt can end."""
        if begin is None:
            return None
        constraint_at = begin()
        return ByEnding(tuple((end, constraint_at(end)) for end in (*self._dialect.endings, "")))

    def _opened(self, started: AnswerStarted) -> ThinkingMarks | None:
        """Return the reasoning that the answers continue with, if they do."""
        if not self._dialect.thinking:
            return None
        if self._chat.goes_on:
            return self._dialect.within(self._chat.turns[-1].content)
        return self._dialect.opened(started.text.end_of(started.prompt_token_ids))

    def _reading(self, opened: ThinkingMarks | None) -> AnswerReader:
        offered = {tool.name: tool.parameters or {} for tool in self._tools}
        return self._dialect.reading(AnswerCalls(offered, self._dialect.form.new_id), opened)

    def _released(self, pieces: Sequence[Piece]) -> list[Piece]:
        return [piece for piece in pieces if self._wants(piece)]

    def _wants(self, piece: Piece) -> bool:
        if isinstance(piece, Thought):
            return self._chat.shows_thoughts
        if isinstance(piece, TextPiece):
            return not self._chat.forced  # only a call that was cut off before its name
        return not (self._chat.one_call and isinstance(piece, CallBegun | CallArguments) and piece.index)


def _tool_for_grammar(tool: ChatTool, *, any_arguments: bool = False) -> OfferedTool:
    """Return a tool as a grammar knows it, with its schema or with any arguments."""
    return OfferedTool(tool.name, ANY_ARGUMENTS if any_arguments else tool.parameters or ANY_ARGUMENTS)
