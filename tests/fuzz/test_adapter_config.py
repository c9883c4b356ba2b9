"""Mutated adapter configs are refused by name, or mean what PEFT reads."""

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from builder_service.domain.rules.adapter import check_adapter
from loramux_shared.codes import CODES
from loramux_shared.extensions import PARTS, find_extensions
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


KINDS = {
    "ADALORA": {"lora_A": (4, 16), "lora_B": (16, 4), "lora_E": (4, 1)},
    "VERA": {"vera_lambda_b": (16,), "vera_lambda_d": (4,)},
    "LOHA": {"hada_w1_a": (16, 2), "hada_w1_b": (2, 16), "hada_w2_a": (16, 2), "hada_w2_b": (2, 16)},
    "IA3": {"ia3_l": (16, 1)},
    "LOKR": {"lokr_w1": (4, 4), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 4)},
}
SHARED = {"base_model.vera_A": (4, 24), "base_model.vera_B": (24, 4)}
SIZES = (0, 1, 2, 3, 4, 16, 17, 2000)


def odd_kind(rng: Random) -> tuple[str, dict[str, tuple[int, ...]]]:
    """Return a kind that amounts to LoRA, with some wrong or missing shapes."""
    kind = rng.choice(sorted(KINDS))
    parts = KINDS[kind] | (SHARED if kind == "VERA" else {})
    for name, shape in parts.items():
        if rng.random() < 0.15:
            parts = parts | {name: tuple(rng.choice(SIZES) for _ in range(rng.choice((1, 2, 2, 3))))}
        elif rng.random() < 0.03:
            parts = {other: each for other, each in parts.items() if other != name}
        elif len(shape) == 2 and rng.random() < 0.05:
            parts = parts | {name: shape[::-1]}
    return kind, parts


@pytest.mark.skipif("kinds" not in find_extensions(PARTS), reason="an extension reads them")
def test_odd_shapes_of_other_kinds_are_taken_or_refused_by_name(tmp_path):
    """Any combination of shapes gives a named finding, or rows of the base's own sizes."""
    accepted = 0
    with bounded() as watch:
        for case in range(80):
            kind, parts = odd_kind(Random(case))
            root = "base_model.model.model.layers.0.self_attn.q_proj."
            named = {name if "." in name else root + name: shape for name, shape in parts.items()}
            values = {name: np.full(shape, 0.5, "f2") for name, shape in named.items()}
            ranks = {"r": 2 if kind == "LOHA" else 4, "init_r": 4, "target_modules": ["q_proj"]}
            write_adapter(tmp_path, values, peft_type=kind, **ranks)
            with watch.case(f"seed {case}"):
                checked = check_adapter(tmp_path, book())
            assert {finding.code for finding in checked.findings} <= CODES.keys(), case
            assert bool(checked.rows) != bool(checked.errors), case
            assert all((row.row.in_features, row.row.out_features) == (16, 16) for row in checked.rows), case
            accepted += bool(checked.rows)
    assert 13 < accepted < 67
