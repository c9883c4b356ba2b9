"""DoRA and trained biases against transformers and PEFT, token for token in float32, on a tiny random model."""

from __future__ import annotations

import random
from typing import Any

import pytest
from transformers import GraniteConfig

from loramux_shared.storage.memory import MemoryStore
from tests.models.test_merge import ready_of
from tests.support.tiny import SIZES, VOCAB, Answers, make_world_of, oracle, oracle_tokens, run_engine

NEW = 12
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 8, "target_modules": ALL},
    "dora": {
        "r": 4,
        "lora_alpha": 9,
        "use_dora": True,
        "use_rslora": True,
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 7, r"layers\.0\.mlp\.up_proj": 2},
        "alpha_pattern": {"down_proj": 3},
    },
    "biases": {"r": 3, "lora_alpha": 5, "bias": "all", "target_modules": ["v_proj", "down_proj"]},
    "both": {
        "r": 2,
        "lora_alpha": 5,
        "use_dora": True,
        "bias": "lora_only",
        "target_modules": ["q_proj", "o_proj"],
    },
    "lora_bias": {
        "r": 3,
        "lora_alpha": 7,
        "lora_bias": True,
        "target_modules": ["k_proj", "up_proj", "o_proj"],
    },
}
MODELS = ("base", *KINDS)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    config = GraniteConfig(**SIZES, attention_bias=True, mlp_bias=True, logits_scaling=2.0)
    world = make_world_of(tmp_path_factory.mktemp("affine"), config, KINDS)
    store = MemoryStore()
    world.build(store)
    draw = random.Random(3)
    lengths = (40, 21, 33, 3, 17, 26, 9, 12, 4)
    requests = [
        (MODELS[index % len(MODELS)], [draw.randrange(3, VOCAB) for _ in range(length)])
        for index, length in enumerate(lengths)
    ]
    models = {name: oracle(world.base, world.adapters.get(name)) for name in MODELS}
    expected = [oracle_tokens(models[name], prompt, NEW) for name, prompt in requests]
    return Answers(world, store, requests, expected)


@pytest.mark.parametrize("native", [True, False], ids=["compiled", "torch"])
def test_a_mixed_batch_equals_peft(answers: Answers, native: bool) -> None:
    """Every kind beside plain LoRA and the base, through preemption and prefix hits."""
    ready = answers.world.load(
        answers.store,
        native=native,
        block_size=8,
        kv_memory_gb=128 * 2 * 2 * 2 * 8 * 4 / 1e9,  # tokens, layers, keys and values, heads, their dim, bytes
        max_batch_seqs=6,
    )
    assert run_engine(ready, answers.requests, NEW) == answers.expected
    assert ready.engine.stats.preemptions > 0
    for _ in range(2):  # alone, so that nobody needs its blocks meanwhile
        assert run_engine(ready, answers.requests[2:3], NEW) == answers.expected[2:3]
    assert ready.engine.stats.prefix_tokens_hit > 0


def test_each_alone_equals_peft(answers: Answers) -> None:
    """No row of another adapter is there, and none of the base."""
    ready = answers.world.load(answers.store)
    for request, expected in zip(answers.requests[1:6], answers.expected[1:6], strict=True):
        assert run_engine(ready, [request], NEW) == [expected]


def test_the_kernels_for_gpus_answer_the_same(answers: Answers) -> None:
    """Kernels in the interpreter answer the same, a kind beside another and the base."""
    ready = answers.world.load(answers.store, backend="triton", max_batch_tokens=32)
    picked = (3, 7, 8)
    found = run_engine(ready, [answers.requests[index] for index in picked], 1)
    assert found == [answers.expected[index][:1] for index in picked]


@pytest.mark.parametrize("name", ["dora", "both", "lora_bias"])
def test_merged_weights_and_biases_equal_peft(answers: Answers, name: str) -> None:
    """Merged weights equal PEFT, with biases where the base has none too."""
    ready = ready_of(answers.world, name, {"serve_base": False})
    at = MODELS.index(name)
    assert ready.service.catalog.get(name).adapter is None
    assert run_engine(ready, [answers.requests[at]], NEW) == [answers.expected[at]]
