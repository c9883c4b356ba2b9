"""What a call may be in each form, as a grammar: of offered tools, with arguments that keep to their schemas.

A form that cannot say what a schema asks for has no grammar; such a call is demanded as plain JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from inference_service.openai_api.dialects import gemma, harmony, listed, llama, tagged
from inference_service.openai_api.dialects.lark import (
    ANYTHING,
    Asked,
    Spelling,
    calls_schema,
    json_of,
    list_schema,
    quoted,
    row,
)
from inference_service.openai_api.dialects.values import types_of
from loramux_shared.parsers import ToolParser

MOST_CALLS: Final = 16
"""Of one answer that must call: a model that does not know when to end would go on."""
SAID_ABOUT: Final = frozenset(
    {"type", "description", "title", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment"}
)
"""Keywords that ask nothing of a text but that it is one."""
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
    """Whether models write calls that are read and that this does not say: values as Python has them."""


Maker = Callable[[Sequence[Asked], Spelling, bool], CallGrammar | None]
"""Makes the grammar of calls of tools; of several where that is so."""


class CannotSayError(Exception):
    """A schema asks for what a form cannot hold a model to; the message names it."""


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
    del spelling
    rules = f"call: {json_of(list_schema(tools, MOST_CALLS if several else 1))}\n"
    return CallGrammar(listed.GRANITE, rules)


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
    return CallGrammar(listed.MISTRAL, _either(each), MOST_CALLS if several else 1)


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
    rules = [
        _either([f"{quoted(tool.name + '(')} a{at} {quoted(')')}" for at, tool in enumerate(tools)], "one")
    ]
    for at, tool in enumerate(tools):
        if _is_open(tool.schema):
            word = f"a{at}_w"
            rules.append(f'a{at}: ({word} (", " {word})*)?\n{word}: /[a-z_][a-zA-Z0-9_]*=/ {word}_v\n')
            rules.append(f"{word}_v: {json_of({})}\n")
            continue
        parts = [
            (f"{quoted(name + '=')} a{at}_v{number}", needed)
            for number, (name, _, needed) in enumerate(_arguments(tool.schema))
        ]
        rules.append(row(f"a{at}", parts, ", "))
        rules += [
            f"a{at}_v{number}: {tool.leaf(schema)}\n"
            for number, (_, schema, _) in enumerate(_arguments(tool.schema))
        ]
    return "".join(rules)


def _xml(tools: Sequence[Asked], spelling: Spelling, several: bool) -> CallGrammar:
    closing = "\n</parameter>\n"
    ends, rule_of_text = spelling.until(closing, "text")
    names = [quoted(f"{tagged.FUNCTION}{tool.name}>\n") + f" a{at}" for at, tool in enumerate(tools)]
    rules = [
        f"call: nl one {quoted('</function>')} nl {spelling(tagged.END)}\n{_NEWLINE}{rule_of_text}",
        _either(names, "one"),
    ]
    for at, tool in enumerate(tools):
        if _is_open(tool.schema):
            rules.append(f'a{at}: ("<parameter=" /[^>\\n]+/ ">\\n" {ends})*\n')
            continue
        parts = []
        for number, (name, schema, needed) in enumerate(_arguments(tool.schema)):
            rule = f"a{at}_v{number}"
            parts.append((quoted(f"<parameter={name}>\n") + f" {rule}", needed))
            choices = _texts(schema)
            if choices is None:
                rules.append(f"{rule}: {rule}_j {quoted(closing)}\n{rule}_j: {tool.leaf(schema)}\n")
            else:
                told = [quoted(choice + closing) for choice in choices] or [ends]
                rules.append(_either(told, rule))
        rules.append(row(f"a{at}", parts))
    return CallGrammar(tagged.BEGIN, "".join(rules), MOST_CALLS if several else 1, "\n")


def _harmony(tools: Sequence[Asked], spelling: Spelling, several: bool) -> CallGrammar:
    del several  # a call ends the answer
    each = [
        f"{spelling(f'commentary to={harmony.FUNCTIONS}{tool.name} {harmony.CONSTRAIN}json{harmony.MESSAGE}')} "
        f"{json_of(tool.schema)}"
        for tool in tools
    ]
    return CallGrammar(harmony.CHANNEL, _either(each))


def _gemma(form: gemma.Form) -> Maker:
    def make(tools: Sequence[Asked], spelling: Spelling, several: bool) -> CallGrammar:
        writer = _GemmaRules(form, spelling)
        names = [f"{quoted(f'call:{tool.name}')} a{at}" for at, tool in enumerate(tools)]
        rules = [f"call: one {spelling(form.end)}\n", _either(names, "one")]
        for at, tool in enumerate(tools):
            rules += writer.members(f"a{at}", tool, tool.schema)
        return CallGrammar(form.begin, "".join((*rules, writer.text)), MOST_CALLS if several else 1)

    return make


class _GemmaRules:
    """Writes the rules of Gemma's values; names stand in alphabetical order, as its template has them."""

    def __init__(self, form: gemma.Form, spelling: Spelling) -> None:
        self._quote, self._spelling = form.quote, spelling
        self._ends, self.text = spelling.until(form.quote, "text")

    def members(self, name: str, tool: Asked, schema: Mapping[str, Any]) -> Iterator[str]:
        """Yield the rules of an object."""
        if _is_open(schema):
            if not self._spelling.is_special(self._quote):
                raise CannotSayError("arguments that are not named")
            yield f'{name}: "{{" {name}_o ({self._spelling(self._quote)} {name}_o)*\n{name}_o: {ANYTHING}\n'
            return
        arguments = sorted(_arguments(schema), key=lambda each: each[0].lower())
        parts = [(f"{quoted(key + ':')} {name}_v{at}", needed) for at, (key, _, needed) in enumerate(arguments)]
        yield f'{name}: "{{" {name}_m "}}"\n'
        yield row(f"{name}_m", parts, ",")
        for at, (_, own, _) in enumerate(arguments):
            yield from self.value(f"{name}_v{at}", tool, own)

    def value(self, name: str, tool: Asked, schema: Any) -> Iterator[str]:
        """Yield the rules of a value."""
        types, choices = types_of(schema), _texts(schema)
        if choices is not None:
            told = [self._spelling(self._quote + choice + self._quote) for choice in choices]
            yield _either(told or [f"{self._spelling(self._quote)} {self._ends}"], name)
        elif types and types <= {"integer", "number", "boolean", "null"}:
            yield f"{name}: {tool.leaf(schema)}\n"
        elif types == {"object"} and not _asks_more(schema, {"properties", "required", "additionalProperties"}):
            yield from self.members(name, tool, schema)
        elif types == {"array"} and not _asks_more(schema, {"items"}) and "items" in schema:
            yield f'{name}: "[" ({name}_i ("," {name}_i)*)? "]"\n'
            yield from self.value(f"{name}_i", tool, schema["items"])
        else:
            raise CannotSayError(f"a value of {_shown(schema)}")


