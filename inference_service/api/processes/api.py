"""``python -m inference_service.api.processes.api FD``: one API process, which the service alone starts."""

import sys

from loramux_shared import parent

if __name__ == "__main__":
    parent.watch(int(sys.argv[1]))  # what follows takes seconds to import

import asyncio
import gc
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import structlog

from inference_service.api.http.server import HttpServer
from inference_service.api.http.wire.protocol import ClientTimeouts
from inference_service.api.processes.channel import Channel
from inference_service.api.processes.relay import HttpRelay, RpcRelay
from inference_service.api.processes.remote import RemoteApi
from inference_service.api.rpc.servicer import InferenceServicer
from inference_service.driver.telemetry.request_log import open_watchers
from inference_service.store import open_batches
from loramux_shared.access.guard import open_guard
from loramux_shared.faults import Fault
from loramux_shared.process import log_to_stderr, raise_limit
from loramux_shared.rpc import calls
from loramux_shared.rpc.server import RpcServer
from loramux_shared.settings import InferenceSettings
from loramux_shared.tracing import Tracing, open_tracing

log = structlog.get_logger()
TELL_S: Final = 1.0
"""For clients to read why their requests end, when the engine's process is gone."""


class ApiProcess:
    """The APIs of one process; the engine's process has it begin, report its health and drain."""

    def __init__(self) -> None:
        self._servers: list[HttpServer | RpcServer] = []
        self._rpc: RpcServer | None = None
        self._api: RemoteApi | None = None
        self._tracing: Tracing | None = None
        self._drained = False
        self._lost = asyncio.Event()
        answers: dict[str, Callable[..., Awaitable[Any]]] = {
            "begin": self._begin,
            "serve": self._serve,
            "collect": self._collect,
            "leave": self._leave,
            "refuse": self._refuse,
            "drain": self._drain,
        }
        self.channel = Channel({}, answers, self._lost.set)

    async def run(self) -> int:
        """Serve until the channel is closed; the exit status is 1 where nothing was drained before."""
        await self._lost.wait()
        if not self._drained:
            await self._refuse()
            if self._api is not None:
                self._api.driver.end()
            await self._drain(TELL_S)
            return 1
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)
        return 0

    async def _begin(self, facts: Mapping[str, Any]) -> dict[str, str]:
        """Listen, and return the addresses; health is not good yet."""
        settings = InferenceSettings(**facts["settings"])
        log_to_stderr(settings.log_format)
        guard, stall_s = open_guard(settings), settings.stall_timeout_s
        self._tracing = open_tracing("loramux-inference")
        watchers = open_watchers(self._tracing, log_prompts=settings.log_prompts)
        api = RemoteApi.open(self.channel, facts["served"], settings.parsers, watchers, open_batches(settings))
        self._api, service = api, api.service
        self._rpc = RpcServer(
            facts["grpc"],
            {name: lambda _: None for name in facts["services"]},
            guard,
            self._tracing,
            calls.Patience(read_s=stall_s, pause_s=stall_s),
            relay=RpcRelay(facts["relay"], InferenceServicer(service)),
        )
        bound = {"grpc": await self._rpc.start()}
        self._servers.append(self._rpc)
        if facts["http"] is not None:
            descriptor, address = facts["http"]
            patience = ClientTimeouts(read_s=stall_s, pause_s=stall_s)
            http = HttpServer(address, service, guard, self._tracing, patience, relay=HttpRelay(self.channel))
            bound["http"] = await http.start(socket.socket(fileno=descriptor))
            self._servers.append(http)
        gc.collect()
        gc.freeze()
        return bound

    async def _serve(self) -> None:
        """Report good health."""
        if self._rpc is not None:
            await self._rpc.set_serving(True)

    async def _collect(self) -> None:
        if self._api is not None:
            await self._api.collect()

    async def _leave(self) -> None:
        """Report bad health, and go on taking requests."""
        for server in self._servers:
            await server.leave()

    async def _refuse(self) -> None:
        """Take no new requests."""
        for server in self._servers:
            await server.refuse()

    async def _drain(self, timeout_s: float) -> bool:
        """Let requests end; False where some were cut."""

        def cut() -> None:
            self.channel.say("cut")

        finished = await asyncio.gather(*(server.drain(timeout_s, cut) for server in self._servers))
        self._drained = True
        return all(finished)


async def serve(descriptor: int) -> int:
    """Serve over the channel of a descriptor."""
    process = ApiProcess()
    loop = asyncio.get_running_loop()
    await loop.create_connection(lambda: process.channel, sock=socket.socket(fileno=descriptor))
    return await process.run()


def main() -> int:
    """Run an API process; signals are the engine's process's to take, which drains this one."""
    parent.imported()
    raise_limit()
    log_to_stderr()
    try:
        return asyncio.run(serve(int(sys.argv[1])))
    except Fault as fault:
        sys.stderr.write(f"inference_service: {fault.reason}: {fault}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
