"""The engine against transformers and PEFT, token for token in float32, on a tiny random model."""

import random
from typing import Any

import pytest

from loramux_shared.storage.memory import MemoryStore
from tests.support.greedy import greedy_tokens
from tests.support.tiny import ADAPTERS, VOCAB, World, make_world, oracle, run_engine

NEW = 24
MODELS = ("base", *ADAPTERS)


def _prompts(count: int, longest: int) -> list[list[int]]:
    draw = random.Random(5)
    return [[draw.randrange(3, VOCAB) for _ in range(draw.randrange(1, longest))] for _ in range(count)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def requests() -> list[tuple[str, list[int]]]:
    return [(MODELS[index % 4], prompt) for index, prompt in enumerate(_prompts(12, 60))]


@pytest.fixture(scope="module")
def expected(world: World, store: MemoryStore, requests: list[tuple[str, list[int]]]) -> list[list[int]]:
    models = {name: oracle(world.base, world.adapters.get(name)) for name in MODELS}
    guesses = run_engine(world.load(store), requests, NEW)
    return [
        greedy_tokens(models[name], prompt, guess)
        for (name, prompt), guess in zip(requests, guesses, strict=True)
    ]


CHUNKS = {"max_batch_tokens": 16}
SMALL = {"kv_memory_gb": 280 * 2 * 2 * 2 * 8 * 4 / 1e9}
"""A cache of 280 tokens."""


@pytest.mark.parametrize("block_size", [16, 8])
@pytest.mark.parametrize(
    "settings", [{}, {"max_batch_tokens": 16}, SMALL], ids=["whole", "chunks", "preempted"]
)
def test_a_mixed_batch_equals_peft(
    world: World,
    store: MemoryStore,
    requests: list[tuple[str, list[int]]],
    expected: list[list[int]],
    settings: dict[str, Any],
    block_size: int,
) -> None:
    """Base and adapters in one batch answer as PEFT, in chunks, preempted, with prefixes, compiled or not."""
    ready = world.load(store, block_size=block_size, **settings)
    for _ in range(2):
        assert run_engine(ready, requests, NEW) == expected
    assert settings is SMALL or ready.engine.stats.prefix_tokens_hit > 0
    assert settings is not SMALL or ready.engine.stats.preemptions > 0


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_cache_of_8_bits_answers_the_same_in_any_batch(
    world: World, store: MemoryStore, requests: list[tuple[str, list[int]]], kind: str
) -> None:
    """Alone, beside others, in chunks, behind cached prefixes, after preemption: a scale is a token's own."""
    settings = {"backend": "torch", "device": "cpu", "kv_cache_dtype": kind}
    ready, some = world.load(store, **settings), requests[:4]
    alone = [run_engine(ready, [request], NEW // 2)[0] for request in some]
    tight = {**settings, **CHUNKS, "kv_memory_gb": 96 * 2 * 2 * 2 * (8 + 2) / 1e9}
    for each in (ready, preempting := world.load(store, **tight)):
        assert run_engine(each, some, NEW // 2) == alone
    assert ready.engine.stats.prefix_tokens_hit > 0
    assert preempting.engine.stats.preemptions > 0
    kernels = world.load(store, **settings | {"backend": "triton"})
    assert run_engine(kernels, some[1:2], 2) == [alone[1][:2]]
