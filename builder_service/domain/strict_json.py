"""Strict reader of untrusted JSON: refuses what two readers could understand differently, and is bounded."""

import json
import re
from typing import Any, Final

MAX_DEPTH: Final = 64
"""Brackets inside brackets; configs and headers have about four."""


_ESCAPED_HALF: Final = re.compile(rb"\\u[dD][89a-fA-F]")
"""Escape that every JSON text with half of a surrogate pair has, and some texts with whole ones."""


class JsonInvalid(Exception):
    """Bytes that are no JSON, or JSON that says something twice; the text says what is wrong."""


def parse(data: bytes) -> Any:
    """Parse UTF-8 JSON without duplicate keys, NaN, infinities, -0, halves of characters and deep nesting;
    raise JsonInvalid for everything else.
    """
    try:
        integer = _no_minus_zero if b"-0" in data else int
        value = json.loads(
            data.decode(), parse_constant=_no_constant, parse_int=integer, object_pairs_hook=_once
        )
    except RecursionError as error:
        raise JsonInvalid("nested too deeply") from error
    except ValueError as error:
        raise JsonInvalid(str(error)[:200]) from error
    if _deeper_than(value, MAX_DEPTH):
        raise JsonInvalid(f"nested more than {MAX_DEPTH} deep")
    if _ESCAPED_HALF.search(data):
        _refuse_halves(value)
    return value


def excerpt(value: Any, limit: int = 80) -> str:
    """Return a value as text for a finding."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def quoted(value: Any) -> str:
    """Return a value as JSON says it, so that ``"8"`` is not taken for 8."""
    return excerpt(json.dumps(value, ensure_ascii=False))


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _no_minus_zero(digits: str) -> int:
    """To some readers it is an integer, to others a fraction."""
    if digits == "-0":
        raise ValueError("-0 is not an integer")
    return int(digits)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"{name[:100]!r} appears twice")
        made[name] = value
    return made


def _refuse_halves(value: Any) -> None:
    """JSON can say half of a character of two, which no text can hold: no message, no file, no name."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise JsonInvalid(f"{half} is a lone surrogate") from error


def _deeper_than(value: Any, depth: int) -> bool:
    level = [value]
    while level and depth >= 0:
        level = [
            item
            for outer in level
            if isinstance(outer, dict | list)
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
        depth -= 1
    return any(isinstance(item, dict | list) for item in level)
