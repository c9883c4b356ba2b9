"""States of a real decoder: a request that begins behind a prefix begins with the very state that it left."""

import random
from typing import Any

import pytest
from transformers import Qwen3_5TextConfig

from inference_service.engine.block_manager import BlockManager
from inference_service.engine.blocks import StateSlots
from inference_service.engine.engine import Engine
from inference_service.engine.queues import SchedulerLimits
from inference_service.engine.residents import Residents
from inference_service.engine.runner import Runner
from loramux_shared.storage.memory import MemoryStore
from tests.models.test_families import PARTS
from tests.support.tiny import SIZES, VOCAB, make_world_of, run_engine

BLOCK = 16
LIMITS = SchedulerLimits(max_tokens=32, max_seqs=3, max_adapters=2, max_seq_len=256)
BLOCKS = 80
TURNS = 4
QWEN = Qwen3_5TextConfig(
    **SIZES
    | PARTS["qwen_delta"]
    | {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    pad_token_id=0,
)
ADAPTERS: dict[str, dict[str, Any]] = {
    "mixers": {"r": 8, "lora_alpha": 16, "target_modules": ["in_proj_qkv", "in_proj_z", "q_proj", "out_proj"]},
    "gates": {"r": 4, "lora_alpha": 8, "target_modules": ["in_proj_a", "in_proj_b", "down_proj"]},
}


@pytest.mark.parametrize(("native", "slots", "part"), [(False, 6, 0.1), (True, 20, 0.4)])
def test_conversations_go_on_from_their_states(
    tmp_path_factory: pytest.TempPathFactory, native: bool, slots: int, part: float
) -> None:
    """Requests of a base and adapters, side by side, turn by turn, answer with snapshots of prefixes, many or
    few, as from the beginning, and a part of the conversation is not computed again.
    """
    world, store = make_world_of(tmp_path_factory.mktemp("states"), QWEN, ADAPTERS), MemoryStore()
    world.build(store)
    ready = world.load(store, native=native, block_size=BLOCK)
    eager: Any = ready.engine._engine._runner
    draw = random.Random(4)
    beginning = draw.choices(range(3, VOCAB), k=40)
    stated = [(name, [*beginning, number + 3]) for number, name in enumerate(["base", *ADAPTERS, "base"])]
    engines = []
    for flag in (True, False):
        states = StateSlots(slots, BLOCK, 2 if flag else None)
        manager = BlockManager(BLOCKS, BLOCK, states=states, prefix_cache=flag)
        runner = Runner(eager._model, eager._lora, BLOCKS, BLOCK, slots)
        engines.append(Engine(runner, LIMITS, manager, Residents()))
    for _ in range(TURNS):
        answers = []
        for engine in engines:
            ready.engine._engine = engine
            answers.append(run_engine(ready, stated, 9))
        assert answers[0] == answers[1]
        more = draw.choices(range(3, VOCAB), k=7)
        stated = [
            (name, prompt + answer + more) for (name, prompt), answer in zip(stated, answers[0], strict=True)
        ]
    assert engines[0].stats.prefix_tokens_hit > engines[0].stats.prefix_tokens_queried * part
    assert engines[1].stats.prefix_tokens_hit == 0
