"""States in recorded steps, replayed and launched, on a GPU or in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from inference_service.engine import graph_runner
from inference_service.engine.block_manager import BlockManager
from inference_service.engine.blocks import StateSlots
from inference_service.engine.engine import Engine
from inference_service.engine.graph_runner import GraphRunner
from inference_service.engine.graphs import CudaRecorder
from inference_service.engine.queues import SchedulerLimits
from inference_service.engine.residents import AlwaysResident
from inference_service.engine.tape import TapeRecorder
from loramux_shared.storage.memory import MemoryStore
from tests.kernels.test_launch_keys import noted
from tests.models.test_families import CASES
from tests.support.tiny import make_world_of, run_engine

BLOCK, BLOCKS, SLOTS = 16, 16, 4
LIMITS = SchedulerLimits(max_tokens=16, max_seqs=2, max_adapters=2, max_seq_len=128)
REQUESTS = [
    ("all", list(range(3, 24))),
    ("base", list(range(3, 21))),
    ("wide", [7]),
    ("base", list(range(3, 24))),
]
NEW = 3


def test_recorded_steps_take_states_on(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs that were recorded without a row give the tokens of the torch backend, whatever slots sequences
    have, from snapshots too; and nothing is launched that the start has not launched."""
    monkeypatch.setattr(graph_runner, "RECORDED_ROWS", 16)
    case = CASES["qwen3_5-images"]
    world, store = make_world_of(tmp_path_factory.mktemp("delta"), case.config, case.adapters), MemoryStore()
    world.build(store)
    expected = run_engine(world.load(store, backend="torch", native=False), REQUESTS, NEW)
    ready = world.load(store, backend="triton")
    eager: Any = ready.engine._engine._runner
    recorder = CudaRecorder(torch.device("cuda")) if torch.cuda.is_available() else TapeRecorder()
    runner = GraphRunner(eager._model, eager._lora, BLOCKS, BLOCK, LIMITS, recorder, SLOTS)
    with noted(monkeypatch) as known:
        runner.capture()
    blocks = BlockManager(BLOCKS, BLOCK, states=StateSlots(SLOTS, BLOCK, 1))
    ready.engine._engine = Engine(runner, LIMITS, blocks, AlwaysResident())
    with noted(monkeypatch) as traffic:
        assert run_engine(ready, REQUESTS, NEW) == expected
    assert ready.engine._engine.stats.prefix_tokens_hit > 0
    assert not traffic - known
