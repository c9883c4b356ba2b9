"""Constraints of answers in the dialect of their model: calls that must come or be right, reasoning first."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from inference_service.chat.dialect import FORMATS, Dialect
from inference_service.chat.formats import harmony
from inference_service.chat.formats.lark import ANYTHING, CallGrammar, OfferedTool, Spelling, calls_schema
from inference_service.chat.formats.reading import ThinkingMarks
from inference_service.chat.formats.values import CannotSayError
from inference_service.core.constraint import Constraint
from inference_service.text.text import Text
from loramux_shared.faults import Finding, RequestInvalid
from loramux_shared.runtime import ToolParser

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
        except CannotSayError:
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

    def free(self, tools: Sequence[OfferedTool], strict: Sequence[str]) -> ConstraintAt:
        """Return what makes the constraint to any text, in which what begins as a call is one of these tools.

        That is None where calls are not read; or no tool is strict, and the form has no mark that a call begins
        with, or models write more than its grammar says.

        Raises:
            RequestInvalid: calls in the form of the model cannot be held to the schema of a strict tool.
        """
        try:
            grammar = self._grammar(self._form, tools, several=True)
        except CannotSayError as error:
            if strict:
                raise self._unsaid(error, "strict") from None
            return _no_constraint
        if grammar is None or not (strict or (grammar.begin and not grammar.narrow)):
            return _no_constraint
        around = self._around(grammar)

        def constraint(end_of_prompt: str) -> Constraint:
            thought, rules = ("", "") if self.dialect.is_harmony else self._thought(end_of_prompt)
            text = f"start: {thought} {around}{rules}{grammar.rules}"
            return Constraint("lark", text, WHERE, composed=True, optional=not strict)

        return constraint

    def calls_or(self, constraint: Constraint, tools: Sequence[OfferedTool], several: bool) -> ConstraintAt:
        """Return what makes the constraint to calls of these tools or else to another one, behind reasoning.

        Raises:
            RequestInvalid: calls in the form of the model cannot be held to the schemas.
        """
        try:
            grammar = self._grammar(self._form, tools, several=several)
        except CannotSayError as error:
            raise self._unsaid(error, constraint.where) from None
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

    def _grammar(self, form: ToolParser, tools: Sequence[OfferedTool], *, several: bool) -> CallGrammar | None:
        """Return the grammar of calls in a format; None where none is known.

        Raises:
            CannotSayError: it has none for these schemas.
        """
        known = FORMATS.get(form)
        return known.grammar(tools, self._spelling, several) if known else None

    @property
    def _form(self) -> ToolParser:
        """The form in which calls are read."""
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

    def _unsaid(self, error: CannotSayError, asks: str) -> RequestInvalid:
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
