"""What a call may be in each form, as a grammar: of offered tools, with arguments that keep to their schemas.

A form that cannot say what a schema asks for has no grammar; such a call is demanded as plain JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from inference_service.chat.formats import gemma, harmony, listed, llama, tagged
from inference_service.chat.formats.arguments import arguments, is_open, texts
from inference_service.chat.formats.gemma_rules import GemmaRules
from inference_service.chat.formats.lark import (
    Asked,
    Spelling,
    calls_schema,
    either,
    json_of,
    list_schema,
    quoted,
    row,
)
from loramux_shared.parsers import ToolParser

MOST_CALLS: Final = 16
"""Of one answer that must call: a model that does not know when to end would go on."""
_NEWLINE: Final = 'nl: "\\n"?\n'


@dataclass(frozen=True)
class CallGrammar:
    """A block of calls in a form."""

    begin: str
    """The mark that it begins with; empty where an answer does."""
    rules: str
    """With one `call`, which is all that stands behind the mark."""
    most: int = 1
    """Blocks that may follow each other."""
    between: str = ""
    narrow: bool = False
    """Whether models write calls that are read and that this does not say: with values as Python has them, or
    behind another mark."""


Maker = Callable[[Sequence[Asked], Spelling, bool], CallGrammar | None]
"""Makes the grammar of calls of tools; of several where that is so."""


def call_grammar(
    form: ToolParser, tools: Sequence[Asked], spelling: Spelling, *, several: bool
) -> CallGrammar | None:
    """Return the grammar of calls in a form; None where the form has none.

    Raises:
        CannotSayError: it has none for these schemas.
    """
    maker = _MAKERS.get(form)
    return maker(tools, spelling, several) if maker else None


def _hermes(tools: Sequence[Asked], spelling: Spelling, several: bool) -> CallGrammar:
    rules = f"call: nl body nl {spelling(tagged.END)}\nbody: {json_of(calls_schema(tools))}\n{_NEWLINE}"
    return CallGrammar(tagged.BEGIN, rules, MOST_CALLS if several else 1, "\n")


def _granite(tools: Sequence[Asked], spelling: Spelling, several: bool) -> CallGrammar:
    rules = f"call: {json_of(list_schema(tools, MOST_CALLS if several else 1))}\n"
    return CallGrammar(listed.GRANITE, rules, narrow=spelling.is_special(tagged.BEGIN))


def _phi(tools: Sequence[Asked], spelling: Spelling, several: bool) -> CallGrammar:
    rules = f"body: {json_of(list_schema(tools, MOST_CALLS if several else 1))}\n"
    if spelling.is_special(listed.GRANITE):
        return CallGrammar(listed.GRANITE, f"call: body {spelling(listed.PHI_END)}\n{rules}")
    return CallGrammar(listed.PHI_WORD, f"call: body\n{rules}")


def _mistral(tools: Sequence[Asked], spelling: Spelling, several: bool) -> CallGrammar:
    if not spelling.is_special(listed.ARGS):
        rules = f'call: " "? body\nbody: {json_of(list_schema(tools, MOST_CALLS if several else 1))}\n'
        return CallGrammar(listed.MISTRAL, rules)
    own_id = f"({spelling(listed.ID)} /[a-zA-Z0-9]{{9}}/)? " if spelling.is_special(listed.ID) else ""
    each = [f"{spelling(tool.name)} {own_id}{spelling(listed.ARGS)} {json_of(tool.schema)}" for tool in tools]
    return CallGrammar(listed.MISTRAL, either(each), MOST_CALLS if several else 1)


def _llama(tools: Sequence[Asked], spelling: Spelling, several: bool) -> CallGrammar:
    del spelling, several  # its template renders one call
    return CallGrammar("", f"call: {json_of(calls_schema(tools, 'parameters'))}\n")


def _pythonic(tools: Sequence[Asked], spelling: Spelling, several: bool) -> CallGrammar:
    del spelling
    more = f'(", " one){{0,{MOST_CALLS - 1}}}' if several else ""
    return CallGrammar("", f'call: "[" one {more} "]"\n{_python(tools)}')


def _olmo(tools: Sequence[Asked], spelling: Spelling, several: bool) -> CallGrammar:
    more = f'("\\n" one){{0,{MOST_CALLS - 1}}}' if several else ""
    end = spelling("\n" + llama.OLMO_END)
    return CallGrammar(llama.OLMO, f'call: "\\n" one {more} {end}\n{_python(tools)}', narrow=True)


def _fenced(tools: Sequence[Asked], spelling: Spelling, several: bool) -> CallGrammar:
    more = f'("\\n" one){{0,{MOST_CALLS - 1}}}' if several else ""
    end = spelling("\n" + llama.FENCE_END)
    return CallGrammar(llama.FENCE, f"call: one {more} {end}\n{_python(tools)}", narrow=True)


def _python(tools: Sequence[Asked]) -> str:
    """Return the rules of one call as Python has it; its values are JSON, which is read as well."""
    rules = [either([f"{quoted(tool.name + '(')} a{at} {quoted(')')}" for at, tool in enumerate(tools)], "one")]
    for at, tool in enumerate(tools):
        if is_open(tool.schema):
            word = f"a{at}_w"
            rules.append(f'a{at}: ({word} (", " {word})*)?\n{word}: /[a-z_][a-zA-Z0-9_]*=/ {word}_v\n')
            rules.append(f"{word}_v: {json_of({})}\n")
            continue
        parts = [
            (f"{quoted(name + '=')} a{at}_v{number}", needed)
            for number, (name, _, needed) in enumerate(arguments(tool.schema))
        ]
        rules.append(row(f"a{at}", parts, ", "))
        rules += [
            f"a{at}_v{number}: {tool.leaf(schema)}\n"
            for number, (_, schema, _) in enumerate(arguments(tool.schema))
        ]
    return "".join(rules)


def _xml(tools: Sequence[Asked], spelling: Spelling, several: bool) -> CallGrammar:
    closing = "\n</parameter>\n"
    ends, rule_of_text = spelling.until(closing, "text")
    names = [quoted(f"{tagged.FUNCTION}{tool.name}>\n") + f" a{at}" for at, tool in enumerate(tools)]
    rules = [
        f"call: nl one {quoted('</function>')} nl {spelling(tagged.END)}\n{_NEWLINE}{rule_of_text}",
        either(names, "one"),
    ]
    for at, tool in enumerate(tools):
        if is_open(tool.schema):
            rules.append(f'a{at}: ("<parameter=" /[^>\\n]+/ ">\\n" {ends})*\n')
            continue
        parts = []
        for number, (name, schema, needed) in enumerate(arguments(tool.schema)):
            rule = f"a{at}_v{number}"
            parts.append((quoted(f"<parameter={name}>\n") + f" {rule}", needed))
            choices = texts(schema)
            if choices is None:
                rules.append(f"{rule}: {rule}_j {quoted(closing)}\n{rule}_j: {tool.leaf(schema)}\n")
            else:
                told = [quoted(choice + closing) for choice in choices] or [ends]
                rules.append(either(told, rule))
        rules.append(row(f"a{at}", parts))
    return CallGrammar(tagged.BEGIN, "".join(rules), MOST_CALLS if several else 1, "\n")


def _harmony(tools: Sequence[Asked], spelling: Spelling, several: bool) -> CallGrammar:
    del several  # a call ends the answer
    each = [
        f"{spelling(f'commentary to={harmony.FUNCTIONS}{tool.name} {harmony.CONSTRAIN}json{harmony.MESSAGE}')} "
        f"{json_of(tool.schema)}"
        for tool in tools
    ]
    return CallGrammar(harmony.CHANNEL, either(each))


def _gemma(form: gemma.Form) -> Maker:
    def make(tools: Sequence[Asked], spelling: Spelling, several: bool) -> CallGrammar:
        writer = GemmaRules(form, spelling)
        names = [f"{quoted(f'call:{tool.name}')} a{at}" for at, tool in enumerate(tools)]
        rules = [f"call: one {spelling(form.end)}\n", either(names, "one")]
        for at, tool in enumerate(tools):
            rules += writer.members(f"a{at}", tool, tool.schema)
        return CallGrammar(form.begin, "".join((*rules, writer.shared)), MOST_CALLS if several else 1)

    return make


_MAKERS: Final[Mapping[ToolParser, Maker]] = {
    ToolParser.HERMES: _hermes,
    ToolParser.QWEN3_CODER: _xml,
    ToolParser.LLAMA3_JSON: _llama,
    ToolParser.PYTHONIC: _pythonic,
    ToolParser.OLMO3: _olmo,
    ToolParser.TOOL_CODE: _fenced,
    ToolParser.MISTRAL: _mistral,
    ToolParser.GRANITE: _granite,
    ToolParser.PHI4: _phi,
    ToolParser.GEMMA4: _gemma(gemma.GEMMA),
    ToolParser.FUNCTIONGEMMA: _gemma(gemma.FUNCTION),
    ToolParser.HARMONY: _harmony,
}
