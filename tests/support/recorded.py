"""Recorded steps of a loaded model: graphs on a GPU, tapes in the interpreter; and what they launch."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from inference_service.engine.backends.triton_lora import TritonLora
from inference_service.engine.engine import Engine
from inference_service.engine.execution.graph_runner import GraphRunner
from inference_service.engine.execution.graphs import CudaRecorder, Graph, Recorder
from inference_service.engine.execution.runner import Blocks
from inference_service.engine.execution.tape import TapeRecorder
from inference_service.engine.kernels.launch import Launch
from inference_service.engine.scheduling.block_manager import BlockManager
from inference_service.engine.scheduling.blocks import StateSlots
from inference_service.engine.scheduling.queues import SchedulerLimits
from inference_service.engine.scheduling.residents import Residents
from tests.support.tiny import Replica

BLOCK = 16
Key = tuple[Any, ...]


def new_recorder() -> Recorder:
    return CudaRecorder(torch.device("cuda")) if torch.cuda.is_available() else TapeRecorder()


@dataclass
class CountedGraph:
    """A graph that notes its replays."""

    graph: Graph
    number: int
    replays: list[int]

    def replay(self) -> None:
        self.replays.append(self.number)
        self.graph.replay()


class CountingRecorder:
    """Notes which graphs are replayed, by the order of their recording; CUDA's where there is a GPU."""

    def __init__(self) -> None:
        self.graphs: list[Graph] = []
        self.replays: list[int] = []
        self._inner = new_recorder()

    def capture(self, work: Callable[[], None]) -> Graph:
        self.graphs.append(self._inner.capture(work))
        return CountedGraph(self.graphs[-1], len(self.graphs) - 1, self.replays)


def runner_of(
    ready: Replica,
    limits: SchedulerLimits,
    blocks: Blocks,
    slots: int = 0,
    recorder: Recorder | None = None,
    depth: int | None = None,
) -> GraphRunner:
    """Return a runner with the model of a replica, and nothing recorded."""
    lora, recorder = cast(TritonLora, ready.lora), recorder or new_recorder()
    return GraphRunner(ready.base.model, lora, blocks, BLOCK, limits, recorder, slots, depth=depth)


def with_runner(
    ready: Replica, runner: GraphRunner, limits: SchedulerLimits, blocks: Blocks, slots: int = 0
) -> Replica:
    """Return a replica that runs on it, and knows nothing of what the cache holds."""
    states = StateSlots(slots, BLOCK, 1) if slots else None
    manager = BlockManager(blocks, BLOCK, ready.base.config.windows, states=states)
    return replace(ready, core=Engine(runner, limits, manager, Residents()))


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
