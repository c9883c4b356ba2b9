"""Sliding layers with separate blocks, on a real decoder: the output is right with the fewest blocks."""

import random
from dataclasses import replace
from typing import Any

import pytest
from transformers import Gemma3TextConfig

from inference_service.engine.block_manager import BlockManager
from inference_service.engine.engine import Engine
from inference_service.engine.graph_runner import GraphRunner
from inference_service.engine.queues import SchedulerLimits
from inference_service.engine.residents import Residents
from inference_service.engine.tape import TapeRecorder
from loramux_shared.bases.cache import window_blocks
from loramux_shared.storage.memory import MemoryStore
from tests.support.tiny import ADAPTERS, SIZES, VOCAB, World, make_world_of, oracle, oracle_tokens, run_engine

BLOCK = 16
WINDOW = 20
NEW = 24
LIMITS = SchedulerLimits(max_tokens=16, max_seqs=4, max_adapters=3, max_seq_len=144)
EVERYTHING = 20
SLIDING = window_blocks(WINDOW, LIMITS.max_tokens, BLOCK)
GEMMA3 = Gemma3TextConfig(
    **SIZES,
    head_dim=16,
    sliding_window=WINDOW,
    layer_types=["sliding_attention", "full_attention"],
    query_pre_attn_scalar=8,
    rope_local_base_freq=100.0,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, MemoryStore]:
    world = make_world_of(tmp_path_factory.mktemp("gemma3"), GEMMA3, ADAPTERS)
    return world, world.built(max_lora_rank=16)


@pytest.fixture(scope="module")
def requests() -> list[tuple[str, list[int]]]:
    """Prompts of many windows, some of which begin alike."""
    draw = random.Random(3)
    common = [draw.randrange(3, VOCAB) for _ in range(70)]
    lengths = [(70, 30), (50, 40), (0, 9), (70, 10), (64, 1), (0, 80)]
    return [
        (
            ("base", "all", "base", "base", "all", "wide")[index],
            common[:shared] + draw.choices(range(3, VOCAB), k=own),
        )
        for index, (shared, own) in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def expected(world: tuple[World, MemoryStore], requests: list[tuple[str, list[int]]]) -> list[list[int]]:
    models = {name: oracle(world[0].base, world[0].adapters.get(name)) for name, _ in requests}
    return [oracle_tokens(models[name], prompt, NEW) for name, prompt in requests]


def test_recorded_steps_see_the_blocks_of_every_group(
    world: tuple[World, MemoryStore], requests: list[tuple[str, list[int]]], expected: list[list[int]]
) -> None:
    """Kernels in the interpreter read tables that are filled for each step: a prompt in chunks, then tokens."""
    ready = world[0].load(world[1], backend="triton", block_size=BLOCK)
    eager: Any = ready.engine._engine._runner
    blocks = SLIDING + 2, EVERYTHING
    limits = replace(LIMITS, max_seqs=1)
    runner = GraphRunner(eager._model, eager._lora, blocks, BLOCK, limits, TapeRecorder())
    runner.capture()
    manager = BlockManager(blocks, BLOCK, (WINDOW, None))
    ready.engine._engine = Engine(runner, limits, manager, Residents())
    assert run_engine(ready, requests[1:2], 3) == [expected[1][:3]]
