"""Every target of the fuzzer on its valid inputs and on some that are drawn, each from a seed."""

from random import Random

import pytest

from tests.fuzz.mutate import bounded, runs
from tests.fuzz.targets import TARGETS, opened


@pytest.mark.parametrize("cases", runs(100))
@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_are_taken_or_refused_by_name(name: str, cases: range) -> None:
    """Bytes are taken or refused, in memory that their length bounds; valid ones are taken."""
    target = TARGETS[name]
    with opened(name) as judge, bounded() as watch:
        for number, seed in enumerate(target.seeds()):
            with watch.case(f"{name}: seed {number}"):
                watch.note(judge(seed))
        assert watch.outcomes["accepted"]
        for case in cases:
            with watch.case(f"{name}: case {case}"):
                watch.note(judge(target.case(Random(case))))
    assert watch.outcomes["refused"]
