"""Blocks that left the cache come back as they were, and answers are those of a cache that forgot nothing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import Gemma2Config

from inference_service.engine.block_manager import BlockManager
from inference_service.engine.engine import Engine
from inference_service.kernels.attention import KeysValues
from loramux_shared.faults import ResourcesExhausted, SettingsInvalid
from loramux_shared.storage.memory import MemoryStore
from loramux_tier.memory import BlockFile, LockedMemory, parts_of
from loramux_tier.tier import Slots, Tier
from tests.support.examples import examples
from tests.support.tiny import ADAPTERS, SIZES, World, make_world_of, next_logprobs
from tests.unit.engine.test_cache_kinds import (
    BLOCK,
    REQUESTS,
    Base,
    Device,
    test_every_answer_is_what_the_model_says as every_answer,
)

DTYPES = (torch.bfloat16, torch.float8_e4m3fn)


@dataclass
class Rows:
    """Slots for the blocks of a scripted device."""

    cache: dict[int, tuple[int, int]]
    count: int
    slot_bytes: int = 1
    slots: dict[int, dict[int, tuple[int, int]]] = field(default_factory=dict)

    def write(self, blocks: Mapping[int, int]) -> None:
        for slot, block in blocks.items():
            self.slots[slot] = {at: self.cache[block * BLOCK + at] for at in range(BLOCK)}

    def read(self, slots: Mapping[int, int]) -> None:
        for block, slot in slots.items():
            self.cache |= {block * BLOCK + at: row for at, row in self.slots[slot].items()}


@dataclass(frozen=True)
class WithTier(Base):
    """A base whose pools have tiers."""

    kept: int = 8

    def engine(self) -> tuple[Engine, Device, BlockManager]:
        """Return an engine whose blocks are kept when they leave."""
        engine, device, manager = super().engine()
        for group, cache in zip(manager.groups, device.caches, strict=False):
            group.pool.tier = Tier(Rows(cache, self.kept))
        return engine, device, manager


@settings(max_examples=examples(70), deadline=None)
@given(
    st.builds(
        WithTier,
        windows=st.sampled_from([(None,), (5,), (None, 6), (9, None, 2)]),
        blocks=st.integers(16, 22),
        sliding=st.integers(0, 16),
        rows=st.sampled_from([2, 7, 16]),
        depth=st.integers(0, 1),
        kept=st.sampled_from([1, 3, 8, 40]),
    ),
    st.lists(st.one_of(REQUESTS, st.just("step"), st.integers(0, 9)), min_size=1, max_size=30),
)
def test_every_answer_is_that_of_a_cache_without_a_tier(base: WithTier, actions: list[Any]) -> None:
    """Windows, chunks, adapters, preemption and aborts, with a tier of any size and a step ahead or not."""
    every_answer.hypothesis.inner_test(base, actions)  # type: ignore[attr-defined]  # hypothesis adds it


@pytest.mark.parametrize("kind", [BlockFile, partial(LockedMemory, lock_pages=lambda *_: 0)])
def test_a_block_comes_back_bit_for_bit(kind: Callable[..., Slots], tmp_path: Path) -> None:
    """Keys, values, and scales of 8 bits, in portions; other blocks stay as they are."""
    layers = [KeysValues.allocate(3, 6 * BLOCK, 8, dtype, torch.device("cpu")).tensors for dtype in DTYPES]
    parts = [part.random_(0, 256) for layer in layers for part in parts_of(layer, 6)]
    before = [part.clone() for part in parts]
    memory = kind(parts, 4, tmp_path) if kind is BlockFile else kind(parts, 4)
    memory.write({3: 5, 0: 2})
    for part in parts:
        part[:, [2, 5]] = 0
    memory.read({5: 3, 1: 0})
    for part, old in zip(parts, before, strict=True):
        old[:, 1], old[:, 2] = old[:, 2].clone(), 0
        assert torch.equal(part, old)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, MemoryStore]:
    """A Gemma 2, of which one layer sees 40 tokens, with three adapters, in a store."""
    config = Gemma2Config(**SIZES | {"head_dim": 8, "sliding_window": 40, "tie_word_embeddings": True})
    world = make_world_of(tmp_path_factory.mktemp("tier"), config, ADAPTERS)
    return world, world.built()


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_restored_prompts_are_answered_like_cached_ones(built: tuple[World, MemoryStore], backend: str) -> None:
    """The same prompt of every model over a cache for one of them: logits have the bits of cached prompts."""
    world, store = built
    prompts = [(model, [1, *range(9, 9 + 120)]) for model in ("base", *world.adapters)]
    ready = world.load(store, backend=backend, kv_memory_gb=6e-5, prefix_host_gb=0.001)
    cached = [next_logprobs(ready, [each]) for prompt in prompts for each in (prompt, prompt)][1::2]
    assert [next_logprobs(ready, [prompt]) for prompt in prompts] == cached
    stats = ready.engine.stats
    assert stats.tier is not None
    assert stats.tier.hit_tokens == stats.prefix_tokens_hit - 4 * 112 == 4 * 112


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prefix_cache": False}, "LORAMUX_PREFIX_CACHE=true"),
        ({"prefix_host_gb": 1e-6}, "less than a block of 4,096 bytes"),
        ({"prefix_host_gb": 1e5}, "LORAMUX_PREFIX_HOST_GB=100000: its file could not be made"),
    ],
)
def test_a_tier_that_cannot_be_is_refused(
    built: tuple[World, MemoryStore], wrong: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """The setting is named, with what to change."""
    world, store = built
    with pytest.raises((SettingsInvalid, ResourcesExhausted), match=message):
        world.load(store, **{"backend": "torch", "prefix_host_gb": 0.001, "cache_dir": tmp_path} | wrong)


def test_a_file_that_fails_ends_the_tier_and_not_the_replica() -> None:
    """A block that could not be written is not found, and nothing is kept afterwards."""
    rows = Rows({at: (at, 0) for at in range(BLOCK)}, 2)
    tier = Tier(rows)
    tier.store(1, 0)
    rows.cache.clear()
    rows.write = fail  # type: ignore[method-assign]
    tier.move()
    tier.store(2, 0)
    assert (1 in tier, 2 in tier) == (False, False)


def fail(blocks: Mapping[int, int]) -> None:
    """Fail as a full disk does."""
    raise OSError(28, f"no space for {len(blocks)} blocks")
