"""A cache of 8 bits, on a tiny random model: answers do not depend on what is beside a request."""

import random

import pytest

from loramux_shared.storage.memory import MemoryStore
from tests.support.tiny import ADAPTERS, VOCAB, World, run_engine

NEW = 12


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_cache_of_8_bits_answers_the_same_in_any_batch(world: tuple[World, MemoryStore], kind: str) -> None:
    """Alone, beside others, in chunks, behind cached prefixes, after preemption: a scale is a token's own."""
    (base, store), draw = world, random.Random(5)
    lengths = {"base": 40, "all": 9, "rs": 57, "wide": 23}
    requests = [(model, draw.choices(range(3, VOCAB), k=lengths[model])) for model in ("base", *ADAPTERS)]
    settings = {"backend": "torch", "device": "cpu", "kv_cache_dtype": kind}
    ready = base.load(store, **settings)
    alone = [run_engine(ready, [request], NEW)[0] for request in requests]
    tight = {**settings, "max_batch_tokens": 16, "kv_memory_gb": 96 * 2 * 2 * 2 * (8 + 2) / 1e9}
    for each in (ready, preempting := base.load(store, **tight)):
        assert run_engine(each, requests, NEW) == alone
    assert ready.engine.stats.prefix_tokens_hit > 0
    assert preempting.engine.stats.preemptions > 0
    kernels = base.load(store, **settings | {"backend": "triton"})
    assert run_engine(kernels, requests[1:2], 2) == [alone[1][:2]]
