"""Sliding layers with separate blocks, on a real decoder: the output is right with the fewest blocks."""

import random
from pathlib import Path
from typing import Any

from transformers import Gemma3TextConfig

from inference_service.engine.block_manager import BlockManager
from inference_service.engine.engine import Engine
from inference_service.engine.graph_runner import GraphRunner
from inference_service.engine.queues import SchedulerLimits
from inference_service.engine.residents import Residents
from inference_service.engine.tape import TapeRecorder
from loramux_shared.bases.cache import window_blocks
from tests.support.tiny import SIZES, VOCAB, make_world_of, oracle, oracle_tokens, run_engine

BLOCK = 16
WINDOW = 20
NEW = 3
LIMITS = SchedulerLimits(max_tokens=16, max_seqs=1, max_adapters=3, max_seq_len=144)
BLOCKS = window_blocks(WINDOW, 16, BLOCK) + 2, 20
GEMMA3 = Gemma3TextConfig(
    **SIZES,
    head_dim=16,
    sliding_window=WINDOW,
    layer_types=["sliding_attention", "full_attention"],
    query_pre_attn_scalar=8,
    rope_local_base_freq=100.0,
)


def test_recorded_steps_see_the_blocks_of_every_group(tmp_path: Path) -> None:
    """Kernels in the interpreter read tables that are filled for each step: a prompt in chunks, then tokens."""
    world = make_world_of(tmp_path, GEMMA3, {"q": {"r": 3, "target_modules": ["q_proj"]}})
    prompt = random.Random(3).choices(range(3, VOCAB), k=90)
    expected = oracle_tokens(oracle(world.base, world.adapters["q"]), prompt, NEW)
    ready = world.load(world.built(max_lora_rank=16), backend="triton", block_size=BLOCK)
    eager: Any = ready.engine._engine._runner
    runner = GraphRunner(eager._model, eager._lora, BLOCKS, BLOCK, LIMITS, TapeRecorder())
    runner.capture()
    ready.engine._engine = Engine(runner, LIMITS, BlockManager(BLOCKS, BLOCK, (WINDOW, None)), Residents())
    assert run_engine(ready, [("q", prompt)], NEW) == [expected]
