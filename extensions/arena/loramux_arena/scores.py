"""Scores of an answer by its reference: 1 where they are the same, in the sense that has a name, else 0."""

import json
import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, Final, TypeAlias

from loramux_shared.faults import SettingsInvalid
from loramux_shared.untrusted_json import parse_json

Scorer: TypeAlias = Callable[[str, str], bool]
"""Answer and reference to whether they agree."""
LIKELIHOOD: Final = "likelihood"
"""The score that asks for log probabilities of the reference, and for no answer."""
REGEX: Final = "regex="
_NUMBER: Final = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+")
_FENCE: Final = re.compile(r"```(?:json)?\s*\n(.*?)\n\s*```", re.DOTALL | re.IGNORECASE)
MOST_DIGITS: Final = 400
"""Most digits of a number; a longer text is no number."""


def _exact(answer: str, reference: str) -> bool:
    return answer == reference


def _strip(answer: str, reference: str) -> bool:
    return answer.strip() == reference.strip()


def _casefold(answer: str, reference: str) -> bool:
    return answer.strip().casefold() == reference.strip().casefold()


def _numeric(answer: str, reference: str) -> bool:
    number = last_number(reference)
    return number is not None and last_number(answer) == number


def _json(answer: str, reference: str) -> bool:
    try:
        return equal(json_in(answer), parse_json(reference))
    except (ValueError, RecursionError):
        return False


SCORERS: Final[Mapping[str, Scorer]] = {
    "exact": _exact,
    "strip": _strip,
    "casefold": _casefold,
    "numeric": _numeric,
    "json": _json,
}
MEANINGS: Final[Mapping[str, str]] = {
    "exact": "the same text",
    "strip": "the same but for white space around it",
    "casefold": "the same but for white space around it and for case",
    "numeric": "the last number of the answer is the last number of the reference",
    "json": "the answer, or the block in ``` that it has, is JSON of the same value as the reference",
    "regex=PATTERN": "what the pattern finds, of groups the first, is the same in both, stripped",
    "likelihood": "log probability per token of the reference, as the answer to the question",
}


def scorer(word: str) -> Scorer:
    """Return the scorer of a name.

    Raises:
        SettingsInvalid: there is none of that name, or its pattern is none.
    """
    if word in SCORERS:
        return SCORERS[word]
    if not word.startswith(REGEX) or word == REGEX:
        raise SettingsInvalid(f"--score {word}: expected one of {', '.join(MEANINGS)}")
    try:
        pattern = re.compile(word.removeprefix(REGEX))
    except re.error as error:
        raise SettingsInvalid(f"--score {word}: the pattern is not valid: {error}") from error

    def captured(answer: str, reference: str) -> bool:
        found = _capture(pattern, answer)
        expected = _capture(pattern, reference)
        return found is not None and found == (reference.strip() if expected is None else expected)

    return captured


def _capture(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.search(text)
    if found is None:
        return None
    captured = found[1] if pattern.groups else found[0]
    return None if captured is None else captured.strip()


def last_number(text: str) -> Decimal | None:
    """Return the last number of a text, whose thousands may have commas; None where there is none."""
    found = _NUMBER.findall(text)
    if not found or len(found[-1]) > MOST_DIGITS:
        return None
    try:
        return Decimal(found[-1].replace(",", ""))
    except InvalidOperation:
        return None


def json_in(text: str) -> Any:
    """Return the value of a text that is JSON, or that has one block of it in a fence.

    Raises:
        ValueError: it is not, or has NaN or infinity, which no JSON has.
        RecursionError: it is deeper than Python reads.
    """
    fenced = _FENCE.findall(text)
    return json.loads(fenced[0] if len(fenced) == 1 else text, parse_constant=_no_constant)  # noqa: TID251 - an answer, as long as its tokens


def _no_constant(word: str) -> Any:
    raise ValueError(word)


def equal(one: Any, other: Any) -> bool:
    """Return True if two values of JSON are equal: true is not 1, and members have no order."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)
