"""DoRA and biases of Mamba-2 mixers whose projections have biases, against PEFT."""

from pathlib import Path
from typing import Any

import pytest

from tests.models.test_families import CASES, NEW
from tests.support.greedy import greedy_tokens
from tests.support.tiny import World, make_adapter, make_checkpoint, oracle, run_engine

BIASES: dict[str, dict[str, Any]] = {
    "granite-4": {"mamba_proj_bias": True},
    "falcon-h1": {"mamba_proj_bias": True, "projectors_bias": True},
    "nemotron-h": {"use_bias": True},
    "bamba": {"mamba_proj_bias": True},
}
ADAPTERS: dict[str, dict[str, Any]] = {"dora": {"use_dora": True}, "biases": {"bias": "lora_only"}}


@pytest.mark.parametrize("name", BIASES)
def test_vectors_of_mixers_with_biases_equal_peft(tmp_path: Path, name: str) -> None:
    """The bias of a mixer's projection is not scaled by DoRA, and a trained one takes its place."""
    config = CASES[name].config
    make_checkpoint(tmp_path / "base", type(config)(**config.to_dict() | BIASES[name]))
    modules = (
        ["in_proj"] if name in ("falcon-h1", "nemotron-h") else ["in_proj", "out_proj"]
    )  # what PEFT allows
    for seed, (adapter, settings) in enumerate(ADAPTERS.items()):
        own = {"r": 4, "lora_alpha": 9, "target_modules": modules} | settings
        make_adapter(tmp_path / "base", tmp_path / adapter, seed, **own)
    world = World(tmp_path / "base", {adapter: tmp_path / adapter for adapter in ADAPTERS}, tmp_path)
    requests = [(adapter, range(3 + shift, 40)) for shift, adapter in enumerate(("base", *ADAPTERS))]
    found = run_engine(world.load(world.built()), requests, NEW)
    for (adapter, prompt), tokens in zip(requests, found, strict=True):
        model = oracle(world.base, world.adapters.get(adapter))
        assert greedy_tokens(model, prompt, tokens) == tokens, adapter
