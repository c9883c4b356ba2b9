"""The engine against transformers and PEFT, token for token in float32, on a tiny random model."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from loramux_shared.storage.memory import MemoryStore
from tests.support.tiny import (
    ADAPTERS,
    VOCAB,
    World,
    make_world,
    next_logprobs,
    oracle,
    oracle_tokens,
    run_engine,
)

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
def expected(world: World, requests: list[tuple[str, list[int]]]) -> list[list[int]]:
    models = {name: oracle(world.base, world.adapters.get(name)) for name in MODELS}
    return [oracle_tokens(models[name], prompt, NEW) for name, prompt in requests]


def test_the_adapters_are_told_apart(world: World) -> None:
    """The test would see a swapped adapter: the same prompt gets four different answers."""
    prompt = _prompts(1, 60)[0]
    answers = [
        tuple(oracle_tokens(oracle(world.base, world.adapters.get(name)), prompt, NEW)) for name in MODELS
    ]
    assert len(set(answers)) == 4


@pytest.mark.parametrize("native", [True, False], ids=["compiled", "torch"])
@pytest.mark.parametrize("max_batch_tokens", [1024, 16])
def test_a_mixed_batch_equals_peft(
    world: World,
    store: MemoryStore,
    requests: list[tuple[str, list[int]]],
    expected: list[list[int]],
    max_batch_tokens: int,
    native: bool,
) -> None:
    """Base and three adapters in one batch, prompts whole or in chunks beside those that decode."""
    ready = world.load(store, max_batch_tokens=max_batch_tokens, native=native)
    assert run_engine(ready, requests, NEW) == expected


def test_each_alone_equals_peft(
    world: World, store: MemoryStore, requests: list[tuple[str, list[int]]], expected: list[list[int]]
) -> None:
    """A request alone gives the tokens that it gives in company."""
    ready = world.load(store)
    assert [run_engine(ready, [request], NEW)[0] for request in requests] == expected


def test_thirty_one_others_change_no_token(world: World, store: MemoryStore) -> None:
    """The widest company that the table of speeds knows: 32 requests of all models, against each alone."""
    ready = world.load(store, prefix_cache=False)
    crowd = [(MODELS[index % 4], prompt) for index, prompt in enumerate(_prompts(32, 40))]
    together = run_engine(ready, crowd, NEW)
    assert [run_engine(ready, [request], NEW)[0] for request in crowd[::5]] == together[::5]


@pytest.mark.parametrize("native", [True, False], ids=["compiled", "torch"])
def test_in_bfloat16_company_moves_log_probabilities_by_rounding_only(
    world: World, store: MemoryStore, native: bool
) -> None:
    """The next token's log probabilities, alone and beside 31 others, differ by what bfloat16 rounds."""
    ready = world.load(store, dtype="bfloat16", native=native, prefix_cache=False)
    crowd = [(MODELS[index % 4], prompt) for index, prompt in enumerate(_prompts(32, 40))]
    together = next_logprobs(ready, crowd)
    worst = 0.0
    for place in range(0, 32, 5):
        (alone,) = next_logprobs(ready, [crowd[place]])
        worst = max(worst, *(abs(alone[token] - together[place][token]) for token in alone))
    assert worst < 0.15


def test_preemption_changes_no_token(
    world: World, store: MemoryStore, requests: list[tuple[str, list[int]]], expected: list[list[int]]
) -> None:
    """With a cache too small for all, sequences are preempted, computed again, and give the same tokens."""
    tokens_bytes = 2 * 2 * 2 * 8 * 4
    ready = world.load(store, kv_memory_gb=280 * tokens_bytes / 1e9, block_size=8)
    assert run_engine(ready, requests, NEW) == expected
    assert ready.engine.stats.preemptions > 0


def test_prefix_hits_change_no_token(
    world: World, store: MemoryStore, requests: list[tuple[str, list[int]]], expected: list[list[int]]
) -> None:
    """A second round takes its prefixes from the cache, per adapter, and gives the same tokens."""
    ready = world.load(store, block_size=8)
    assert run_engine(ready, requests, NEW) == expected
    assert run_engine(ready, requests, NEW) == expected
    assert ready.engine.stats.prefix_tokens_hit > 0


def test_base_rows_do_not_depend_on_loaded_adapters(
    world: World, store: MemoryStore, requests: list[tuple[str, list[int]]], expected: list[list[int]]
) -> None:
    """Without a row of an adapter in the batch, a server with adapters answers as the base."""
    ready = world.load(store)
    prompts = [("base", prompt) for name, prompt in requests if name == "base"]
    alone = run_engine(ready, prompts, NEW)
    assert alone == [answer for (name, _), answer in zip(requests, expected, strict=True) if name == "base"]


@pytest.mark.parametrize(
    "config",
    [
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 16},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 500.0,
            }
        },
    ],
    ids=["tied", "biases", "head_dim", "rope-linear", "rope-llama3"],
)
def test_variants_of_the_family_equal_transformers(tmp_path: Path, config: dict[str, object]) -> None:
    """Every switch of a Llama config that is accepted is honoured, adapters included."""
    world = make_world(tmp_path, **config)
    store = MemoryStore()
    world.build(store)
    requests = [(name, prompt) for name, prompt in zip(MODELS, _prompts(4, 60), strict=True)]
    expected = [oracle_tokens(oracle(world.base, world.adapters.get(n)), p, NEW) for n, p in requests]
    assert run_engine(world.load(store), requests, NEW) == expected


def test_sampling_depends_on_the_seed_alone(world: World, store: MemoryStore) -> None:
    """A seeded answer is the same in any company; another seed gives another answer."""
    ready = world.load(store)
    prompt = _prompts(1, 60)[0]
    company = [(name, p) for name, p in zip(MODELS, _prompts(4, 60), strict=True)]
    drawn = {"temperature": 1.0, "top_p": 0.9, "top_k": 40}
    alone = run_engine(ready, [("rs", prompt)], NEW, seed=1, **drawn)[0]
    assert run_engine(ready, [*company, ("rs", prompt)], NEW, seed=1, **drawn)[-1] == alone
    assert run_engine(ready, [("rs", prompt)], NEW, seed=2, **drawn)[0] != alone
