"""Reader of untrusted JSON: bounded before it is parsed, and strict where two readers could understand it
differently.

`json` makes up to a hundred bytes of each byte that it reads: an empty list is two of them.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

MAX_DEPTH: Final = 64
"""Brackets inside brackets; configs and headers have about four."""
PIECE: Final = 1 << 16


@dataclass(frozen=True)
class Bounds:
    """The most that a JSON text may have: a name, object or list is a hundred bytes of memory."""

    names: int
    """Names, objects and lists, together."""
    values: int

    def exceeded_by(self, data: bytes) -> str:
        """Say what a JSON text has too much of, before it is parsed; empty where nothing."""
        if not self._exceeded([data]):  # counts characters in strings too: nearly always enough
            return ""
        return self._exceeded(_outside_strings(data))

    def _exceeded(self, pieces: Iterable[bytes]) -> str:
        names = values = 0
        for piece in pieces:
            names += sum(map(piece.count, (b":", b"{", b"[")))
            values += piece.count(b",")
            if names > self.names:
                return f"more than {self.names} names, objects and lists"
            if values > self.values:
                return f"more than {self.values} values"
        return ""


def of_tensors(count: int) -> Bounds:
    """Return the bounds of a header or an index of so many tensors, of up to eight dimensions, and metadata."""
    return Bounds(7 * count + (1 << 16), 12 * count + (1 << 16))


FILE: Final = Bounds(1 << 18, 1 << 20)
"""For configs. The largest tokenizer_config.json that was seen has 60,000 names; an index of the largest model
has 92,000."""
MAX_SHARD_TENSORS: Final = 1 << 17
"""Most tensors of a base's shard; the largest model with experts has 91,991 in all of its shards."""

_ESCAPED_HALF: Final = re.compile(rb"\\u[dD][89a-fA-F]")
"""Escape that every JSON text with half of a surrogate pair has, and some texts with whole ones."""


class JsonInvalid(ValueError):
    """Text that is no JSON, has too much in it, or says something twice; the message says what is wrong."""


def parse_json(data: bytes | str, bounds: Bounds = FILE) -> Any:
    """Parse JSON as `json.loads` does, where it is within the bounds; raise JsonInvalid for everything else."""
    try:
        text = data if isinstance(data, str) else data.decode(json.detect_encoding(data), "surrogatepass")
        _check_size(text.encode(errors="replace"), bounds)
        return json.loads(text)  # noqa: TID251 - its size was judged
    except RecursionError as error:
        raise JsonInvalid("nested too deeply") from error
    except ValueError as error:
        raise JsonInvalid(str(error)[:200]) from error


def parse_strict_json(data: bytes, bounds: Bounds = FILE) -> Any:
    """Parse UTF-8 JSON without duplicate keys, NaN, infinities, -0, halves of characters and deep nesting;
    raise JsonInvalid for everything else.
    """
    _check_size(data, bounds)
    try:
        integer = _no_minus_zero if b"-0" in data else int
        value = json.loads(  # noqa: TID251 - its size was judged
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


def _check_size(data: bytes, bounds: Bounds) -> None:
    if much := bounds.exceeded_by(data):
        raise JsonInvalid(much)


def _outside_strings(data: bytes) -> Iterator[bytes]:
    """Yield the parts of a JSON text that are in none of its strings."""
    unescaped = data.replace(rb"\\", b"  ").replace(rb"\"", b"  ")
    inside = 0
    for start in range(0, len(unescaped), PIECE):
        parts = unescaped[start : start + PIECE].split(b'"')
        yield b"".join(parts[inside::2])
        inside ^= (len(parts) - 1) & 1


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
