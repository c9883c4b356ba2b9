"""Mutations of bytes and of JSON-like values, from a seed, and the cost of each case."""

import copy
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final

import pytest
from google.protobuf.json_format import MessageToDict, Parse, ParseError
from google.protobuf.message import Message

from loramux_shared.codes import CODES
from loramux_shared.faults import Finding
from tests.support.waiting import BOUND_S

GROWTH: Final = 64 << 20
"""Bytes of memory, for a whole run."""

NUMBERS: Final[tuple[Any, ...]] = (
    0, -1, 1, 7, 2**16, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**64 + 4,
    -(2**31), -(2**63), 10**400, 0.0, -0.0, 0.5, 1e-300, 1e308, -1e308, float("nan"), float("inf"),
    float("-inf"),
)  # fmt: skip
TEXTS: Final = (
    "", " ", "\x00", "\ud800", "a\udfffb", "\U0001f600", "e\u0301", "..", "../../etc/passwd", "-", "{}", "%s",
    "{{ x }}", "None", "true", "1", "a" * 100_000, "\ud800" * 1000, "(a*)*$", "a{65536}", "\u202e", "\r\n",
)  # fmt: skip
CHUNKS: Final = (
    b"\x00", b"\xff", b"\xff\xfe", b"\xed\xa0\x80", b"\xc3", b"\x80", b'"', b"{", b"}", b"[", b"]", b",", b":",
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"\\ud800", b"\\u0000", b"null", b"\xef\xbb\xbf",
    b"[" * 5000,
    *(number.to_bytes(8, "little", signed=number < 0) for number in (0, -1, 2**31, 2**32, 2**63, 2**64 - 1)),
    *(str(number).encode() for number in NUMBERS[:17]),
)  # fmt: skip


def mutations(data: bytes, rng: Random) -> bytes:
    """Return bytes with one to four changes: flips, cuts, repeats, splices, numbers at their limits."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        rng.choice(_BYTE_CHANGES)(made, rng)
    return bytes(made)


def mutated_json(value: Any, rng: Random) -> Any:
    """Return a copy of a value with one to three changes anywhere in it; text may hold lone surrogates."""
    made = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        made = _change(made, rng)
    return made


def mutated_message(valid: Message, rng: Random) -> bytes:
    """Return a message with other values in its fields, or where that makes none, with other bytes."""
    if rng.random() < 0.5:
        text = json.dumps(mutated_json(MessageToDict(valid), rng), ensure_ascii=False)
        try:
            made = Parse(text.encode(errors="replace"), type(valid)(), ignore_unknown_fields=True)
            return made.SerializeToString()
        except (ParseError, ValueError, TypeError, AttributeError, RecursionError):
            pass  # no message can say it
    return mutations(valid.SerializeToString(), rng)


def json_text(value: Any, rng: Random) -> bytes:
    """Return a value as JSON text, once in eight with a key given twice, once in eight in other bytes."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")
    match rng.randrange(8):
        case 0 if isinstance(value, dict) and value:
            name = rng.choice(sorted(value))
            again = json.dumps({name: rng.choice((None, value[name], 0))}).encode()
            return text[:-1] + b", " + again[1:]
        case 1:
            return mutations(text, rng)
    return text


@dataclass
class Watch:
    """The costs of the cases of one run."""

    growth: int
    start: int
    cases: int = 0
    peak: int = 0
    """Bytes above the start, at most."""
    outcomes: dict[str, int] = field(default_factory=dict)
    """Counts of outcomes, for a run's report."""

    @contextmanager
    def case(self, label: str) -> Iterator[None]:
        """Watch one case within bounds of time and memory; its label says how to make it again."""
        begin = time.process_time()
        yield
        self.cases += 1
        self.peak = max(self.peak, _peak() - self.start)
        assert time.process_time() - begin <= BOUND_S, f"{label}: it computes without end"
        assert self.peak <= self.growth, f"{label}: {self.peak >> 20} MB more than at the start"

    def note(self, outcome: str) -> None:
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1


def runs(count: int) -> list[Any]:
    """Return the seeds of a test's parameters: so many, and many with --sweep."""
    marks = (pytest.mark.sweep, pytest.mark.timeout(3600))
    return [pytest.param(range(count), id="short"), pytest.param(range(10_000, 30_000), marks=marks, id="long")]


