"""Mutated adapter configs are refused by name, or mean what PEFT reads."""

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import pytest

from builder_service.domain.rules.adapter import check_adapter
from loramux_shared.codes import CODES
from tests.fuzz.mutate import TEXTS, bounded, json_text, mutated_json
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


RUNS = [
    pytest.param(range(75), id="short"),
    pytest.param(range(10_000, 30_000), marks=(pytest.mark.sweep, pytest.mark.timeout(3600)), id="long"),
]


def fuzz(folder: Path, cases: range) -> None:
    """Check so many mutations, each from a seed of its own."""
    rules = book()
    write_adapter(folder)
    with bounded() as watch:
        for case in cases:
            (folder / "adapter_config.json").write_bytes(mutated(Random(case), costly=case % 500 == 499))
            with watch.case(f"seed {case}"):
                checked = check_adapter(folder, rules)
            assert {finding.code for finding in checked.findings} <= CODES.keys(), case
            assert max((len(str(finding)) for finding in checked.findings), default=0) < 2000, case
            json.dumps([item.model_dump() for item in checked.findings], ensure_ascii=False).encode()
            watch.note("accepted" if checked.rows else "refused")
            assert bool(checked.rows) != bool(checked.errors), case
            assert not checked.errors or not checked.invocation_tokens, case
            assert all(0 <= token < rules.limits.base.dims.vocab for token in checked.invocation_tokens), case
            assert all(math.isfinite(planned.row.scale) for planned in checked.rows), case


@pytest.mark.parametrize("cases", RUNS)
def test_mutated_configs_are_taken_or_refused_by_name(tmp_path: Path, cases: range) -> None:
    """Any config gives a named finding or rows with finite scales; never anything else."""
    fuzz(tmp_path, cases)
