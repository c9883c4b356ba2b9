"""Recorded steps of a small model against transformers, in the interpreter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedConfig

from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Sequence as EngineSequence
from inference_service.engine.block_manager import BlockManager
from inference_service.engine.engine import Engine
from inference_service.engine.graph_runner import GraphRunner
from inference_service.engine.plan import SchedulerLimits
from inference_service.engine.residents import AlwaysResident
from inference_service.engine.tape import TapeRecorder
from loramux_shared.storage.memory import MemoryStore
from tests.kernels.test_launch_keys import noted
from tests.support.tiny import make_world_of, oracle, oracle_tokens, run_engine

BLOCK, BLOCKS = 16, 8
NEW = 2


def check_recorded_steps(
    folder: Path,
    config: PreTrainedConfig,
    adapters: Mapping[str, Mapping[str, Any]],
    requests: Sequence[tuple[str, list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Check that answers are those of transformers and PEFT, and that nothing new is launched for them.

    Those of mixtures are the torch backend's, for PEFT mixes no adapters of experts.
    """
    limits = SchedulerLimits(max_tokens=16, max_seqs=2, max_adapters=len(adapters), max_seq_len=64)
    world, store = make_world_of(folder, config, adapters), MemoryStore()
    world.build(store)
    ready = world.load(store, backend="triton")
    eager: Any = ready.engine._engine._runner
    runner = GraphRunner(eager._model, eager._lora, BLOCKS, BLOCK, limits, TapeRecorder())
    with noted(monkeypatch) as known:
        runner.capture()
    manager = BlockManager(BLOCKS, BLOCK, eager._model.config.windows)
    engine = Engine(runner, limits, manager, AlwaysResident())
    answers: dict[str, list[int]] = {}
    for number, (name, prompt) in enumerate(requests):
        params, model = SamplingParams(max_tokens=NEW), ready.service.catalog.resolve(name)
        adapter = model.mixture or model.adapter
        engine.add(EngineSequence(str(number), list(prompt), params, adapter))
        answers[str(number)] = []
    with noted(monkeypatch) as traffic:
        while not engine.idle:
            for output in engine.step():
                assert output.token is not None
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
