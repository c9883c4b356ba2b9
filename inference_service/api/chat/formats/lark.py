"""Grammars of answers, in llguidance's Lark: texts with special tokens in them, JSON, and parts in a row.

Source: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from inference_service.text.text import Text

WHITESPACE: Final = r"\n?[ \t]{0,40}"
"""Between the parts of JSON: a model that is unsure of what comes next would else write spaces for ever."""
ANYTHING: Final = "/(?s:.*)/"
"""Any text; special tokens are none."""


@dataclass(frozen=True)
class OfferedTool:
    """A tool that a grammar lets a model call."""

    name: str
    schema: Mapping[str, Any]
    """Schema of its arguments."""

    def leaf(self, schema: Any) -> str:
        """Return the rule of a value of a part of the schema, as JSON."""
        if '"$ref"' in json.dumps(schema):
            root = f"#/$defs/{self.name}"
            return json_of({**moved(schema, root), "$defs": {self.name: moved(dict(self.schema), root)}})
        return json_of(schema)


class Spelling:
    """Texts as the tokenizer of a model spells them: where it has special tokens, these are meant."""

    def __init__(self, text: Text, marks: Sequence[str]) -> None:
        """Take marks that may be special tokens of a text."""
        found = {mark: text.token_id(mark) for mark in marks}
        self._special = {mark: token for mark, token in found.items() if token in text.vocabulary.special}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None

    def is_special(self, mark: str) -> bool:
        """True where a mark is one special token."""
        return mark in self._special

    def __call__(self, words: str) -> str:
        """Return what is to be written there, as Lark has it; empty where nothing is."""
        parts = self._pattern.split(words) if self._pattern else [words]
        return " ".join(
            f"<[{self._special[part]}]>" if part in self._special else quoted(part) for part in parts if part
        )

    def until(self, end: str, name: str) -> tuple[str, str]:
        """Return what writes any text up to an end, with it, and the rule that this needs."""
        if self.is_special(end):
            return f"{name} {self(end)}", f"{name}: {ANYTHING}\n"
        return name, f"{name}[lazy]: /(?s:.*){_in_regex(end)}/\n"


def quoted(text: str) -> str:
    """Return a text as Lark has it."""
    return json.dumps(text, ensure_ascii=False)


def _in_regex(text: str) -> str:
    return re.escape(text).replace("/", r"\/").replace("\n", "n")


def json_of(schema: Any) -> str:
    """Return the rule of JSON of a schema."""
    own = {**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}} if isinstance(schema, dict) else schema
    return f"%json {json.dumps(own, ensure_ascii=False)}"


def calls_schema(tools: Sequence[OfferedTool], arguments: str = "arguments") -> dict[str, Any]:
    """Return the schema of a call of one of these tools: ``{"name": ..., "arguments": ...}``."""
    definitions = {tool.name: moved(dict(tool.schema), f"#/$defs/{tool.name}") for tool in tools}
    return {"$defs": definitions, "anyOf": [_call_schema(tool.name, arguments) for tool in tools]}


def list_schema(tools: Sequence[OfferedTool], most: int) -> dict[str, Any]:
    """Return the schema of a list of calls."""
    union = calls_schema(tools)
    items = {"anyOf": union["anyOf"]}
    return {"$defs": union["$defs"], "type": "array", "items": items, "minItems": 1, "maxItems": most}


def _call_schema(name: str, arguments: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, arguments: {"$ref": f"#/$defs/{name}"}},
        "required": ["name", arguments],
        "additionalProperties": False,
    }


def moved(schema: Any, root: str) -> Any:
    """Return a schema whose references find their place below another root."""
    if isinstance(schema, list):
        return [moved(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    own = {key: moved(value, root) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        own["$ref"] = root + reference[1:]
    return own


def row(name: str, parts: Sequence[tuple[str, bool]], separator: str = "") -> str:
    """Return the rules of parts in their order, each with whether it must be there, and a separator between.

    The rule that they begin with is called name.
    """
    rules = []
    between = f"{quoted(separator)} " if separator else ""
    for at, (part, needed) in enumerate(parts):
        first, later = (name if not at else f"{name}_b{at}"), f"{name}_s{at}"
        skip = "" if needed else f" | {name}_b{at + 1}"
        rules.append(f"{first}: {part} {name}_s{at + 1}{skip}")
        if at:
            rules.append(
                f"{later}: {between}{part} {name}_s{at + 1}" + ("" if needed else f" | {name}_s{at + 1}")
            )
    end = len(parts)
    rules.append(f'{name}_b{end}: ""' if end else f'{name}: ""')
    rules.append(f'{name}_s{end}: ""')
    return "\n".join(rules) + "\n"


def either(choices: Sequence[str], name: str = "call") -> str:
    """Return the rules of a choice; each has one of its own, for JSON stands alone in a rule."""
    names = [f"{name}_c{at}" for at in range(len(choices))]
    rules = [f"{name}: {' | '.join(names)}\n"]
    for own, choice in zip(names, choices, strict=True):
        words, found, schema = choice.partition("%json ")
        rules.append(f"{own}: {words}{own}_j\n{own}_j: {found}{schema}\n" if found else f"{own}: {choice}\n")
    return "".join(rules)


MOST_CALLS: Final = 16
"""Most calls of one answer that must call: a model that does not know when to end would continue."""


@dataclass(frozen=True)
class CallGrammar:
    """The grammar of a block of calls in a format: of offered tools, with arguments that follow their
    schemas.
    """

    begin: str
    """The mark that it begins with; empty where an answer does."""
    rules: str
    """Rules with one `call`, which is all that stands behind the mark."""
    most: int = 1
    """Blocks that may follow each other."""
    between: str = ""
    narrow: bool = False
    """True if models write calls that are read and that the rules do not have: with values as Python has them,
    or behind another mark.
    """
