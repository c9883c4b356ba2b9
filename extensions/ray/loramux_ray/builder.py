"""The builder service as a deployment of one."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import structlog

from builder_service.builder import Builder
from builder_service.rpc.servicer import BuilderServicer
from loramux_ray.bridge import Bridge
from loramux_ray.calls import End, RpcCall
from loramux_ray.context import Uploads
from loramux_shared.access.guard import open_guard
from loramux_shared.process import log_to_stderr, raise_limit
from loramux_shared.settings import BuilderSettings, load_settings
from loramux_shared.tracing import open_tracing

log = structlog.get_logger()


class BuilderReplica:
    """Builds; one that is killed finds in the store's journal what it built, when Ray starts it again."""

    async def __init__(self, values: Mapping[str, Any]) -> None:  # type: ignore[misc]  # Ray awaits it
        """Take up builds of the journal; settings that are not given come from the node's environment.

        Raises:
            Fault: it cannot build.
        """
        settings = load_settings(BuilderSettings, **values)
        log_to_stderr(settings.log_format)
        raise_limit()
        guard = open_guard(settings)
        self._builder = builder = await Builder.open(settings)
        servicer = BuilderServicer(builder.builds, builder.checks)
        tracing = open_tracing("loramux-builder")
        self._bridge = Bridge([servicer.register], guard, tracing, insecure=settings.insecure)
        self._uploads: dict[str, Uploads] = {}
        recovered = await builder.builds.recover()
        name = builder.identity.name
        log.info("builder service ready", builder=name, guarded_by=guard.label, builds_taken_up=recovered)

    async def rpc(self, call: RpcCall) -> AsyncGenerator[list[bytes] | End]:
        """Answer a call of gRPC; one whose messages follow begins with an empty part, once it reads them."""
        uploads: Uploads | None = None
        if call.upload:
            uploads = self._uploads[call.upload] = asyncio.Queue(1)
            yield []
        try:
            async with aclosing(self._bridge.run(call, uploads)) as parts:
                async for part in parts:
                    yield part
        finally:
            self._uploads.pop(call.upload, None)

    async def send(self, upload: str, message: bytes | None) -> AsyncGenerator[bool]:
        """Hand a message to the call that reads them, once it has room; None is the end."""
        if (uploads := self._uploads.get(upload)) is not None:
            await uploads.put(message)
        yield uploads is not None
