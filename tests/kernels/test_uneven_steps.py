"""Recorded steps of layers, adapters and experts that differ, against transformers, in the interpreter."""

from typing import Any

import pytest
import torch
from transformers import Gemma4TextConfig, GptOssConfig, PreTrainedConfig, Qwen3MoeConfig

from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Sequence as EngineSequence
from inference_service.engine.block_manager import BlockManager
from inference_service.engine.engine import Engine
from inference_service.engine.graph_runner import GraphRunner
from inference_service.engine.queues import SchedulerLimits
from inference_service.engine.residents import Residents
from inference_service.engine.tape import TapeRecorder
from tests.kernels.test_launch_keys import noted
from tests.models.test_families import PARTS
from tests.support.tiny import SIZES, VOCAB, make_world_of, oracle, oracle_tokens, run_engine

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels tell of themselves when interpreted")

BLOCK, BLOCKS = 16, 8
NEW = 2
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
    "all": {"r": 3, "target_modules": ["q_proj", "k_proj", "o_proj", "down_proj", "per_layer_projection"]},
    "own": {"r": 3, "lora_alpha": 9, "target_modules": ["embed_tokens", "lm_head"]},
}
REQUESTS = [("all", list(range(5, 24))), ("base", [9, 8, 7]), ("own", [5, 6, 7])]
EXPERTS = Qwen3MoeConfig(**SIZES | PARTS["experts"] | {"num_hidden_layers": 1}, norm_topk_prob=True)
SINKS = GptOssConfig(
    **SIZES, head_dim=16, num_local_experts=5, num_experts_per_tok=2, sliding_window=12, pad_token_id=0
)
OF_EXPERTS: dict[str, dict[str, Any]] = {
    "experts": {
        "r": 3,
        "target_modules": ["o_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    },
    "attention": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
}
REQUESTS_OF_EXPERTS = [
    ("experts", list(range(5, 24))),
    ("base", [9, 8, 7]),
    ("attention", [30, 31]),
    ("attention*2 + experts*-1.5", [9, 8, 7]),
]
SWEPT = pytest.mark.sweep
CASES = {
    "heads, windows and tables": (CONFIG, ADAPTERS, REQUESTS),
    "experts": (EXPERTS, OF_EXPERTS, REQUESTS_OF_EXPERTS),
    "experts with sinks": (SINKS, OF_EXPERTS, REQUESTS_OF_EXPERTS),
}


@pytest.mark.parametrize(
    ("config", "adapters", "requests"),
    [pytest.param(*case, id=name, marks=() if name == "experts" else SWEPT) for name, case in CASES.items()],
)
def test_recorded_steps_answer_as_transformers_and_compile_nothing(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    config: PreTrainedConfig,
    adapters: dict[str, dict[str, Any]],
    requests: list[tuple[str, list[int]]],
) -> None:
    """Requests after the recording are answered as by transformers and PEFT, and launch nothing new."""
    folder = tmp_path_factory.mktemp("recorded")
    limits = SchedulerLimits(max_tokens=16, max_seqs=2, max_adapters=len(adapters), max_seq_len=64)
    world = make_world_of(folder, config, adapters)
    store = world.built()
    ready = world.load(store, backend="triton")
    eager: Any = ready.engine._engine._runner
    runner = GraphRunner(eager._model, eager._lora, BLOCKS, BLOCK, limits, TapeRecorder())
    with noted(monkeypatch) as known:
        runner.capture()
    manager = BlockManager(BLOCKS, BLOCK, eager._model.config.windows)
    engine = Engine(runner, limits, manager, Residents())
    answers: dict[str, list[int]] = {}
    for number, (name, prompt) in enumerate(requests):
        params, model = SamplingParams(max_tokens=NEW), ready.service.catalog.resolve(name)
        adapter = model.mixture or model.adapter
        engine.add(EngineSequence(str(number), list(prompt), params, adapter))
        answers[str(number)] = []
    with noted(monkeypatch) as traffic:
        while not engine.idle:
            for output in engine.step():
                answers[output.seq_id].append(output.token.id)
    models = {name: oracle(world.base, world.adapters.get(name)) for name in ("base", *adapters)}
    plain = world.load(store, backend="torch", native=False)
    expected = [
        oracle_tokens(models[name], prompt, NEW)
        if name in models
        else run_engine(plain, [(name, prompt)], NEW)[0]
        for name, prompt in requests
    ]
    assert [*answers.values()] == expected
    assert not traffic - known
