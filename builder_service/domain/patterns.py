"""PEFT's patterns on names of modules: its meaning exactly, and never longer than we allow.

PEFT uses `re`. Patterns come from strangers, and one of fifteen characters keeps `re` busy for years, with the
interpreter's lock held. The `regex` module stops at a time limit and works without the lock. The two agree
where `re` accepts a pattern, every brace is a plain repetition (in `regex`, other braces mean fuzzy matches)
and no set holds ``[:`` (in `regex`, a POSIX class); what is outside is refused.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any, Final, Generic, TypeAlias, TypeVar

import regex

Value = TypeVar("Value")
Compiled: TypeAlias = Any  # regex ships no types

MAX_PATTERN: Final = 4096
"""Characters of one pattern."""
MAX_PATTERNS: Final = 8192
"""Patterns of one field; EVA writes one per module, which is 560 for 80 layers."""
TIME_LIMIT_S: Final = 2.0
"""For all modules and all patterns of one field; honest ones take milliseconds."""
_BRACES: Final = re.compile(r"\{(\d+|\d+,\d*|,\d+)\}")


class PatternInvalid(Exception):
    """A pattern that PEFT could not compile, or that two engines could read differently."""


class PatternsTooSlow(Exception):
    """Patterns that cannot be matched in the time that we give them."""


def compile_pattern(pattern: str, *, whole: bool = False) -> Compiled:
    """Compile a pattern for whole names, or as PEFT does for the ends of names.

    Raises:
        PatternInvalid: with the problem.
    """
    if len(pattern) > MAX_PATTERN:
        raise PatternInvalid(f"longer than {MAX_PATTERN} characters")
    if re.search(r"[{}]", _BRACES.sub("", pattern)):
        raise PatternInvalid("braces that are no repetition")
    if "[:" in pattern:
        raise PatternInvalid("'[:' means different things to different readers")
    text = pattern if whole else rf"(.*\.)?({pattern})$"
    try:
        re.compile(text)
        return regex.compile(text, regex.VERSION0)
    except (re.error, regex.error, RecursionError, OverflowError) as problem:
        raise PatternInvalid(str(problem)[:200]) from problem


class Matcher(Generic[Value]):
    """Values by pattern; of several that match a name, PEFT takes the first in the file's order."""

    def __init__(self, values: Mapping[str, Value], *, whole: bool = False) -> None:
        compiled = [(compile_pattern(pattern, whole=whole), value) for pattern, value in values.items()]
        self._tests = [(item.fullmatch if whole else item.match, value) for item, value in compiled]
        self._found: dict[str, tuple[Value, ...]] = {}
        self._left_s = TIME_LIMIT_S

    def find(self, name: str) -> tuple[Value, ...]:
        """Return the values of all patterns that match a name, in the file's order; found once, it is kept.

        Raises:
            PatternsTooSlow: the time for all names is used up.
        """
        if name not in self._found:
            begin = time.monotonic()
            try:
                self._found[name] = tuple(value for test, value in self._tests if self._matches(test, name))
            finally:
                self._left_s -= time.monotonic() - begin
        return self._found[name]

    def _matches(self, test: Compiled, name: str) -> bool:
        if self._left_s <= 0:
            raise PatternsTooSlow
        try:
            return test(name, timeout=self._left_s) is not None
        except TimeoutError as late:
            raise PatternsTooSlow from late
