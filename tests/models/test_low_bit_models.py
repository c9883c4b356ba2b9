"""Checkpoints of few bits are served as transformers serves the weights that they mean."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from inference_service.proof.adapter_source import read_adapter
from inference_service.proof.reference import Reference
from loramux_shared.bases.read import read_config
from loramux_shared.storage.memory import MemoryStore
from tests.support.lowbit import KINDS, keep
from tests.support.tiny import World, make_world, oracle, oracle_tokens, run_engine

NEW = 12
PROMPT = list(range(3, 40))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("plain"))


@dataclass(frozen=True)
class Kept:
    """A world whose base is of few bits, and a checkpoint of the weights that it means."""

    world: World
    widened: Path


@pytest.fixture(scope="module", params=KINDS)
def kept(request: pytest.FixtureRequest, plain: World, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    folder = tmp_path_factory.mktemp(request.param)
    keep(plain.base, KINDS[request.param], folder / "kept", folder / "widened")
    return Kept(replace(plain, base=folder / "kept", root=folder.parent), folder / "widened")


def test_base_and_adapters_answer_as_transformers_with_the_widened_weights(kept: Kept) -> None:
    """In float32, token for token, all in one batch."""
    store = MemoryStore()
    kept.world.build(store)
    ready = kept.world.load(store)
    models = ["base", *kept.world.adapters]
    expected = [
        oracle_tokens(oracle(kept.widened, kept.world.adapters.get(name)), PROMPT, NEW) for name in models
    ]
    assert run_engine(ready, [(name, PROMPT) for name in models], NEW) == expected


def test_proofs_are_computed_with_the_widened_weights(kept: Kept) -> None:
    """So that a replica which widens them can replay these."""
    runs = {}
    for base in (kept.world.base, kept.widened):
        config = read_config(base)
        adapter = read_adapter(kept.world.adapters["all"], config)
        [runs[base]] = Reference(config, base).run([PROMPT], {"all": adapter})["all"]
    found, expected = runs.values()
    assert torch.equal(found.logits, expected.logits)
