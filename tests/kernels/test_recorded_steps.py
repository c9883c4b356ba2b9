"""Recorded steps answer as transformers, and launch nothing that the start has not launched."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import torch
from transformers import Gemma4TextConfig, GptOssConfig, PreTrainedConfig, Qwen3MoeConfig

from inference_service.core.sampling import SamplingParams
from inference_service.engine.backends.triton_lora import TritonLora
from inference_service.engine.execution import graph_runner
from inference_service.engine.execution.graph_runner import GraphRunner
from inference_service.engine.execution.runner import Blocks
from inference_service.engine.scheduling.queues import SchedulerLimits
from loramux_shared.bases.cache import window_blocks
from loramux_shared.bases.config import ModelConfig
from tests.kernels.place import COMPILED
from tests.models.test_families import CASES as FAMILIES, PARTS
from tests.support.recorded import BLOCK, note_launches, runner_of, with_runner
from tests.support.tiny import (
    SIZES,
    VOCAB,
    Replica,
    make_world,
    make_world_of,
    oracle,
    oracle_tokens,
    run_engine,
    sequence,
)
from tests.support.weights import adapter_of

BLOCKS = 32
LIMITS = SchedulerLimits(max_tokens=80, max_seqs=3, max_adapters=2, max_seq_len=512)
"""Steps of 64 rows are neither the smallest nor the largest of those that are not recorded."""


def run(ready: Replica, runner: GraphRunner, requests: list[tuple[str, int, SamplingParams]]) -> None:
    """Run prompts of so many tokens to their end, a new one every step."""
    engine = with_runner(ready, runner, LIMITS, BLOCKS).core
    waiting = [
        sequence(ready, str(number), name, range(3, 3 + length), params)
        for number, (name, length, params) in enumerate(requests)
    ]
    while waiting or not engine.idle:
        if waiting:
            engine.add(waiting.pop())
        engine.step()


def replace_first(lora: TritonLora, config: ModelConfig) -> None:
    """Let the adapter in the first slot leave, for one of another rank and another module."""
    hidden, kv = config.dims.hidden, config.attentions[0].kv_features
    rows = [(1, "attn_k", torch.ones(1, hidden), torch.ones(kv, 1))]
    packed = lora.pack(adapter_of(rows, config.layer_groups))
    lora.leave(0)
    lora.copy(packed, 0)
    lora.enter(0, 0, packed)


@pytest.mark.skipif(COMPILED, reason="kernels tell of themselves when interpreted")
def test_traffic_launches_what_the_start_has_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of all lengths, in graphs or without, scored or not, and a later adapter launch nothing new."""
    monkeypatch.setattr(graph_runner, "RECORDED_ROWS", 16)
    world = make_world(tmp_path)
    ready = world.load(world.built(max_lora_rank=16), backend="triton")
    runner = runner_of(ready, LIMITS, BLOCKS)
    with note_launches(monkeypatch) as one_token:
        run(ready, runner, [("base", 1, SamplingParams(max_tokens=2))])
    with note_launches(monkeypatch) as known:
        runner.capture()
    assert {trace.rows for trace in runner.inspect().traces} == {16, 32, 80}
    replace_first(cast(TritonLora, ready.lora), ready.base.config)
    draw = random.Random(0)
    kinds = [
        SamplingParams(max_tokens=2, temperature=0.8, top_p=0.9, seed=1),
        SamplingParams(max_tokens=3, repetition_penalty=1.3, logit_bias={5: 1.0}),
        SamplingParams(max_tokens=1, prompt_logprobs=1),
        SamplingParams(max_tokens=2, logprobs=2),
    ]
    requests = [
        (draw.choice(["base", "all", "rs", "wide", "rs*0.5+all*2", "wide*0.5"]), length, draw.choice(kinds))
        for length in (1, 3, 17, 40, 64, 80)
    ]
    with note_launches(monkeypatch) as traffic:
        run(ready, runner, [*requests, ("all", 60, kinds[2])])
    assert not traffic - known
    assert traffic - one_token  # a start that runs a token leaves something to be compiled later


