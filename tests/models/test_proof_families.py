"""The reference of proofs where layers differ in all their sizes; test_families.py has all families."""

from __future__ import annotations

from pathlib import Path

from tests.kernels.test_uneven_steps import ADAPTERS, CONFIG
from tests.models.test_families import check_reference
from tests.support.tiny import make_world_of, oracle


def test_the_reference_is_transformers_and_peft_where_layers_are_uneven(tmp_path: Path) -> None:
    """Heads, windows and inputs of their own for each layer give the logits of transformers with PEFT."""
    world = make_world_of(tmp_path, CONFIG, {"all": ADAPTERS["all"]})
    check_reference(world, None, oracle(world.base, world.adapters["all"]))
