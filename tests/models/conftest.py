"""Counters of the model tests: answers that were tried, and those that were exact."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, TypeAlias

import pytest

from loramux_shared.storage.memory import MemoryStore
from tests.support.tiny import World

PARITY: Final = "parity"
ORACLES: Final = ("torch", "transformers", "peft")
Counted: TypeAlias = Callable[[str, str, str, Sequence[list[int]], Sequence[list[int]]], None]
counts: Counter[tuple[Any, ...]] = Counter()
"""Counts by (architecture, backend, situation, "tried" or "exact")."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity", type=Path, help="write what was tried and exact to this file")


@pytest.fixture(scope="module")
def store(world: World) -> MemoryStore:
    made = MemoryStore()
    world.build(made)
    return made


@pytest.fixture
def counted(record_property: Callable[[str, object], None]) -> Counted:
    """Counts answers by (architecture, backend, situation), and compares them with the expected ones."""

    def count(
        architecture: str, backend: str, situation: str, found: Sequence[Any], expected: Sequence[Any]
    ) -> None:
        exact = sum(one == other for one, other in zip(found, expected, strict=True))
        record_property(PARITY, [architecture, backend, situation, len(expected), exact])
        assert list(found) == list(expected)

    return count


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up the counts of a test, in whichever worker it ran."""
    for name, value in report.user_properties if report.when == "call" else ():
        if name == PARITY and isinstance(value, list):
            *where, tried, exact = value
            counts[*where, "tried"] += tried
            counts[*where, "exact"] += exact


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the counts, and write them where requested; a worker has only its own tests, and skips this."""
    if hasattr(config, "workerinput"):
        return
    rows = [
        [*where, *(counts[*where, what] for what in ("tried", "exact"))]
        for where in sorted({key[:3] for key in counts})
    ]
    if rows:
        terminalreporter.section(PARITY)
    for architecture, backend, situation, tried, exact in rows:
        terminalreporter.line(f"{architecture:<34} {backend:<7} {situation:<12} {exact:>4} of {tried}")
    if (path := config.getoption("--parity")) and rows:
        oracles = {name: version(name).partition("+")[0] for name in ORACLES}
        lines = ",\n".join(json.dumps(row) for row in rows)
        path.write_text(f'{{"oracles": {json.dumps(oracles)}, "counts": [\n{lines}\n]}}\n')