class Case(NamedTuple):
    """A base with what differs from layer to layer, its adapters, and prompts."""

    config: PreTrainedConfig
    adapters: Mapping[str, Mapping[str, Any]]
    requests: list[tuple[str, list[int]]]
    new: int = 2
    blocks: Blocks = 8
    slots: int = 0
    limits: SchedulerLimits = SchedulerLimits(max_tokens=16, max_seqs=2, max_adapters=2, max_seq_len=64)


WINDOW = 12
UNEVEN = Gemma4TextConfig(
    **SIZES | {"num_hidden_layers": 2, "num_key_value_heads": 1, "tie_word_embeddings": True},
    layer_types=["sliding_attention", "full_attention"],
    head_dim=16,
    global_head_dim=32,
    attention_k_eq_v=True,
    num_global_key_value_heads=2,
    sliding_window=WINDOW,
    hidden_size_per_layer_input=4,
    vocab_size_per_layer_input=VOCAB,
)
OF_UNEVEN = {
    "all": {"r": 3, "target_modules": ["q_proj", "k_proj", "o_proj", "down_proj", "per_layer_projection"]},
    "own": {"r": 3, "lora_alpha": 9, "target_modules": ["embed_tokens", "lm_head"]},
}
EXPERTS = Qwen3MoeConfig(**SIZES | PARTS["experts"] | {"num_hidden_layers": 1}, norm_topk_prob=True)
SINKS = GptOssConfig(
    **SIZES, head_dim=16, num_local_experts=5, num_experts_per_tok=2, sliding_window=12, pad_token_id=0
)
OF_EXPERTS = {
    "experts": {
        "r": 3,
        "target_modules": ["o_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    },
    "attention": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
}
TO_EXPERTS = [
    ("experts", list(range(5, 24))),
    ("base", [9, 8, 7]),
    ("attention", [30, 31]),
    ("attention*2 + experts*-1.5", [9, 8, 7]),
]
STATES = FAMILIES["qwen3_5-images"]
AGAIN = list(range(3, 24))
CASES = {
    "heads, windows and tables": Case(
        UNEVEN,
        OF_UNEVEN,
        [("all", random.Random(3).choices(range(3, VOCAB), k=90)), ("base", [9, 8, 7]), ("own", [5, 6, 7])],
        blocks=(window_blocks(WINDOW, 16, BLOCK) + 2, 9),
        limits=SchedulerLimits(max_tokens=16, max_seqs=2, max_adapters=2, max_seq_len=144),
    ),
    "experts": Case(EXPERTS, OF_EXPERTS, TO_EXPERTS),
    "experts with sinks": Case(SINKS, OF_EXPERTS, TO_EXPERTS),
    "states": Case(
        STATES.config,
        STATES.adapters,
        [("all", AGAIN), ("base", AGAIN[:18]), ("wide*0.5 + all", [7, 8, 9]), ("base", AGAIN)],
        new=3,
        blocks=16,
        slots=4,
        limits=SchedulerLimits(max_tokens=16, max_seqs=2, max_adapters=2, max_seq_len=128),
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        "heads, windows and tables",
        "experts",
        "states",
        pytest.param("experts with sinks", marks=pytest.mark.sweep),
    ],
)
def test_recorded_steps_answer_as_transformers_and_compile_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Requests after the recording are answered as by transformers and PEFT, and launch nothing new.

    A prompt in chunks reads tables of every group's blocks, and states go on, from snapshots too.
    """
    case = CASES[name]
    world = make_world_of(tmp_path, case.config, case.adapters)
    store = world.built()
    ready = world.load(store, backend="triton")
    runner = runner_of(ready, case.limits, case.blocks, case.slots)
    with note_launches(monkeypatch) as known:
        runner.capture()
    with note_launches(monkeypatch) as traffic:
        replayed = with_runner(ready, runner, case.limits, case.blocks, case.slots)
        answers = run_engine(replayed, case.requests, case.new)
    models = {name: oracle(world.base, world.adapters.get(name)) for name in ("base", *case.adapters)}
    plain = world.load(store, backend="torch", native=False)
    assert answers == [
        oracle_tokens(models[name], prompt, case.new)
        if name in models
        else run_engine(plain, [(name, prompt)], case.new)[0]
        for name, prompt in case.requests
    ]
    assert not traffic - known
    assert not case.slots or replayed.core.stats.prefix_tokens_hit > 0
