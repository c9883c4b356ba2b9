"""The step that sizes a GPU's memory, on the kernels for GPUs."""

from __future__ import annotations

from pathlib import Path

from inference_service.engine.graph_runner import GraphRunner
from inference_service.engine.queues import SchedulerLimits
from inference_service.engine.runner import Runner
from inference_service.engine.tape import TapeRecorder
from inference_service.startup.memory import SCRATCH_BLOCKS, largest_step
from loramux_shared.storage.memory import MemoryStore
from tests.support.tiny import make_world

LIMITS = SchedulerLimits(max_tokens=24, max_seqs=3, max_adapters=2, max_seq_len=200)


def test_the_largest_step_runs_before_anything_is_recorded(tmp_path: Path) -> None:
    """Prompts and decodes of two adapters and the base, with contexts far longer than the scratch cache."""
    world, store = make_world(tmp_path), MemoryStore()
    world.build(store, max_lora_rank=16)
    ready = world.load(store, backend="triton")
    plain = ready.engine._engine._runner
    assert isinstance(plain, Runner)
    adapters = [model.adapter for model in ready.service.catalog if model.adapter]
    runner = GraphRunner(plain._model, plain._lora, SCRATCH_BLOCKS, 16, LIMITS, TapeRecorder())  # type: ignore[arg-type]
    batch = largest_step(LIMITS, adapters, 16)
    assert batch.chunks[0].length == 22
    tokens = [token for _, token in runner.submit(batch).tokens()]
    assert len(tokens) == 3
    assert all(token.logprob is not None for token in tokens)