def check_findings(findings: Iterable[Finding], case: int) -> None:
    """Check that findings have known codes, and short texts that JSON can hold."""
    for finding in findings:
        assert finding.code in CODES, case
        assert len(str(finding)) < 2000, case
        json.dumps(finding.model_dump(), ensure_ascii=False).encode()


@contextmanager
def bounded(growth: int = GROWTH) -> Iterator[Watch]:
    """Watch a run of cases of this process: all together have a bound of memory."""
    _forget_peak()
    watch = Watch(growth, _peak())
    yield watch
    print(f"{watch.cases} cases, {watch.peak >> 20} MB more: {watch.outcomes}")  # noqa: T201 - for pytest -s


def _forget_peak() -> None:
    """Reset the peak of this process's memory to the present size."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Return the most bytes of memory that this process had since."""
    status = Path("/proc/self/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) << 10


def _place(made: bytearray, rng: Random) -> int:
    """Return a place; half of them near the beginning, where headers are."""
    size = len(made) + 1
    return rng.randrange(min(size, 64) if rng.random() < 0.5 else size)


def _flip(made: bytearray, rng: Random) -> None:
    if made:
        made[_place(made, rng) % len(made)] ^= 1 << rng.randrange(8)


def _byte(made: bytearray, rng: Random) -> None:
    if made:
        made[_place(made, rng) % len(made)] = rng.choice((0, 1, 0x20, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _cut(made: bytearray, rng: Random) -> None:
    del made[_place(made, rng) :]


def _remove(made: bytearray, rng: Random) -> None:
    at = _place(made, rng)
    del made[at : at + rng.choice((1, 2, 8, 64))]


def _insert(made: bytearray, rng: Random) -> None:
    at = _place(made, rng)
    made[at:at] = rng.choice(CHUNKS)


def _overwrite(made: bytearray, rng: Random) -> None:
    at, chunk = _place(made, rng), rng.choice(CHUNKS)
    made[at : at + len(chunk)] = chunk


def _repeat(made: bytearray, rng: Random) -> None:
    at, end = _place(made, rng), _place(made, rng)
    made[at:at] = made[at : max(at, end)][:256] * rng.choice((1, 2, 50))


def _splice(made: bytearray, rng: Random) -> None:
    at, other = _place(made, rng), _place(made, rng)
    length = rng.choice((1, 4, 8, 64))
    made[at : at + length] = made[other : other + length]


def _append(made: bytearray, rng: Random) -> None:
    made += bytes(rng.choice((1, 7, 8, 4096)))


_BYTE_CHANGES: Final[tuple[Callable[[bytearray, Random], None], ...]] = (
    _flip, _flip, _byte, _byte, _cut, _remove, _insert, _overwrite, _overwrite, _repeat, _splice, _append,
)  # fmt: skip


def _change(value: Any, rng: Random) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.75:
        name = rng.choice(list(value))
        match rng.randrange(10):
            case 0:
                del value[name]
            case 1:
                value[rng.choice(TEXTS)] = value.pop(name)
            case 2:
                value[rng.choice((*TEXTS, f"{name}_"))] = _other(value[name], rng)
            case _:
                value[name] = _change(value[name], rng)
        return value
    if isinstance(value, list) and value and rng.random() < 0.75:
        at = rng.randrange(len(value))
        match rng.randrange(8):
            case 0:
                del value[at]
            case 1:
                value[at:at] = [value[at]] * rng.choice((1, 2, 300))
            case _:
                value[at] = _change(value[at], rng)
        return value
    return _other(value, rng)


def _other(value: Any, rng: Random) -> Any:
    """Return something else in a value's place; half of the time of the same kind."""
    if isinstance(value, str) and value and rng.random() < 0.5:
        return mutations(value.encode("utf-8", "surrogatepass"), rng).decode("utf-8", "replace")
    if isinstance(value, int | float) and rng.random() < 0.5:
        return rng.choice((*NUMBERS, value + 1, -value, str(value)))
    return rng.choice((rng.choice(NUMBERS), rng.choice(TEXTS), True, False, None, [], {}, [value], _deep(rng)))


def _deep(rng: Random) -> Any:
    """Return a value inside lists or objects."""
    value: Any = 0
    for _ in range(rng.choice((8, 70, 300))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value
