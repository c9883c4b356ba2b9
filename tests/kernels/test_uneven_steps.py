"""Recorded steps of layers that differ in their heads and windows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma4TextConfig

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
from tests.support.tiny import SIZES, VOCAB, make_world_of, oracle, oracle_tokens

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels tell of themselves when interpreted")

BLOCK, BLOCKS = 16, 8
LIMITS = SchedulerLimits(max_tokens=16, max_seqs=2, max_adapters=1, max_seq_len=64)
CONFIG = Gemma4TextConfig(
    **SIZES | {"num_hidden_layers": 2, "num_key_value_heads": 1, "tie_word_embeddings": True},
    layer_types=["sliding_attention", "full_attention"],
    head_dim=16,
    global_head_dim=32,
    attention_k_eq_v=True,
    num_global_key_value_heads=2,
    sliding_window=12,
    hidden_size_per_layer_input=4,
    vocab_size_per_layer_input=VOCAB,
)
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"r": 3, "target_modules": ["q_proj", "k_proj", "o_proj", "down_proj", "per_layer_projection"]}
}
REQUESTS = [("all", list(range(5, 24))), ("base", [9, 8, 7])]
NEW = 2


def test_recorded_steps_answer_as_transformers_and_compile_nothing(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables for each way to cut and each window, filled anew for prompts in chunks and for decoding."""
    world, store = make_world_of(tmp_path_factory.mktemp("uneven"), CONFIG, ADAPTERS), MemoryStore()
    world.build(store)
    ready = world.load(store, backend="triton")
    eager: Any = ready.engine._engine._runner
    runner = GraphRunner(eager._model, eager._lora, BLOCKS, BLOCK, LIMITS, TapeRecorder())
    with noted(monkeypatch) as known:
        runner.capture()
    blocks = BlockManager(BLOCKS, BLOCK, eager._model.config.windows)
    engine = Engine(runner, LIMITS, blocks, AlwaysResident())
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
