"""A replica in this process: what the engine does is seen step by step."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import count, pairwise
from typing import Any

import numpy as np

from benchmarks.moving.forge import RANK, Forge
from benchmarks.serving import BASE
from inference_service.core.sequence import StepOutput
from inference_service.serving.request import AnswerDelta, AnswerStarted, Request
from inference_service.startup.bank import PACKING
from inference_service.startup.load import Ready, load_apart
from loramux_shared.bases.memory import GB, adapter_bytes
from loramux_shared.bases.read import read_config
from loramux_shared.settings import InferenceSettings
from loramux_shared.storage.base import Store

PROMPT = 64
"""Tokens."""
KV_GB = 1.0
ENDLESS = 8000
"""New tokens: no round sees the end of them."""
BEGIN_S = 120.0
_seeds = count()


def bank_gb(adapters: int, item_bytes: int = 2) -> float:
    """Return the GB that a bank of so many adapters has; rank 16 on all seven modules."""
    size = adapter_bytes(read_config(BASE), item_bytes, RANK) * PACKING
    return adapters * size / GB


def prompt(tokens: int = PROMPT) -> list[int]:
    """Return token ids that no other prompt begins with."""
    draw = np.random.default_rng(next(_seeds))
    return [int(token) for token in draw.integers(1000, 40000, tokens)]


@dataclass
class Steps:
    """Steps of an engine, as they ended."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    """Processor time of the engine's thread, without its helpers'."""
    ended_s: list[float] = field(default_factory=list)

    @property
    def gaps_s(self) -> list[float]:
        """Between the ends of two steps: what lies between two tokens of a stream that decodes."""
        return [after - before for before, after in pairwise(self.ended_s)]


@dataclass(frozen=True)
class Answered:
    """A client's observations of one request."""

    digest: str
    first_s: float
    gaps_s: tuple[float, ...]


class Local:
    """A replica that is asked without an API."""

    def __init__(self, ready: Ready) -> None:
        self.ready = ready

    async def ask(self, model: str, new: int = 1, tokens: int = PROMPT, **fields: Any) -> Answered:
        """Ask, and read to the end."""
        began, times, digest = time.perf_counter(), [], ""
        request = Request.of(model, prompt(tokens), max_tokens=new, ignore_eos=True, **fields)
        async for event in self.ready.service.generate(request):
            if isinstance(event, AnswerStarted):
                digest = event.model.digest
            if isinstance(event, AnswerDelta):
                times.append(time.perf_counter())
        gaps = tuple(after - before for before, after in pairwise(times))
        return Answered(digest, times[0] - began, gaps)

    @contextmanager
    def steps(self) -> Iterator[Steps]:
        """Watch the engine's steps."""
        found, engine = Steps(), self.ready.engine._engine
        step: Callable[[], list[StepOutput]] = engine.step

        def timed() -> list[StepOutput]:
            began, cpu = time.perf_counter(), time.thread_time()
            outputs = step()
            found.cpu_s.append(time.thread_time() - cpu)
            found.ended_s.append(time.perf_counter())
            found.wall_s.append(found.ended_s[-1] - began)
            return outputs

        engine.step = timed  # type: ignore[method-assign]  # of this engine alone
        try:
            yield found
        finally:
            engine.step = step  # type: ignore[method-assign]

    @asynccontextmanager
    async def streams(self, models: list[str], new: int = ENDLESS) -> AsyncIterator[None]:
        """Keep one endless stream per model running; yield when all have begun."""
        begun = asyncio.Semaphore(0)

        async def stream(model: str) -> None:
            request = Request.of(model, prompt(), max_tokens=new, ignore_eos=True)
            first = True
            async for event in self.ready.service.generate(request):
                if first and isinstance(event, AnswerDelta):
                    begun.release()
                    first = False

        tasks = [asyncio.create_task(stream(model)) for model in models]
        try:
            async with asyncio.timeout(BEGIN_S):
                for _ in tasks:
                    await begun.acquire()
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            while self.ready.engine.stats.running:
                await asyncio.sleep(0.01)


def settings_of(forge: Forge, deployment: str, cache: str = "cache", **fields: Any) -> InferenceSettings:
    """Return the settings of a replica of the forge's store."""
    usual: dict[str, Any] = {"kv_memory_gb": KV_GB, "stream_interval_ms": 0, "cache_dir": forge.work / cache}
    usual |= {"local_roots": (BASE,), "store": f"file://{forge.work}/store", "deployment": deployment}
    return InferenceSettings(**usual | fields)


@asynccontextmanager
async def replica(
    forge: Forge, deployment: str, *, store: Store | None = None, cache: str = "cache", **fields: Any
) -> AsyncIterator[Local]:
    """Load a deployment and serve it in this process."""
    settings = settings_of(forge, deployment, cache, **fields)
    ready = await load_apart(settings, store or forge.store)
    ready.engine.start()
    try:
        yield Local(ready)
    finally:
        await ready.engine.stop()
        if ready.bank is not None:
            ready.bank.close()
