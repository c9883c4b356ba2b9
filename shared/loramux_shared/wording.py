"""Words and numbers in messages: short lists, the nearest known name, and numbers as JSON writes them."""

import difflib
import re
from collections.abc import Collection, Iterable
from itertools import islice
from typing import Any, Final, get_args

LISTED: Final = 20
SANE_ID: Final = re.compile(r"[A-Za-z0-9_.:\-]{1,128}")
"""Pattern of a request's id that may stand in a header and in a log."""


def listed(names: Collection[str], most: int = LISTED, *, none: str = "none") -> str:
    """Return the first names in a sentence's form: ``a, b, c and 57 more``; none where there are none."""
    joined = ", ".join(islice(names, most))
    more = len(names) - most
    return f"{joined} and {more} more" if more > 0 else joined or none


def counted(count: int, noun: str) -> str:
    """Return a number with its noun: ``1 rule``, ``2 rules``."""
    return f"{count} {noun}{'s'[: count != 1]}"


_LEAD: Final = re.compile(r"(Value error, |Input should (be )?|[A-Z][a-z]+ should (have )?)")
_TAIL: Final = re.compile(r"(, unable to parse.*| after validation, not .*)$")


def expected_of(message: str) -> str:
    """Return a message of pydantic as the words that follow "expected"."""
    return _TAIL.sub("", _LEAD.sub("", message, count=1)).replace("match pattern", "text that matches", 1)


MAX_FINDINGS: Final = 64
"""Largest number of findings of one message or file that are listed one by one."""
_LONGEST: Final = 64
"""No longer name is near to one of ours."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name that is most like a name; empty where none is."""
    found = difflib.get_close_matches(name, known, n=1) if len(name) <= _LONGEST else []
    return found[0] if found else ""


_WHOLE: Final = re.compile(r"[0-9]{1,18}")
_NUMBER: Final = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_ODD: Final = re.compile(r"[^!-~]|_")
EXPECTED: Final = "a number of the digits 0 to 9"


def is_whole(text: str) -> bool:
    """Return True if a text is a whole number below 10^18, without a sign."""
    return _WHOLE.fullmatch(text) is not None


def is_number(text: str) -> bool:
    """Return True if a text is a number as JSON has it, or with a plus, or a point at its begin or end."""
    return _NUMBER.fullmatch(text) is not None


def refuse_odd(value: Any, annotation: Any) -> Any:
    """Return the value of a field; raise ValueError for a text that Python alone takes for such a number."""
    if isinstance(value, str) and _ODD.search(value) and not {int, float}.isdisjoint(_kinds(annotation)):
        try:
            float(value)
        except ValueError:
            return value  # no number at all, which others refuse
        raise ValueError(EXPECTED)
    return value


def _kinds(annotation: Any) -> list[Any]:
    return [annotation, *(kind for part in get_args(annotation) for kind in _kinds(part))]
