"""A replica without its APIs: loading, following and computing."""

import asyncio
import gc
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Final, NoReturn, Self

import structlog

from inference_service.api.http.app import create_app
from inference_service.api.rpc.builder import BuilderNews, BuilderPublisher
from inference_service.driver.telemetry.request_log import open_watchers
from inference_service.startup.load import Ready, load_apart
from inference_service.store import open_replica_store
from loramux.client import AsyncClient
from loramux_shared.rpc.stopping import first_of, supervise
from loramux_shared.settings import InferenceSettings
from loramux_shared.tracing import Tracing, open_tracing


class Operators:
    """The tasks of a replica that follow its deployment and its builder, and the manager of its adapters."""

    def __init__(self, settings: InferenceSettings, ready: Ready, client: AsyncClient | None = None) -> None:
        """Follow nothing before `begin`; the builder's client is closed at the end."""
        self.outdated = ready.follower.outdated
        """Set where a replica is to end when it needs a restart."""
        self.manager = ready.service.local.adapters
        self._settings = settings
        self._ready = ready
        self._tasks: list[asyncio.Task[None]] = []
        self._client = client

    def begin(self) -> None:
        """Follow the deployment from now on, and listen to the builder where one is known."""
        follower = self._ready.follower
        self._supervise("follower", follower.run)
        if self._ready.resolver is not None:
            self._supervise("resolver", self._ready.resolver.run)
        if self._settings.builder:
            news = BuilderNews(self._settings.builder, self._settings.deployment, follower.nudge)
            self._supervise("news", news.run)
        if (batches := self._ready.service.batches) is not None:
            app, service = create_app(self._ready.service), self._ready.service
            self._supervise("batches", partial(batches.work, app, self._settings, service.max_queue))

    def _supervise(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        self._tasks.append(asyncio.create_task(supervise(name, work), name=name))

    async def end(self) -> None:
        """Follow nothing any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._ready.follower.close()
        if self._client is not None:
            await self._client.close()


log = structlog.get_logger()

BROKEN: Final = 5
"""The exit status of a replica whose device or engine failed."""
TELL_S: Final = 1.0
"""For clients to read why their requests end, before a broken replica ends itself."""
SWITCH_S: Final = 0.0005
"""Seconds that the engine's thread waits for the interpreter at most, while another one packs an adapter.

5 ms are Python's own. See docs/decisions/tried.md.
"""


@dataclass(frozen=True)
class Replica:
    """A loaded deployment, and what operators see of it."""

    ready: Ready
    operators: Operators
    tracing: Tracing | None

    @classmethod
    async def load(cls, settings: InferenceSettings) -> Self:
        """Load what settings name, or raise what `load_apart` does; nothing is computed before `begin`."""
        sys.setswitchinterval(SWITCH_S)
        tracing = open_tracing("loramux-inference")
        watchers = open_watchers(tracing, log_prompts=settings.log_prompts)
        store = open_replica_store(settings)
        client = AsyncClient(builder=settings.builder) if settings.builder else None
        publisher = BuilderPublisher(client, settings.deployment) if client is not None else None
        ready = await load_apart(settings, store, watchers, publisher)
        return cls(ready, Operators(settings, ready, client), tracing)

    def begin(self, on_failure: Callable[[], Awaitable[None]]) -> None:
        """Compute; on_failure is awaited before the requests of a broken engine end."""
        keep_what_is_loaded()
        self.ready.engine.start(on_failure)
        if self.ready.host is not None:
            self.ready.host.watch(self.ready.engine.fail)

    async def until_over(self) -> None:
        """Wait until the engine ended, or the replica is to be started again on a newer generation."""
        await first_of(self.ready.engine.ended(), self.operators.outdated.wait())

    async def stop(self) -> str | None:
        """Stop computing; returns why the engine is broken, where it is."""
        stats = self.ready.engine.stats
        why = await self.ready.engine.stop()
        if self.ready.bank is not None:
            self.ready.bank.close()
        if self.ready.host is not None:
            self.ready.host.close()
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)
        log.info("inference service stopped", hit_rate=round(stats.prefix_hit_rate, 3), **asdict(stats))
        return why


def end_broken(why: str) -> NoReturn:
    """End at once: a step may hang for good, and a broken device may hang or abort whatever cleans up."""
    log.critical("replica failed and ends: restart it", why=why, status=BROKEN)
    sys.stderr.flush()
    os._exit(BROKEN)


def keep_what_is_loaded() -> None:
    """Exclude the existing 370,000 objects from garbage collections, which took 200 ms for them."""
    gc.collect()
    gc.freeze()
