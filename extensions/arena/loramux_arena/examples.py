"""The examples of a comparison: prompts with their right answers, a JSON object on each line of a file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loramux.records import Prompt
from loramux.requests import generate_request
from loramux_shared.faults import Finding, RequestInvalid
from loramux_shared.untrusted_json import JsonInvalid, parse_json

KINDS: Final = ("prompt", "messages", "text")
"""Fields of which an example has exactly one: a user's message, all turns, or a text that is completed."""
FIELDS: Final = (*KINDS, "reference", "id")
EXPECTED: Final = '{"prompt": TEXT, "reference": TEXT}, or with "messages" or "text" instead of "prompt"'
MAX_EXCERPT_CHARACTERS: Final = 80
"""Part of a line that a finding repeats."""


@dataclass(frozen=True)
class Example:
    """A prompt and its right answer."""

    id: str
    """Name in reports: the file's own, else the number of the line."""
    prompt: Prompt
    reference: str
    """The right answer; of a value that is no text, its JSON."""


def read_examples(path: Path) -> list[Example]:
    """Read the examples of a file; empty lines are passed over.

    Raises:
        RequestInvalid: the file cannot be read or has no example; a finding for each line that is none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RequestInvalid(f"cannot read the examples of {path}: {why}") from error
    findings: list[Finding] = []
    found: dict[str, Example] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                example = _example(line, number)
                if example.id in found:
                    raise _bad("id", "another id than an earlier line has", example.id)
            except RequestInvalid as fault:
                findings += [_in_line(number, finding) for finding in fault.findings]
            else:
                found[example.id] = example
    if findings:
        raise RequestInvalid(f"{path}: {len(findings)} of its lines are no examples", findings)
    if not found:
        raise RequestInvalid(f"{path} has no examples; expected on each line {EXPECTED}")
    return list(found.values())


def _example(line: str, number: int) -> Example:
    try:
        fields = parse_json(line)
    except JsonInvalid as error:
        raise _bad("", EXPECTED, line) from error
    if not isinstance(fields, dict):
        raise _bad("", EXPECTED, line)
    if unknown := [name for name in fields if name not in FIELDS]:
        raise _bad("", f"only {', '.join(FIELDS)}", unknown[0], "E_UNKNOWN_FIELD")
    kinds = [name for name in KINDS if name in fields]
    if len(kinds) != 1:
        raise _bad("", f"one of {', '.join(KINDS)}", " and ".join(kinds) or "none of them", "E_MISSING_FIELD")
    if fields.get("reference") in (None, ""):
        raise _bad("reference", "the right answer", "none", "E_MISSING_FIELD")
    name, reference = fields.get("id", number), fields["reference"]
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise _bad("id", "text", json.dumps(name))
    return Example(
        str(name),
        _prompt(kinds[0], fields[kinds[0]]),
        reference if isinstance(reference, str) else json.dumps(reference, ensure_ascii=False),
    )


def _prompt(kind: str, value: Any) -> Prompt:
    if kind == "messages":
        if not isinstance(value, list) or not value or not all(isinstance(turn, Mapping) for turn in value):
            raise _bad(kind, "a list of turns, each with role and content", json.dumps(value))
        prompt: Prompt = value
    elif not isinstance(value, str) or not value.strip():
        raise _bad(kind, "text", json.dumps(value))
    else:
        prompt = value if kind == "text" else [{"role": "user", "content": value}]
    try:
        generate_request("", prompt, {})
    except RequestInvalid as fault:
        raise _bad(kind, EXPECTED, fault.findings[0].found) from fault
    return prompt


def _bad(where: str, expected: str, found: object, code: str = "E_BAD_FIELD") -> RequestInvalid:
    excerpt = str(found)[:MAX_EXCERPT_CHARACTERS]
    finding = Finding(code=code, where=where, expected=expected, found=excerpt)
    return RequestInvalid("a line is no example", [finding])


def _in_line(number: int, finding: Finding) -> Finding:
    place = f"line {number}" + (f", {finding.where}" if finding.where else "")
    return finding.model_copy(update={"where": place})


def by_version(models: Sequence[str], examples: Sequence[Example], together: int) -> list[tuple[str, Example]]:
    """Return each version with each example: as many examples as are open at once, version by version.

    A step reads each adapter that it has rows of, and prefixes are shared within a version, so requests that
    are open together are of as few versions as fill the batch.
    """
    return [
        (model, example)
        for first in range(0, len(examples), together)
        for model in models
        for example in examples[first : first + together]
    ]
