"""A replica in this process: what the engine does is seen step by step."""

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import count, pairwise
from typing import Any

import numpy as np

from benchmarks.forge import BASE, RANK, Forge
from benchmarks.service import Answer, Prompt
from inference_service.core.request import AnswerDelta, Request
from inference_service.core.sequence import StepOutput
from inference_service.startup.bank import PACKING
from inference_service.startup.load import Ready, load_apart
from loramux_shared.bases.memory import GB, adapter_bytes
from loramux_shared.bases.read import read_config
from loramux_shared.settings import InferenceSettings

_seeds = count()


def bank_gb(adapters: int) -> float:
    """Return the GB of a bank for so many adapters of rank 16 on all seven modules in bfloat16."""
    return adapters * adapter_bytes(read_config(BASE), 2, RANK) * PACKING / GB


def prompt(tokens: int = 64) -> list[int]:
    """Return token ids that no other prompt begins with."""
    draw = np.random.default_rng(next(_seeds))
    return [int(token) for token in draw.integers(1000, 40000, tokens)]


@dataclass
class Steps:
    """Steps of an engine, as they ended."""

    cpu_s: list[float] = field(default_factory=list)
    """Processor time of the engine's thread, without its helpers'."""
    ended_s: list[float] = field(default_factory=list)

    @property
    def gaps_s(self) -> list[float]:
        """Between the ends of two steps: what lies between two tokens of a stream that decodes."""
        return [after - before for before, after in pairwise(self.ended_s)]


class Replica:
    """A replica that is asked without an API."""

    def __init__(self, ready: Ready) -> None:
        self._ready = ready
        self.base = ready.service.local.catalog.base_name

    @property
    def loads(self) -> int:
        """Adapters that were loaded so far."""
        assert self._ready.bank is not None  # noqa: S101 - it has adapters
        return self._ready.bank.residency.stats.loads

    async def ask(self, model: str, tokens: Prompt, new: int) -> AsyncIterator[int]:
        """Ask as `over_grpc` does."""
        request = Request.of(model, tokens, max_tokens=new, ignore_eos=True)
        async for event in self._ready.service.generate(request):
            if isinstance(event, AnswerDelta):
                yield len(event.tokens)

    async def first_s(self, model: str, tokens: int = 64, new: int = 1) -> float:
        """Return the seconds to the first token of an answer that is read to its end."""
        return (await Answer().read(self.ask(model, prompt(tokens), new))).first_s

    @contextmanager
    def steps(self) -> Iterator[Steps]:
        """Watch the engine's steps."""
        found, engine = Steps(), self._ready.engine._engine
        step: Callable[[], list[StepOutput]] = engine.step

        def timed() -> list[StepOutput]:
            cpu_s = time.thread_time()
            outputs = step()
            found.cpu_s.append(time.thread_time() - cpu_s)
            found.ended_s.append(time.perf_counter())
            return outputs

        engine.step = timed  # type: ignore[method-assign]  # of this engine alone
        try:
            yield found
        finally:
            engine.step = step  # type: ignore[method-assign]


@asynccontextmanager
async def replica(forge: Forge, deployment: str, **fields: Any) -> AsyncIterator[Replica]:
    """Load a deployment and serve it in this process."""
    usual: dict[str, Any] = {"kv_memory_gb": 1.0, "stream_interval_ms": 0, "cache_dir": forge.work / "cache"}
    usual |= {"local_roots": (BASE,), "store": f"file://{forge.work}/store", "deployment": deployment}
    ready = await load_apart(InferenceSettings(**usual | fields), forge.store)
    ready.engine.start()
    try:
        yield Replica(ready)
    finally:
        await ready.engine.stop()
        if ready.bank is not None:
            ready.bank.close()
