"""Small steps on a CPU that are replayed: the same bits as operation by operation."""

import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch

from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import StepOutput
from inference_service.engine.backends import replayed
from inference_service.engine.kernels.cpu.ops import CpuOps
from inference_service.engine.kernels.cpu.program import Buffers, Program, Recorder
from tests.models.test_families import CASES
from tests.support.cases import cases
from tests.support.native import open_native
from tests.support.tiny import VOCAB, Replica, make_world_of, sequence


class Programs:
    """Counts programs that were written down, those that are still held, and their runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.written = self.runs = 0
        self.held: WeakSet[Program] = WeakSet()
        run, program = Program.run, Recorder.program

        def counted(one: Program) -> None:
            self.runs += 1
            run(one)

        def noted(recorder: Recorder) -> Program:
            made = program(recorder)
            self.written += 1
            self.held.add(made)
            return made

        monkeypatch.setattr(Program, "run", counted)
        monkeypatch.setattr(Recorder, "program", noted)


def answers(ready: Replica, models: Sequence[str], seed: int) -> dict[str, list[StepOutput]]:
    """Run requests to all models, which arrive and end at different steps; return the results."""
    engine, draw = ready.core, random.Random(seed)
    params = SamplingParams(max_tokens=12, logprobs=3)
    found: dict[str, list[StepOutput]] = {}
    for number in range(24):
        prompt = [draw.randrange(VOCAB) for _ in range(draw.randint(1, 40))]
        engine.add(sequence(ready, str(number), draw.choice(models), prompt, params))
        for _ in range(draw.randint(0, 6)):
            for output in engine.step():
                found.setdefault(output.seq_id, []).append(output)
    while not engine.idle:
        for output in engine.step():
            found.setdefault(output.seq_id, []).append(output)
    return found


@pytest.mark.parametrize(("family", "settings", "replays"), cases(__file__, "BASES"))
def test_answers_are_the_same_to_the_last_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, settings: dict[str, Any], replays: bool
) -> None:
    """Rows and adapters vary from step to step, and shapes that are rare now make room for others; where layers
    have operations of torch, there is no program."""
    case = CASES[family]
    world, models = make_world_of(tmp_path, case.config, case.adapters), ("base", *case.adapters)
    store = world.built()
    monkeypatch.setattr(replayed, "RUNS_BEFORE", 0)
    monkeypatch.setattr(replayed, "MOST_PROGRAMS", 20)
    programs = Programs(monkeypatch)
    ready = world.load(store, backend="native", prefix_cache=False, **settings)
    first, written = answers(ready, models, 1), programs.written
    second = answers(ready, models, 2)
    assert not replays or (len(programs.held) == 20 and programs.written > written)
    assert bool(programs.runs) is replays
    monkeypatch.setattr(replayed, "MOST_ROWS", 0)
    usual = world.load(store, backend="native", prefix_cache=False, **settings)
    assert answers(usual, models, 1) == first
    assert answers(usual, models, 2) == second


@pytest.fixture
def ops(native_folder: Path) -> CpuOps:
    library = open_native(native_folder).library
    if library is None:
        pytest.skip("no C++ compiler")
    return CpuOps(library, torch.float32)


def test_other_threads_are_not_written_down(ops: CpuOps) -> None:
    """Operations of other threads run as before, with their own memory, while a thread records."""
    x, weight = torch.randn(2, 32), torch.ones(32)
    expected = ops.rms_norm(x.clone(), None, weight, 1e-6)
    others: list[torch.Tensor] = []
    hidden = x.clone()
    with ops.recorded(Buffers(8), 2) as recorder:
        assert recorder is not None
        with ops.recorded(Buffers(8), 2) as second:
            assert second is None
        thread = threading.Thread(target=lambda: others.append(ops.rms_norm(x.clone(), None, weight, 1e-6)))
        thread.start()
        thread.join()
        out = ops.rms_norm(hidden, None, weight, 1e-6)
    program = recorder.program()
    assert torch.equal(out, expected)
    assert torch.equal(others[0], expected)
    assert program.count == 1
    hidden.copy_(2 * x)
    program.run()
    assert torch.equal(out, ops.rms_norm(2 * x, None, weight, 1e-6))
    assert torch.equal(others[0], expected)


def test_memory_of_an_output_is_used_again() -> None:
    """The memory of an output is reused once nothing refers to the output; a view counts as a reference."""
    buffers = Buffers(4)
    first = buffers.lend((2, 8), torch.float32, 2)
    address = first.data_ptr()
    view = first[:, 4:]
    del first
    assert buffers.lend((2, 8), torch.float32, 2).data_ptr() != address
    del view
    again = [buffers.lend((4, 8), torch.float32, 4) for _ in range(2)]
    assert address in {tensor.data_ptr() for tensor in again}
    assert all(tensor.data_ptr() % 64 == 0 for tensor in again)
