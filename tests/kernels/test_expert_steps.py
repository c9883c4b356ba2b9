"""Recorded steps of a mixture: routed anew at every replay, with adapters of experts beside the base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GptOssConfig, PreTrainedConfig, Qwen3MoeConfig

from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Sequence
from inference_service.engine.block_manager import BlockManager
from inference_service.engine.engine import Engine
from inference_service.engine.graph_runner import GraphRunner
from inference_service.engine.plan import SchedulerLimits
from inference_service.engine.residents import AlwaysResident
from inference_service.engine.tape import TapeRecorder
from loramux_shared.storage.memory import MemoryStore
from tests.kernels.test_launch_keys import noted
from tests.support.tiny import SIZES, make_world_of, oracle, oracle_tokens

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels tell of themselves when interpreted")

BLOCK, BLOCKS = 16, 8
LIMITS = SchedulerLimits(max_tokens=16, max_seqs=2, max_adapters=2, max_seq_len=64)
CONFIG = Qwen3MoeConfig(
    **SIZES | {"num_hidden_layers": 1},
    num_experts=5,
    num_experts_per_tok=2,
    moe_intermediate_size=20,
    norm_topk_prob=True,
)
SINKS = GptOssConfig(
    **SIZES, head_dim=16, num_local_experts=5, num_experts_per_tok=2, sliding_window=12, pad_token_id=0
)
ADAPTERS: dict[str, dict[str, Any]] = {
    "experts": {
        "r": 3,
        "target_modules": ["o_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    },
    "attention": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
}
REQUESTS = [("experts", list(range(5, 24))), ("base", [9, 8, 7]), ("attention", [30, 31])]
NEW = 2


@pytest.mark.parametrize(
    "config", [CONFIG, pytest.param(SINKS, marks=pytest.mark.sweep)], ids=["qwen3-moe", "gpt-oss"]
)
def test_recorded_steps_answer_as_transformers_and_compile_nothing(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, config: PreTrainedConfig
) -> None:
    """Whoever comes after the recording, in whatever order: prompts in chunks, beside decoding and alone."""
    world, store = make_world_of(tmp_path_factory.mktemp("mixture"), config, ADAPTERS), MemoryStore()
    world.build(store)
    ready = world.load(store, backend="triton")
    eager: Any = ready.engine._engine._runner
    runner = GraphRunner(eager._model, eager._lora, BLOCKS, BLOCK, LIMITS, TapeRecorder())
    with noted(monkeypatch) as known:
        runner.capture()
    manager = BlockManager(BLOCKS, BLOCK, eager._model.config.windows)
    engine = Engine(runner, LIMITS, manager, AlwaysResident())
    answers: dict[str, list[int]] = {}
    for number, (name, prompt) in enumerate(REQUESTS):
        params, adapter = SamplingParams(max_tokens=NEW), ready.service.catalog.get(name).adapter
        engine.add(Sequence(str(number), list(prompt), params, adapter))
        answers[str(number)] = []
    with noted(monkeypatch) as traffic:
        while not engine.idle:
            for output in engine.step():
                assert output.token is not None
                answers[output.seq_id].append(output.token.id)
    models = {name: oracle(world.base, world.adapters.get(name)) for name in ("base", *ADAPTERS)}
    assert [*answers.values()] == [oracle_tokens(models[name], prompt, NEW) for name, prompt in REQUESTS]
    assert not traffic - known
