"""Nothing is compiled while serving: whatever traffic launches was launched when the runner recorded."""

import inspect
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from inference_service.backends.triton_lora import TritonLora
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Sequence
from inference_service.engine import graph_runner
from inference_service.engine.block_manager import BlockManager
from inference_service.engine.engine import Engine
from inference_service.engine.graph_runner import GraphRunner
from inference_service.engine.queues import SchedulerLimits
from inference_service.engine.residents import Residents
from inference_service.engine.tape import TapeRecorder
from inference_service.kernels.launch import Launch
from inference_service.startup.load import Ready
from loramux_shared.bases.config import ModelConfig
from tests.support.tiny import make_world
from tests.support.weights import adapter_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels tell of themselves when interpreted")

BLOCK, BLOCKS = 16, 32
LIMITS = SchedulerLimits(max_tokens=144, max_seqs=3, max_adapters=2, max_seq_len=512)
"""Steps of 64 and 128 rows are neither the smallest nor the largest of those that are not recorded."""
RECORDED = 16
Key = tuple[Any, ...]


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
def noted(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[Key]]:
    """Collect the keys of all launches, replayed ones too."""
    keys: set[Key] = set()
    enqueue = Launch.enqueue

    def note(launch: Launch) -> None:
        keys.add(key_of(launch))
        enqueue(launch)

    with monkeypatch.context() as patch:
        patch.setattr(Launch, "enqueue", note)
        yield keys


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    """A base and adapters with the kernels for GPUs, interpreted."""
    world = make_world(tmp_path_factory.mktemp("tiny"))
    return world.load(world.built(max_lora_rank=16), backend="triton")


def run(ready: Ready, runner: GraphRunner, requests: list[tuple[str, int, SamplingParams]]) -> None:
    """Run prompts of so many tokens to their end, a new one every step."""
    engine = Engine(runner, LIMITS, BlockManager(BLOCKS, BLOCK), Residents())
    waiting = []
    for number, (name, length, params) in enumerate(requests):
        model = ready.service.catalog.resolve(name)
        waiting.append(
            Sequence(str(number), list(range(3, 3 + length)), params, model.mixture or model.adapter)
        )
    while waiting or not engine.idle:
        if waiting:
            engine.add(waiting.pop())
        engine.step()


def replace_first(lora: TritonLora, config: ModelConfig) -> None:
    """Let the adapter in the first slot leave, for one of another rank and another module."""
    hidden, kv = config.dims.hidden, config.attentions[0].kv_features
    rows = [(1, "attn_k", torch.ones(1, hidden), torch.ones(kv, 1))]
    packed = lora.pack(adapter_of(rows, config.layer_groups))
    lora.leave(0)
    lora.copy(packed, 0)
    lora.enter(0, 0, packed)


def test_traffic_launches_what_the_start_has_launched(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of all lengths, in graphs or without, scored or not, and a later adapter launch nothing new."""
    monkeypatch.setattr(graph_runner, "RECORDED_ROWS", RECORDED)
    eager: Any = ready.engine._engine._runner
    runner = GraphRunner(eager._model, eager._lora, BLOCKS, BLOCK, LIMITS, TapeRecorder())
    with noted(monkeypatch) as one_token:
        run(ready, runner, [("base", 1, SamplingParams(max_tokens=2))])
    with noted(monkeypatch) as known:
        runner.capture()
    replace_first(eager._lora, eager._model.config)
    draw = random.Random(0)
    kinds = [
        SamplingParams(max_tokens=2, temperature=0.8, top_p=0.9, seed=1),
        SamplingParams(max_tokens=3, repetition_penalty=1.3, logit_bias={5: 1.0}),
        SamplingParams(max_tokens=1, prompt_logprobs=1),
        SamplingParams(max_tokens=2, logprobs=2),
    ]
    requests = [
        (draw.choice(["base", "all", "rs", "wide", "rs*0.5+all*2", "wide*0.5"]), length, draw.choice(kinds))
        for length in (1, 3, 17, 40, 64, 80)
    ]
    with noted(monkeypatch) as traffic:
        run(ready, runner, [*requests, ("all", 60, kinds[2])])
    assert not traffic - known
    assert traffic - one_token  # a start that runs a token leaves something to be compiled later
