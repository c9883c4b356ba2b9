"""Composition of what operators see: a replica that follows its deployment, and can be told to change it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime

import structlog

from inference_service.adapters.bundles import StoredBundles
from inference_service.adapters.catalog import Changes, ServedModel
from inference_service.adapters.fixed import AllResident
from inference_service.adapters.follower import Follower
from inference_service.adapters.manager import AdapterManager
from inference_service.adapters.pins import Pins
from inference_service.adapters.ports import Residency
from inference_service.adapters.registry import Registry
from inference_service.adapters.views import Facts
from inference_service.rpc.builder_news import BuilderNews
from inference_service.rpc.publisher import BuilderPublisher
from inference_service.serving.service import GenerationService
from inference_service.startup.load import Ready
from loramux.client import AsyncClient
from loramux_shared.bundle.generation import Generation
from loramux_shared.settings import InferenceSettings
from loramux_shared.storage.base import Store

log = structlog.get_logger()


class ServedNames:
    """The names of a service; a generation that is taken over brings its aliases and limits too."""

    def __init__(self, service: GenerationService) -> None:
        self._service = service

    @property
    def generation(self) -> int:
        """The deployment's generation that is served."""
        return self._service.catalog.generation

    @property
    def base_name(self) -> str:
        """Of the base, whether it is served or not."""
        return self._service.catalog.base_name

    @property
    def everything(self) -> Sequence[ServedModel]:
        """All models whoever asks: the base, where it is served, then the adapters by name."""
        return self._service.catalog.everything

    def get(self, name: str) -> ServedModel:
        """Return a model that the caller may use.

        Raises:
            ModelNotFound: there is none.
        """
        return self._service.catalog.get(name)

    def apply(self, generation: Generation) -> Changes:
        """Take over another generation in one step."""
        return self._service.apply(generation)


class Operators:
    """The follower of a replica, and the manager of its adapters."""

    def __init__(self, settings: InferenceSettings, store: Store, ready: Ready) -> None:
        """Connect them; nothing is followed before `Follower.run`."""
        self.outdated = asyncio.Event()
        """Set where a replica is to end when it needs a restart."""
        self._settings = settings
        self._ready = ready
        self._tasks: list[asyncio.Task[None]] = []
        self.follower = Follower(
            store,
            ready.generation,
            self._take,
            interval_s=settings.follow_interval_s,
            on_stale=self._stale,
        )
        ready.service.naming.catch_up = self.follower.catch_up
        self._client = AsyncClient(builder=settings.builder) if settings.builder else None
        self.manager = _manager(settings, store, ready, self.follower, self._client)
        ready.service.metrics.show(self.manager, lambda: ready.service.limiter.limits, settings.metrics_models)

    def begin(self) -> None:
        """Follow the deployment from now on, and listen to the builder where one is known."""
        self._tasks.append(asyncio.create_task(self.follower.run(), name="follower"))
        if self._settings.builder:
            news = BuilderNews(self._settings.builder, self._settings.deployment, self.follower.nudge)
            self._tasks.append(asyncio.create_task(news.run(), name="news"))

    async def end(self) -> None:
        """Follow nothing any more."""
        for task in self._tasks:
            task.cancel()
        self.follower.close()
        if self._client is not None:
            await self._client.close()

    def _take(self, generation: Generation) -> None:
        self.manager.take(generation)
        sizes = self._settings.sizes(self._ready.device, generation.speculative_tokens)
        self._ready.engine.draft(sizes.speculative)
        service = self._ready.service
        service.parsers = self._settings.parsers(generation.tool_parser, generation.reasoning_parser)

    def _stale(self, reason: str) -> None:
        if self._settings.on_base_change == "exit":
            log.warning("the replica ends, to be started again on the newest generation", reason=reason)
            self.outdated.set()


def _manager(
    settings: InferenceSettings, store: Store, ready: Ready, follower: Follower, client: AsyncClient | None
) -> AdapterManager:
    residency: Residency = AllResident(ready.service.catalog) if ready.bank is None else ready.bank.residency
    pins, names = Pins(residency, ready.engine.post), ServedNames(ready.service)
    facts = Facts(
        settings.deployment,
        datetime.now(UTC),
        ready.dtype,
        ready.generation.max_lora_rank,
    )
    return AdapterManager(
        names,
        residency,
        follower,
        pins,
        facts,
        registry=Registry(names, ready.generation, pins),
        bundles=StoredBundles(store, refused=bool(settings.require_signature))
        if ready.bank is not None
        else None,
        publisher=BuilderPublisher(client, settings.deployment) if client is not None else None,
        paused=lambda: ready.engine.paused,
    )
