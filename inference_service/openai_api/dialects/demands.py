"""Constraints of answers in the dialect of their model: calls that must come or be right, reasoning first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from inference_service.core.constraint import Constraint
from inference_service.openai_api.dialects import harmony
from inference_service.openai_api.dialects.frame import Thinking
from inference_service.openai_api.dialects.grammars import CallGrammar, CannotSayError, call_grammar
from inference_service.openai_api.dialects.lark import ANYTHING, Asked, Spelling, calls_schema
from inference_service.openai_api.dialects.table import Dialect
from inference_service.serving.text import Text
from loramux_shared.faults import Finding, RequestInvalid
from loramux_shared.parsers import ToolParser

WHERE = "tools"
"""The field by which a constraint of calls is refused."""
_GAP = 'gap: "\\n"{0,4}\n'


@dataclass(frozen=True)
class Demand:
    """What a request wants of the answers of a model."""

    dialect: Dialect
    text: Text

    def form(self, tools: Sequence[Asked], *, several: bool) -> CallGrammar | None:
        """Return the grammar of calls of these tools in the model's own form.

        None: nobody knows that, or it cannot say what their schemas ask for.
        """
        try:
            return call_grammar(self.dialect.tool, tools, self._spelling, several=several)
        except CannotSayError:
            return None

    def calls(self, tools: Sequence[Asked], grammar: CallGrammar | None, end_of_prompt: str) -> Constraint:
        """Return the constraint to calls of these tools behind reasoning; without a grammar, to one as JSON."""
        if grammar is None:
            plain = Constraint("json_schema", json.dumps(calls_schema(tools), ensure_ascii=False), WHERE)
            return self.behind_reasoning(plain, end_of_prompt)
        spelling = self._spelling
        thought, rules = self._thought(end_of_prompt)
        begin = spelling(grammar.begin)
        between = f"({spelling(grammar.between)})? " if grammar.between else ""
        more = f" ({between}{begin} call){{0,{grammar.most - 1}}}" if grammar.most > 1 else ""
        return Constraint("lark", f"start: {thought} {begin} call{more}\n{rules}{grammar.rules}", WHERE)

    def free(self, tools: Sequence[Asked], end_of_prompt: str) -> Constraint | None:
        """Return the constraint to any text, in which what begins as a call is one of these tools.

        None: calls are not read.

        Raises:
            RequestInvalid: calls in the form of the model cannot be held to the schema of a strict tool.
        """
        form = ToolParser.HERMES if self.dialect.tool is ToolParser.AUTO else self.dialect.tool
        try:
            grammar = call_grammar(form, tools, self._spelling, several=True)
        except CannotSayError as error:
            finding = Finding(
                code="E_CONSTRAINT",
                where=WHERE,
                expected=f"schemas that calls in the form {form} can be held to",
                found=str(error),
                fix="Leave out strict, or what the schema asks for there.",
            )
            raise RequestInvalid("the tools cannot be called strictly.", [finding]) from None
        if grammar is None:
            return None
        thought, rules = ("", "") if self.dialect.is_harmony else self._thought(end_of_prompt)
        return Constraint("lark", f"start: {thought} {self._around(grammar)}{rules}{grammar.rules}", WHERE)

    def behind_reasoning(self, constraint: Constraint, end_of_prompt: str) -> Constraint:
        """Return a constraint that the model may reason before, where it does."""
        thought, rules = self._thought(end_of_prompt)
        if self.dialect.is_harmony:
            thought += f" {self._spelling(f'{harmony.CHANNEL}final{harmony.MESSAGE}')}"
        return replace(constraint, before=f"before: {thought}\n{rules}") if thought else constraint

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


def _next_message(spelling: Spelling) -> str:
    return spelling(f"{harmony.START}assistant")


def _thinks(thinking: Thinking, name: str, spelling: Spelling) -> tuple[str, str]:
    ends, rule = spelling.until(thinking.end, name)
    return f"{spelling(thinking.begin)} {ends}", rule


def _anywhere(thinking: Thinking, spelling: Spelling) -> str:
    return f"{spelling(thinking.begin)} any {spelling(thinking.end)}"
