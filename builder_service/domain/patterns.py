"""The readings of names of modules in a config; untrusted patterns run in a process that bounds itself.

PEFT uses `re`, and so does that process: the meaning is the same. A pattern of fifteen characters keeps `re`
busy for years with the interpreter's lock held, and others want all memory, so neither happens here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from builder_service.domain import peft_names
from builder_service.domain.sandbox import Bounds, ask

MAX_PATTERN: Final = 4096
"""Characters of one pattern."""
MAX_PATTERNS: Final = 8192
"""Patterns of one field; EVA writes one per module, which is 560 for 80 layers."""
BOUNDS: Final = Bounds(cpu_s=1.0, memory_bytes=256 << 20)
"""For all names and all patterns of a config; honest ones take milliseconds, EVA's of 126 layers 0.2 s."""
_PLAIN: Final = re.compile(r"[A-Za-z0-9_.]*")
_FEW: Final = 20_000
"""Names times patterns that are matched here, where all patterns are plain: 20 ms."""
_FIELDS: Final = ("exclude_modules", "layers_pattern", "modules_to_save", "rank_pattern", "alpha_pattern")


class PatternsInvalid(Exception):
    """Patterns that PEFT could not compile: (field, pattern, problem) of each."""

    def __init__(self, problems: Sequence[Sequence[str]]) -> None:
        super().__init__(problems)
        self.problems = problems


@dataclass(frozen=True)
class ModuleReading:
    """The meaning of a config for one module of the base."""

    rank_patterns: tuple[int, ...]
    """Positions of those that match it; PEFT takes the first."""
    alpha_patterns: tuple[int, ...]
    left_out: str
    """The field of the config for which PEFT does not adapt it; empty: it does."""


def read_names(names: Sequence[str], fields: Mapping[str, Any]) -> dict[str, ModuleReading]:
    """Return what the fields of a config say about names of modules.

    Raises:
        PatternsInvalid: some are no patterns.
        TooCostly: all together need more than `BOUNDS`.
        ResourcesExhausted: this machine has no process for them.
    """
    question = dict(fields) | {"names": list(names)}
    patterns = list(_patterns(question))
    plain = len(patterns) * len(names) <= _FEW and all(map(_PLAIN.fullmatch, patterns))
    found = peft_names.answer(question) if plain else ask(peft_names, question, BOUNDS)
    if problems := found.get("problems"):
        raise PatternsInvalid(problems)
    rows = zip(found["rank_pattern"], found["alpha_pattern"], found["left_out"], strict=True)
    return {
        name: ModuleReading(tuple(ranks), tuple(alphas), left_out)
        for name, (ranks, alphas, left_out) in zip(names, rows, strict=True)
    }


def _patterns(question: Mapping[str, Any]) -> Iterator[str]:
    """Yield every text of a question that is compiled."""
    for field in _FIELDS:
        value = question[field] or ()
        yield from [value] if isinstance(value, str) else value if field != "exclude_modules" else ()
    if isinstance(question["target_modules"], str):
        yield question["target_modules"]
