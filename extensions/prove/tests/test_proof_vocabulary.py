"""Proofs of adapters with embeddings and a head of their own."""

from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig

from loramux_shared.bundle.manifest import VOCABULARY_FILE, Manifest, ModuleRow, Replaced
from loramux_shared.faults import ProofFailed
from loramux_shared.storage.memory import MemoryStore
from tests.models.test_own_vocabulary import ADAPTERS, OF_TIED, made
from tests.support.tiny import SIZES, World, refusal
from tests.test_proof import build_into, manifest_of, tampered

OWN = {name: settings for name, settings in ADAPTERS.items() if name != "plain"} | OF_TIED
FEW = {name: OWN[name] for name in ("factors", "some", "tokens", "dora", "both")}
TIED = LlamaConfig(**(SIZES | {"tie_word_embeddings": True}))
EVERY = tuple(FEW)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return made(tmp_path_factory.mktemp("tied"), TIED, FEW)


@pytest.fixture(scope="module")
def store(world: World) -> MemoryStore:
    """Bundles in bfloat16, with proofs."""
    store = MemoryStore()
    build_into(store, world, dtype="bfloat16")
    return store


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_honest_bundle_is_served(world: World, store: MemoryStore, dtype: str) -> None:
    """Each part of an adapter has an effect, and the tolerance covers the rounding of bundle and replica."""
    ready = world.load(store, dtype=dtype)
    assert [refusal(ready, name) for name in EVERY] == [None] * len(EVERY)
    for name in EVERY:
        manifest = manifest_of(store, name)
        assert len(manifest.proof.effects) == len(manifest.parts)
        assert all(effect.norm > 0 for effect in manifest.proof.effects)


def of_part(values: Any, manifest: Manifest, index: int) -> Any:
    """The elements of a part of the vocabulary's file, as a view."""
    parts: list[ModuleRow | Replaced] = [*manifest.vocabulary_rows, *manifest.replaced]
    first = sum(part.elements for part in parts[:index])
    return values[0, first : first + parts[index].elements]


@pytest.mark.parametrize(
    ("name", "index", "expected"),
    [
        pytest.param("factors", 0, "embedding adds something else", marks=pytest.mark.sweep),
        pytest.param("factors", 1, "head adds something else", marks=pytest.mark.sweep),
        pytest.param("dora", 1, "head adds something else", marks=pytest.mark.sweep),
        pytest.param("some", 0, "embedding adds something else", marks=pytest.mark.sweep),
        ("some", 1, "head adds something else"),
        ("tokens", 0, "embedding adds something else"),
        pytest.param("both", 0, "embedding adds something else", marks=pytest.mark.sweep),
    ],
)
def test_a_part_that_is_wrong_is_caught_and_named(
    world: World, store: MemoryStore, name: str, index: int, expected: str
) -> None:
    """Rows in each other's place, digests right: the adapter is not served in the coarsest type, others are."""

    def turn(values: Any, manifest: Manifest) -> None:
        own = of_part(values, manifest, index)
        own[:] = np.roll(own, len(own) // 2)

    ready = world.load(tampered(store, name, turn, VOCABULARY_FILE), dtype="bfloat16")
    fault = refusal(ready, name)
    assert isinstance(fault, ProofFailed)
    assert expected in fault.message
    assert [refusal(ready, other) for other in EVERY if other != name] == [None] * (len(EVERY) - 1)