def _either(choices: Sequence[str], name: str = "call") -> str:
    """Return the rules of a choice; each has one of its own, for JSON stands alone in a rule."""
    names = [f"{name}_c{at}" for at in range(len(choices))]
    rules = [f"{name}: {' | '.join(names)}\n"]
    for own, choice in zip(names, choices, strict=True):
        words, found, schema = choice.partition("%json ")
        rules.append(f"{own}: {words}{own}_j\n{own}_j: {found}{schema}\n" if found else f"{own}: {choice}\n")
    return "".join(rules)


def _is_open(schema: Mapping[str, Any]) -> bool:
    """True where a schema does not say which arguments there are."""
    return "properties" not in schema and schema.get("additionalProperties") is not False


def _properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    found = schema.get("properties")
    return found if isinstance(found, Mapping) else {}


def _arguments(schema: Mapping[str, Any]) -> list[tuple[str, Any, bool]]:
    """Return the arguments that a schema names, each with whether it must be there; others there are none.

    Raises:
        CannotSayError: it asks for more of them together.
    """
    if _asks_more(
        schema, {"properties", "required", "additionalProperties", "$defs", "definitions", "$schema"}
    ):
        raise CannotSayError
    needed = schema.get("required")
    required = set(needed) if isinstance(needed, list) else set()
    if not required <= _properties(schema).keys():
        raise CannotSayError("required arguments that properties does not have")
    return [(name, own, name in required) for name, own in _properties(schema).items()]


def _asks_more(schema: Any, known: set[str]) -> bool:
    return not isinstance(schema, Mapping) or bool(schema.keys() - SAID_ABOUT - known)


def _texts(schema: Any) -> list[str] | None:
    """Return which texts a value may be, none for any; None where it is no text that stands as it is.

    Raises:
        CannotSayError: it is a text of which more is asked.
    """
    if not schema:
        return []
    if "string" not in types_of(schema):
        return None
    if isinstance(schema, Mapping) and types_of(schema) == {"string"}:
        values = schema.get("enum", [schema["const"]] if "const" in schema else [])
        if not _asks_more(schema, {"enum", "const"}) and all(isinstance(value, str) for value in values):
            if any("\n" in value or "<" in value for value in values):
                raise CannotSayError("a text with a line break or <")
            return list(values)
    if _is_any_text(schema):
        return []
    raise CannotSayError(f"a text of {_shown(schema)}")


def _shown(schema: Any) -> str:
    return json.dumps(schema, ensure_ascii=False)[:200]


def _is_any_text(schema: Any) -> bool:
    """True where any text is a value: of alternatives, one takes all texts, and the others are mere types."""
    if not isinstance(schema, Mapping):
        return False
    choices = schema.get("anyOf", schema.get("oneOf"))
    if isinstance(choices, list):
        return not _asks_more(schema, {"anyOf", "oneOf"}) and all(map(_is_a_type, choices))
    return _is_a_type(schema)


def _is_a_type(schema: Any) -> bool:
    return isinstance(schema, Mapping) and "type" in schema and not _asks_more(schema, set())


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
