"""Mutated adapter configs are refused by name, or mean what PEFT reads."""

import math
from pathlib import Path
from random import Random
from typing import Any

import pytest

from builder_service.domain.rules.adapter import check_adapter
from tests.fuzz.mutate import TEXTS, bounded, check_findings, json_text, mutated_json, runs
from tests.golden.hostile.configs import EXPONENTIAL, GIANT
from tests.support.adapters import write_adapter
from tests.support.cases import cases
from tests.unit.domain.test_adapter_rules import book

SEEDS: tuple[dict[str, Any], ...] = cases(__file__, "SEEDS")
PATTERNS = (*TEXTS, GIANT, "(?:a?){99}", "q_proj|v_proj", ".*", "(?i)Q_PROJ", "[", "(" * 50, "\\")


def mutated(rng: Random, *, costly: bool) -> bytes:
    """Return the text of a config that was changed; a costly one may take a pattern all of its time."""
    value = mutated_json(rng.choice(SEEDS), rng)
    if isinstance(value, dict) and rng.random() < 0.2:
        pattern = EXPONENTIAL if costly else rng.choice(PATTERNS)
        field = rng.choice(("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"))
        value[field] = pattern if field.endswith("modules") else {pattern: rng.choice((4, 8, -1))}
    return json_text(value, rng)


@pytest.mark.parametrize("cases", runs(75))
def test_mutated_configs_are_taken_or_refused_by_name(tmp_path: Path, cases: range) -> None:
    """Any config gives a named finding or rows with finite scales; never anything else."""
    rules = book()
    write_adapter(tmp_path)
    with bounded() as watch:
        for case in cases:
            (tmp_path / "adapter_config.json").write_bytes(mutated(Random(case), costly=case % 500 == 499))
            with watch.case(f"seed {case}"):
                checked = check_adapter(tmp_path, rules)
            check_findings(checked.findings, case)
            watch.note("accepted" if checked.rows else "refused")
            assert bool(checked.rows) != bool(checked.errors), case
            assert not checked.errors or not checked.invocation_tokens, case
            assert all(0 <= token < rules.limits.base.dims.vocab for token in checked.invocation_tokens), case
            assert all(math.isfinite(planned.row.scale) for planned in checked.rows), case
