"""Recorded steps of a loaded model: graphs on a GPU, tapes in the interpreter; and what they launch."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from inference_service.engine.engine import Engine
from inference_service.engine.execution.graph_runner import GraphRunner
from inference_service.engine.execution.graphs import CudaRecorder, Recorder
from inference_service.engine.execution.runner import Blocks
from inference_service.engine.execution.tape import TapeRecorder
from inference_service.engine.kernels.launch import Launch
from inference_service.engine.scheduling.block_manager import BlockManager
from inference_service.engine.scheduling.blocks import StateSlots
from inference_service.engine.scheduling.queues import SchedulerLimits
from inference_service.engine.scheduling.residents import Residents
from inference_service.startup.load import Ready

BLOCK = 16
Key = tuple[Any, ...]


def new_recorder() -> Recorder:
    return CudaRecorder(torch.device("cuda")) if torch.cuda.is_available() else TapeRecorder()


def runner_of(
    ready: Ready, limits: SchedulerLimits, blocks: Blocks, slots: int = 0, recorder: Recorder | None = None
) -> GraphRunner:
    """Return a runner with the model of a replica, and nothing recorded."""
    eager: Any = ready.engine._engine._runner
    recorder = recorder or new_recorder()
    return GraphRunner(eager._model, eager._lora, blocks, BLOCK, limits, recorder, slots)


def install_runner(ready: Ready, runner: GraphRunner, blocks: Blocks, slots: int = 0) -> Ready:
    """Let a replica run on it, and know nothing of what the cache holds."""
    states = StateSlots(slots, BLOCK, 1) if slots else None
    manager = BlockManager(blocks, BLOCK, runner._model.config.windows, states=states)
    ready.engine._engine = Engine(runner, runner._limits, manager, Residents())
    return ready


def key_of(launch: Launch) -> Key:
    """Return Triton's compilation key: constants, types, and the alignment of numbers and addresses."""
    kernel, options = launch.kernel, launch.kernel.kwargs
    plain = set(options.get("do_not_specialize") or ())
    anywhere = plain | set(options.get("do_not_specialize_on_alignment") or ())
    parts: list[Any] = [kernel.fn.__name__]
    parameters = inspect.signature(kernel.fn).parameters
    for name, value in sorted(launch.arguments.items()):
        if isinstance(value, Tensor):
            parts.append((name, value.dtype, name in anywhere or value.data_ptr() % 16 == 0))
        elif name not in parameters or "constexpr" in str(parameters[name].annotation):
            parts.append((name, value))
        elif isinstance(value, int) and not isinstance(value, bool):
            special = None if name in plain else (value == 1, name in anywhere or value % 16 == 0)
            parts.append((name, special))
        else:
            parts.append((name, type(value), value is None))
    return tuple(parts)


@contextmanager
def note_launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[Key]]:
    """Collect the keys of all launches, replayed ones too; of interpreted ones, as compiled ones have none."""
    keys: set[Key] = set()
    enqueue = Launch.enqueue

    def note(launch: Launch) -> None:
        keys.add(key_of(launch))
        enqueue(launch)

    with monkeypatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setattr(Launch, "enqueue", note)
        yield keys
