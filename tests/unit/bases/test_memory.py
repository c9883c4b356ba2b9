"""The memory budget: what fits, and the message when a base does not."""

import re
from dataclasses import replace

import pytest

from loramux_shared.bases.cache import Cache, KeptTokens
from loramux_shared.bases.memory import Needs, plan_memory, token_bytes, weights_bytes
from loramux_shared.bases.read import read_fields
from loramux_shared.faults import ResourcesExhausted
from loramux_shared.runtime import Rounding
from tests.support.hub_configs import HUB_CONFIGS

NEEDS = Needs(weights=16 * 10**9, adapters=10**9, activations=2 * 10**9, graphs=10**9)
CACHE = Cache((KeptTokens(None, 131072),), block_size=16, longest=8192, seqs=64, rows=2048, whole=True)
"""A cache of Llama-3 8B in bfloat16, for 64 sequences."""


def test_a_token_reads_all_matrices_but_the_embeddings_and_experts_that_are_not_chosen() -> None:
    """A token reads neither the embeddings nor the experts that the router does not choose."""
    dense, mixture = (read_fields(HUB_CONFIGS[name]) for name in ("Llama-3.1", "Qwen3-30B-A3B"))
    table = dense.dims.vocab * dense.dims.hidden
    for rounding in (Rounding.NONE, Rounding.INT8, Rounding.INT4):
        reads = token_bytes(dense, 2, rounding)
        assert reads == weights_bytes(dense, 2, "cpu", rounding) - 2 * table, rounding
    assert token_bytes(mixture, 1, Rounding.NONE) == pytest.approx(3.03e9, rel=0.01)  # of 30.5 billion


def test_the_cache_is_not_larger_than_its_use_or_its_ceiling() -> None:
    """The cache has at most the blocks that all sequences can fill, and the bytes of its ceiling."""
    assert plan_memory(10**12, NEEDS, CACHE, share=0.9).blocks == (64 * 8192 // 16,)
    plan = plan_memory(10**12, NEEDS, CACHE, share=0.9, ceiling=4 * 10**9)
    assert 4 * 10**9 - 16 * 131072 < plan.kv_bytes <= 4 * 10**9


@pytest.mark.parametrize("kv_bytes", [None, 10**9])
def test_steps_that_do_not_fit_are_refused_with_the_numbers(kv_bytes: int | None) -> None:
    """A card that weights and adapters fill: every item, in GB, and the settings that help."""
    with pytest.raises(ResourcesExhausted) as caught:
        plan_memory(2 * 10**9, NEEDS, replace(CACHE, kv_bytes=kv_bytes), share=0.9)
    message = str(caught.value)
    assert "16.00 GB of weights and 1.00 GB of adapters, 2.00 GB are free; steps need 3.00 GB" in message
    assert f"GB and the key-value cache {1 if kv_bytes else 0}.00 GB" in message
    settings = {f"LORAMUX_{name}" for name in ("KV_MEMORY_GB", "MAX_BATCH_TOKENS", "MAX_BATCH_SEQS")}
    assert set(re.findall(r"LORAMUX_\w+", message)) == settings


def test_a_sequence_that_was_promised_must_fit_and_another_is_cut() -> None:
    """A deployment's max_seq_len is kept or refused; the model's own longest sequence may be cut."""
    small = replace(CACHE, kv_bytes=4096 * 131072)
    with pytest.raises(ResourcesExhausted, match=r"holds 4096 tokens \(0.54 GB at 131072 .* max_seq_len=8192"):
        plan_memory(63 * 10**9, NEEDS, small, share=0.9)
    assert plan_memory(63 * 10**9, NEEDS, replace(small, whole=False), share=0.9).max_seq_len == 4096


def test_states_have_slots_for_all_sequences_and_the_rest_for_snapshots() -> None:
    """Snapshots get a quarter of the memory that the sequences' states leave, spaced for one full prompt."""
    cache = replace(CACHE, kv_bytes=20 * 10**9, state_bytes=50 * 10**6)
    plan = plan_memory(63 * 10**9, NEEDS, cache, share=0.9)
    tokens = plan.blocks[0] * 16 * 131072
    snapshots = plan.slots - 64
    assert plan.kv_bytes == tokens + plan.slots * 50 * 10**6
    assert 0 <= 20 * 10**9 - plan.kv_bytes < 16 * 131072 + 50 * 10**6
    assert snapshots == tokens // 3 // (50 * 10**6)
    assert plan.spacing is not None
    assert snapshots - 1 <= plan.blocks[0] // plan.spacing <= snapshots
    assert plan_memory(63 * 10**9, NEEDS, replace(cache, kv_bytes=plan.kv_bytes), share=0.9) == plan
    assert plan.seqs == 64
    fewer = plan_memory(
        63 * 10**9, NEEDS, replace(cache, kv_bytes=10**9, every_seat=False, whole=False), share=0.9
    )
    assert fewer.seqs == fewer.tokens * 131072 // (50 * 10**6) < 10
    alone = plan_memory(63 * 10**9, NEEDS, replace(cache, snapshots=False), share=0.9)
    assert (alone.slots, alone.spacing) == (64, None)


def test_states_that_do_not_fit_are_refused_with_the_numbers() -> None:
    """A refusal of recurrent states has their count and their bytes."""
    cache = replace(CACHE, kv_bytes=10**9, state_bytes=50 * 10**6)
    with pytest.raises(ResourcesExhausted, match="64 sequences' states of 50000000 bytes"):
        plan_memory(63 * 10**9, NEEDS, cache, share=0.9)
