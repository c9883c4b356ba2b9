"""Vectors of texts against transformers and PEFT in float32, while others are answered in the same batches."""

from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import pytest

from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Batch, Chunk, Sequence, Vector
from inference_service.engine.execution.runner import lay_out
from loramux_shared.runtime import Pooling
from loramux_shared.storage.memory import MemoryStore
from tests.support.pooled import cached_oracle, expected_of, run_pooled
from tests.support.tiny import World, oracle_tokens

MODELS = ("base", "all", "rs", "wide")
PROMPTS = [[3 + (at * 17 + place * 5) % 190 for at in range(length)] for place, length in enumerate((1, 40, 9))]
REQUESTS = [
    (model, prompt, pooling)
    for prompt in PROMPTS
    for model in MODELS
    for pooling in (Pooling.LAST, Pooling.MEAN)
]
NEW = 6


def assert_close(found: Seq[Vector], required: Seq[Vector]) -> None:
    for one, other in zip(found, required, strict=True):
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"native": False, "max_batch_tokens": 48},
        pytest.param({"deterministic": True}, marks=pytest.mark.sweep),
    ],
    ids=["compiled", "torch, in chunks", "deterministic"],
)
def test_vectors_equal_transformers_beside_answers(
    world: tuple[World, MemoryStore], settings: dict[str, Any]
) -> None:
    """The base and adapters of several ranks, last and mean, while answers of theirs are under way."""
    ready = world[0].load(world[1], **settings)
    vectors, answers = run_pooled(ready, REQUESTS, MODELS, PROMPTS[1], NEW)
    assert_close(vectors, [expected_of(world[0], *request) for request in REQUESTS])
    for model, answer in zip(MODELS, answers, strict=True):
        assert answer == oracle_tokens(
            cached_oracle(world[0].base, world[0].adapters.get(model)), PROMPTS[1], NEW
        )


def test_what_the_prefix_cache_holds_changes_nothing(world: tuple[World, MemoryStore]) -> None:
    """The last state is computed behind a prefix that is found, a mean from every row."""
    ready = world[0].load(world[1], block_size=8)
    query = REQUESTS[len(MODELS) * 2 : len(MODELS) * 4]
    expected = [expected_of(world[0], *request) for request in query]
    for _ in range(2):
        assert_close(run_pooled(ready, query)[0], expected)
    hit = ready.engine.stats.prefix_tokens_hit
    assert hit == len(MODELS) * 32


def test_a_preemption_changes_nothing(world: tuple[World, MemoryStore]) -> None:
    """A sequence that gave its blocks back in the middle of its prompt adds no row to its mean twice."""
    block_bytes = 8 * 2 * 2 * 2 * 8 * 4
    ready = world[0].load(world[1], block_size=8, kv_memory_gb=8.5 * block_bytes / 1e9, max_batch_tokens=3)
    vectors, [answer] = run_pooled(ready, [("base", PROMPTS[1], Pooling.MEAN)], ["base"], PROMPTS[2], 20)
    assert ready.engine.stats.preemptions > 0
    assert_close(vectors, [expected_of(world[0], "base", PROMPTS[1], Pooling.MEAN)])
    assert answer == oracle_tokens(cached_oracle(world[0].base, None), PROMPTS[2], 20)
    last, mean = (
        Sequence(kind, [1] * 6, SamplingParams(max_tokens=0), pooling=kind)
        for kind in (Pooling.LAST, Pooling.MEAN)
    )
    mean.progress.num_pooled = 4
    assert lay_out(Batch((Chunk(last, 4), Chunk(mean, 4))), {}).pooled == []  # neither has a row of the vector
