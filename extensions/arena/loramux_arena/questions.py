"""The questions of an arena, as they stand in a file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loramux.records import Prompt
from loramux.requests import generate_request
from loramux_shared.faults import Finding, RequestInvalid
from loramux_shared.untrusted_json import parse_json

KINDS: Final = ("prompt", "messages", "text")
"""Exactly one of them says what is asked."""
FIELDS: Final = (*KINDS, "reference", "rubric", "id", "tags", "note")
"""note is for who wrote the file, and nobody reads it."""
EXPECTED: Final = '{"prompt": TEXT}, {"messages": [{"role", "content"}, ...]} or {"text": TEXT}'
EXCERPT: Final = 80
"""Characters of a line that a finding repeats."""


@dataclass(frozen=True)
class Question:
    """A question for all versions."""

    id: str
    """The file's own, else the number of the line."""
    prompt: Prompt
    """Prompt as it is sent."""
    reference: str | None = None
    """The right answer; of what is no text in the file, its JSON."""
    rubric: str = ""
    """Criteria of a good answer, for a judge."""
    tags: tuple[str, ...] = ()

    @property
    def as_text(self) -> str:
        """The prompt, for people and judges: of several turns each with its role."""
        if isinstance(self.prompt, str):
            return self.prompt
        turns = [turn for turn in self.prompt if isinstance(turn, Mapping)]
        contents = [str(turn.get("content") or "") for turn in turns]
        if len(turns) == 1:
            return contents[0]
        return "\n\n".join(f"{turn['role']}: {text}" for turn, text in zip(turns, contents, strict=True))


class _Bad(Exception):
    """Why a line is no question."""

    def __init__(self, code: str, expected: str, found: object, field: str = "") -> None:
        super().__init__(expected)
        self.code, self.expected, self.field = code, expected, field
        self.found = str(found)[:EXCERPT]


def read_questions(path: Path, system: str = "") -> list[Question]:
    """Read a question per line: what a user says, or a JSON object (`FIELDS`); empty lines are passed over.

    ``prompt``, and a line that is no object, is a user's turn for the chat template, behind the turn of system
    where there is one; ``messages`` are all turns, and ``text`` is completed as it stands.

    Raises:
        RequestInvalid: the file cannot be read or asks nothing; a finding per line that is no question.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RequestInvalid(f"cannot read the prompts of {path}: {why}") from error
    findings: list[Finding] = []
    found: dict[str, Question] = {}
    where: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            question = _question(line.strip(), number, system)
            _must_be_new(question.id, where)
        except _Bad as bad:
            place = f"line {number}" + (f", {bad.field}" if bad.field else "")
            findings.append(Finding(code=bad.code, where=place, expected=bad.expected, found=bad.found))
        else:
            found[question.id] = question
            where[question.id] = number
    if findings:
        raise RequestInvalid(f"{path}: {len(findings)} of its lines cannot be asked", findings)
    if not found:
        raise RequestInvalid(f"{path} asks nothing; expected a prompt per line, or {EXPECTED}")
    return list(found.values())


def _must_be_new(name: str, where: Mapping[str, int]) -> None:
    if name in where:
        raise _Bad("E_BAD_FIELD", f"another than line {where[name]} has", name, "id")


def _question(line: str, number: int, system: str) -> Question:
    if not line.startswith("{"):
        return Question(str(number), _turns(line, system))
    try:
        fields: dict[str, Any] = parse_json(line)
    except ValueError as error:
        raise _Bad("E_BAD_FIELD", "JSON, as the line begins with {", error) from error
    if unknown := [name for name in fields if name not in FIELDS]:
        raise _Bad("E_UNKNOWN_FIELD", f"one of {', '.join(FIELDS)}", unknown[0])
    present = [name for name in KINDS if name in fields]
    if len(present) != 1:
        raise _Bad("E_MISSING_FIELD", f"one of {', '.join(KINDS)}", " and ".join(present) or "none of them")
    question = Question(
        id=_text(fields, "id", str(number)) or str(number),
        prompt=_prompt(present[0], fields[present[0]], system),
        reference=_reference(fields.get("reference")),
        rubric=_text(fields, "rubric", ""),
        tags=_tags(fields.get("tags", [])),
    )
    try:
        generate_request("", question.prompt, {})
    except RequestInvalid as fault:
        raise _Bad("E_BAD_FIELD", EXPECTED, fault.findings[0].found, present[0]) from fault
    return question


def _prompt(kind: str, value: Any, system: str) -> Prompt:
    if kind == "messages":
        if not isinstance(value, list) or not value or not all(map(_is_turn, value)):
            raise _Bad("E_BAD_FIELD", "a list of turns, each with role and content", json.dumps(value), kind)
        if system and value[0]["role"] == "system":
            raise _Bad("E_BAD_FIELD", "no turn of the system's beside --system", value[0]["content"], kind)
        return [*_system(system), *value]
    if not isinstance(value, str) or not value.strip():
        raise _Bad("E_BAD_FIELD", "text", json.dumps(value), kind)
    if kind == "prompt":
        return _turns(value, system)
    if system:
        raise _Bad("E_BAD_FIELD", "prompt or messages beside --system", "text, which no template renders", kind)
    return value


def _turns(text: str, system: str) -> list[Mapping[str, Any]]:
    return [*_system(system), {"role": "user", "content": text}]


def _system(system: str) -> list[Mapping[str, Any]]:
    return [{"role": "system", "content": system}] if system else []


def _is_turn(turn: Any) -> bool:
    match turn:
        case {"role": str(), "content": str()} | {"role": str(), "tool_calls": [*_]}:
            return True
    return False


def _reference(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _text(fields: Mapping[str, Any], name: str, default: str) -> str:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _Bad("E_BAD_FIELD", "text", json.dumps(value), name)
    return str(value)


def _tags(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(tag, str) for tag in value):
        raise _Bad("E_BAD_FIELD", "a list of texts", json.dumps(value), "tags")
    return tuple(dict.fromkeys(value))


def with_reference(questions: Sequence[Question]) -> list[Question]:
    """Return those whose right answer is known."""
    return [question for question in questions if question.reference is not None]
