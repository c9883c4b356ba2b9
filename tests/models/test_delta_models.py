"""Qwen 3.5 as long as it takes: 31 sequences of 64 new tokens, on every backend, text alone and with images."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig, Qwen3_5Config, Qwen3_5TextConfig

from loramux_shared.bases.read import read_config
from loramux_shared.storage.memory import MemoryStore
from tests.models.test_families import DELTA_VISION, QWEN_DELTA, delta_adapters
from tests.models.test_merge import ready_of
from tests.support.tiny import SIZES, VOCAB, Answers, make_world_of, oracle, oracle_tokens, run_engine

pytestmark = pytest.mark.sweep

MANY, NEW = 31, 64
FEW, FEW_NEW = 5, 6
"""For the interpreter."""
TEXT = SIZES | QWEN_DELTA | {"pad_token_id": 0}
TIED = TEXT | {"tie_word_embeddings": True, "attention_bias": True}
BASES: dict[str, tuple[PreTrainedConfig, dict[str, dict[str, Any]]]] = {
    "text": (Qwen3_5TextConfig(**TEXT), delta_adapters()),
    "tied": (Qwen3_5TextConfig(**TIED), delta_adapters()),
    "images": (
        Qwen3_5Config(text_config=TEXT, vision_config=DELTA_VISION, tie_word_embeddings=False),
        delta_adapters(r".*language_model"),
    ),
}


@pytest.fixture(scope="module", params=BASES)
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    config, adapters = BASES[request.param]
    world, store = make_world_of(tmp_path_factory.mktemp("delta"), config, adapters), MemoryStore()
    file = world.base / "model.safetensors"  # with what predicts several tokens, which nobody reads
    save_file(load_file(file) | {"mtp.fc.weight": torch.randn(48, 96)}, file, {"format": "pt"})
    world.build(store)
    draw = random.Random(11)
    models = ("base", *adapters)
    requests = [
        (models[index % len(models)], [draw.randrange(3, VOCAB) for _ in range(draw.randrange(1, 190))])
        for index in range(MANY)
    ]
    oracles = {name: oracle(world.base, world.adapters.get(name)) for name in models}
    expected = [oracle_tokens(oracles[name], prompt, NEW) for name, prompt in requests]
    return Answers(world, store, requests, expected)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("max_batch_tokens", [2048, 48])
def test_many_sequences_equal_transformers(answers: Answers, max_batch_tokens: int, native: bool) -> None:
    """Alone and among 31, prompts whole and in chunks, compiled and in plain torch; and again from prefixes."""
    ready = answers.world.load(answers.store, max_batch_tokens=max_batch_tokens, native=native, block_size=16)
    assert run_engine(ready, answers.requests, NEW) == answers.expected
    assert run_engine(ready, answers.requests, NEW) == answers.expected
    assert ready.engine.stats.prefix_tokens_hit > 0
    alone = [run_engine(ready, [each], NEW)[0] for each in answers.requests[:4]]
    assert alone == answers.expected[:4]


def test_preemption_changes_no_token(answers: Answers) -> None:
    """Sequences that gave their states back are computed again, where the cache holds two of them."""
    config = read_config(answers.world.base)
    retained = 4 * sum(layer.mixer.cached_features for layer in config.layers)
    cache = 512 * retained + (8 + 4) * config.state_bytes(4)
    ready = answers.world.load(
        answers.store, kv_memory_gb=cache / 1e9, max_batch_seqs=8, max_batch_tokens=64, block_size=16
    )
    assert run_engine(ready, answers.requests, NEW) == answers.expected
    assert ready.engine.stats.preemptions > 0


def test_the_kernels_for_gpus_answer_the_same(answers: Answers) -> None:
    """Kernels in the interpreter answer the same, prompts of several tiles beside decodes."""
    ready = answers.world.load(answers.store, backend="triton", max_batch_tokens=80)
    found = run_engine(ready, answers.requests[:FEW], FEW_NEW)
    assert found == [expected[:FEW_NEW] for expected in answers.expected[:FEW]]


def test_a_merged_adapter_equals_transformers(answers: Answers) -> None:
    """All of the four slices of what a delta rule reads, and queries with their gates, added to the weights."""
    of_all = [index for index, (name, _) in enumerate(answers.requests) if name == "all"]
    ready = ready_of(answers.world, "all", {"serve_base": False})
    found = run_engine(ready, [answers.requests[index] for index in of_all], NEW)
    assert found == [answers.expected[index] for index in of_all]
