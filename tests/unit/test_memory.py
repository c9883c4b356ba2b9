"""The memory budget: what fits, and what is said when it does not."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open
from structlog.testing import capture_logs

from loramux_shared.bases.cache import Cache, Kept
from loramux_shared.bases.memory import GB, Needs, needs_of, plan_memory
from loramux_shared.bases.read import read_config
from loramux_shared.faults import ResourcesExhausted
from loramux_shared.settings import InferenceSettings
from loramux_shared.storage.memory import MemoryStore
from tests.support.tiny import SIZES, make_world

NEEDS = Needs(weights=16 * 10**9, adapters=10**9, activations=2 * 10**9, graphs=10**9)
CACHE = Cache((Kept(None, 131072),), block_size=16, longest=8192, seqs=64, rows=2048, whole=True)
"""Of Llama-3 8B in bfloat16, for 64 sequences."""


def test_the_cache_takes_its_share_of_what_steps_leave() -> None:
    """63 GB free, 3 GB for steps: 90 % of 60 GB, in whole blocks."""
    plan = plan_memory(63 * 10**9, NEEDS, CACHE, share=0.9)
    assert plan.blocks == (54 * 10**9 // 131072 // 16,)
    assert plan.kv_bytes == plan.blocks[0] * 16 * 131072
    assert plan.max_seq_len == 8192


def test_the_cache_is_not_larger_than_its_use_or_its_ceiling() -> None:
    """What all sequences at their longest need is enough; a ceiling is not exceeded."""
    assert plan_memory(10**12, NEEDS, CACHE, share=0.9).blocks == (64 * 8192 // 16,)
    plan = plan_memory(10**12, NEEDS, CACHE, share=0.9, ceiling=4 * 10**9)
    assert 4 * 10**9 - 16 * 131072 < plan.kv_bytes <= 4 * 10**9


def test_a_size_that_is_said_is_taken_as_it_is() -> None:
    """kv_memory_gb may take all that steps leave, which is more than the usual share."""
    plan = plan_memory(63 * 10**9, NEEDS, replace(CACHE, kv_bytes=60 * 10**9), share=0.5)
    assert plan.kv_bytes > 59.9e9


@pytest.mark.parametrize("kv_bytes", [None, 10**9])
def test_steps_that_do_not_fit_are_refused_with_the_numbers(kv_bytes: int | None) -> None:
    """A card that weights and adapters fill: every item, in GB, and the settings that help."""
    with pytest.raises(ResourcesExhausted) as caught:
        plan_memory(2 * 10**9, NEEDS, replace(CACHE, kv_bytes=kv_bytes), share=0.9)
    said = str(caught.value)
    assert "16.00 GB of weights and 1.00 GB of adapters, 2.00 GB are free; steps need 3.00 GB" in said
    assert f"cache {1 if kv_bytes else 0}.00 GB" in said
    assert set(re.findall(r"LORAMUX_\w+", said)) == {
        "LORAMUX_KV_MEMORY_GB",
        "LORAMUX_MAX_BATCH_TOKENS",
        "LORAMUX_MAX_BATCH_SEQS",
    }


def test_a_cache_that_is_larger_than_what_is_left_is_refused() -> None:
    """The size that the settings ask for is not cut silently."""
    with pytest.raises(ResourcesExhausted, match=r"steps need 3.00 GB and the key-value cache 20.00 GB"):
        plan_memory(22 * 10**9, NEEDS, replace(CACHE, kv_bytes=20 * 10**9), share=0.9)


def test_a_sequence_that_was_promised_must_fit_and_another_is_cut() -> None:
    """A deployment's max_seq_len is kept or refused; the model's own longest sequence may be cut."""
    small = replace(CACHE, kv_bytes=4096 * 131072)
    with pytest.raises(ResourcesExhausted, match=r"holds 4096 tokens \(0.54 GB at 131072 .* max_seq_len=8192"):
        plan_memory(63 * 10**9, NEEDS, small, share=0.9)
    assert plan_memory(63 * 10**9, NEEDS, replace(small, whole=False), share=0.9).max_seq_len == 4096


def test_needs_follow_the_model_and_the_settings(tmp_path: Path) -> None:
    """Weights are those of the checkpoint; steps grow with the batch; graphs cost nothing without graphs."""
    base = make_world(tmp_path).base
    config = read_config(base, None)
    with safe_open(str(base / "model.safetensors"), "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 - no mapping
    matrices = sum(tensor.nbytes for tensor in tensors if tensor.dim() == 2)
    settings = InferenceSettings(deployment="tiny", max_batch_tokens=100, max_batch_seqs=8)
    needs = needs_of(config, 4, 77, settings, "cpu", graphs=False)
    assert (needs.weights, needs.adapters, needs.graphs) == (matrices, 77, 0)
    assert needs_of(config, 2, 77, settings, "cpu", graphs=False).weights == matrices / 2
    wider = settings.model_copy(update={"max_batch_tokens": 200})
    more = needs_of(config, 4, 77, wider, "cpu", graphs=True)
    assert more.activations - needs.activations >= 100 * 4 * (2 * SIZES["intermediate_size"])
    assert more.graphs > 0


def test_the_start_logs_a_line_per_item(tmp_path: Path) -> None:
    """The bank, weights, adapters, activations, graphs, the cache and what is left, in GB."""
    world, store = make_world(tmp_path), MemoryStore()
    world.build(store)
    with capture_logs() as logs:
        ready = world.load(store, kv_memory_gb=0.01)
    sizes = {entry["item"]: entry["gb"] for entry in logs if entry["event"] == "memory"}
    assert list(sizes) == [
        "bank of adapters",
        "weights",
        "adapters",
        "activations",
        "graphs",
        "libraries",
        "key-value cache",
        "left",
    ]
    stats = ready.engine.stats
    assert sizes["key-value cache"] == round(stats.blocks_total * 16 * 2 * 2 * 2 * 8 * 4 / GB, 3)
    assert sizes["left"] > 0
