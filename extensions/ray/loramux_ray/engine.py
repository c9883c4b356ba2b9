"""The inference service as a deployment: one replica of Ray's is one of ours."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import structlog
from starlette.types import ASGIApp, Message

from inference_service.api.http.app import create_app
from inference_service.api.http.wire.refusals import fault_response
from inference_service.api.rpc.adapters import AdapterServicer
from inference_service.api.rpc.servicer import InferenceServicer
from inference_service.replica import TELL_S, Replica, end_broken
from loramux_ray.bridge import Bridge
from loramux_ray.calls import End, HttpCall, Messages, RpcCall, require_local
from loramux_ray.settings import engine_settings
from loramux_shared.access.guard import open_guard
from loramux_shared.faults import PermissionDenied, ReplicaFailed
from loramux_shared.process import log_to_stderr, raise_limit

log = structlog.get_logger()


class Engine:
    """The engine: loads when Ray makes it.

    Ends its process when it can no longer compute, and Ray makes another.
    """

    async def __init__(self, values: Mapping[str, Any]) -> None:  # type: ignore[misc]  # Ray awaits it
        """Load what settings name; those that are not given come from the node's environment.

        Raises:
            Fault: it cannot be served.
        """
        settings = engine_settings(values)
        log_to_stderr(settings.log_format)
        raise_limit()
        guard = open_guard(settings)
        self.replica = replica = await Replica.load(settings)
        self._over = ""
        ready, manager = replica.ready, replica.operators.manager
        services = (
            InferenceServicer(ready.service).register,
            AdapterServicer(manager).register,
        )
        self._bridge = Bridge(services, guard, replica.tracing, insecure=settings.insecure)
        self._local_only = guard.keyring is None and not settings.insecure
        self._front = create_app(ready.service, guard.keyring, replica.tracing, manager)
        replica.begin(self._refuse)
        replica.operators.begin()
        self._watching = asyncio.create_task(self._watch())
        log.info("inference service ready", guarded_by=guard.label, deployment=settings.deployment)

    async def rpc(self, call: RpcCall) -> AsyncGenerator[list[bytes] | End]:
        """Answer a call of gRPC; the first part comes with the first token."""
        async with aclosing(self._bridge.run(call)) as parts:
            async for part in parts:
                yield part

    async def http(self, call: HttpCall) -> AsyncGenerator[Messages]:
        """Answer a request of HTTP; the first part comes with the first of the body."""
        async with aclosing(answered(self._front, call, local_only=self._local_only)) as parts:
            async for part in parts:
                yield part

    async def base_name(self) -> AsyncGenerator[str]:
        """Tell what the base is called: its requests may go to any replica."""
        yield self.replica.ready.service.local.catalog.base_name

    async def check_health(self) -> None:
        """Tell Ray whether to continue with this replica.

        Raises:
            ReplicaFailed: the engine broke, or a generation needs a restart.
        """
        if self._over:
            raise ReplicaFailed(self._over)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Count the sequences that run and that wait, for `scaling`."""
        stats = self.replica.ready.engine.stats
        return {"running": stats.running, "waiting": stats.waiting}

    async def _refuse(self) -> None:
        self._over = "the engine failed."
        self._front.draining = True

    async def _watch(self) -> None:
        """End with the engine; Ray starts another replica."""
        ready, operators = self.replica.ready, self.replica.operators
        await self.replica.until_over()
        self._over = self._over or "a generation needs a restart."
        if operators.outdated.is_set():
            return  # Ray lets requests end, and then this process
        await asyncio.sleep(TELL_S)
        why = await ready.engine.ended()
        end_broken(why or self._over)


async def answered(app: ASGIApp, call: HttpCall, *, local_only: bool) -> AsyncGenerator[Messages]:
    """Yield what an application sends: its status together with the first of the body, so as to be retried."""
    sent: asyncio.Queue[Messages | None] = asyncio.Queue()
    held: Messages = []
    requests: list[Message] = [{"type": "http.request", "body": call.body, "more_body": False}]

    async def receive() -> Message:
        if requests:
            return requests.pop()
        return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

    async def send(message: Message) -> None:
        held.append(dict(message))
        if message["type"] != "http.response.start":
            sent.put_nowait(held.copy())
            held.clear()

    async def run() -> None:
        try:
            await _guarded(app, call, local_only)(dict(call.scope), receive, send)
        finally:
            sent.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        while (messages := await sent.get()) is not None:
            yield messages
        await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _guarded(app: ASGIApp, call: HttpCall, local_only: bool) -> Any:
    if not local_only:
        return app
    try:
        require_local(call.peer)
    except PermissionDenied as fault:
        return fault_response(call.scope, fault)
    return app
