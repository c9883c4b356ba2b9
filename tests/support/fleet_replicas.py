"""Several scripted replicas on loopback, whose health, wires and answers a test has in its hands."""

# ruff: noqa: N802 - the names of servicers are fixed

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from loramux.inference.v1 import inference_pb2 as pb
from loramux_shared.access.guard import NOBODY_GUARDS, Guard
from loramux_shared.faults import Fault
from loramux_shared.rpc.server import RpcServer
from tests.support.services.fake_grpc import FakeInference, inference_server
from tests.support.waiting import BOUND_S, loop_in_thread

MODELS = ("base", "lora1", "lora2")


class HeldInference(FakeInference):
    """A fake that can refuse, can take a prompt without an answer, and can pause after the first piece."""

    def __init__(self) -> None:
        super().__init__()
        self.refuses: Fault | None = None
        self.silences = {"silent"}
        self.held = asyncio.Event()
        """Event that the prompt ``held`` waits for after its first piece."""
        self.headers: list[str] = []
        self.open = 0

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.headers += [value for name, value in context.invocation_metadata() if name == "x-loramux-model"]
        if self.refuses is not None:
            self.requests.append(request)
            raise self.refuses
        self.open += 1
        try:
            if request.text in self.silences:
                self.requests.append(request)
                yield pb.GenerateResponse(started=pb.Started(request_id="r", model=request.model))
                await asyncio.Event().wait()
            async for message in super().Generate(request, context):
                yield message
                if request.text == "held" and message.HasField("delta"):
                    await self.held.wait()
        finally:
            self.open -= 1


class Wire:
    """A port in front of a server, which can be cut as if the machine had gone."""

    def __init__(self, target: str) -> None:
        self._host, _, self._port = target.rpartition(":")
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.address = ""

    async def open(self) -> None:
        """Listen: on a free port, later on the same."""
        port = int(self.address.rpartition(":")[2] or 0)
        self._server = await asyncio.start_server(self._join, "127.0.0.1", port)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def cut(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        other_reader, other = await asyncio.open_connection(self._host, self._port)
        self._writers |= {writer, other}
        await asyncio.gather(self._copy(reader, other), self._copy(other_reader, writer))
        self._writers -= {writer, other}

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()


class Replicas:
    """Replicas in a thread of their own."""

    def __init__(self, count: int, guard: Guard, do: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        self.services = [HeldInference() for _ in range(count)]
        self._guard, self._do = guard, do
        self._servers: list[RpcServer] = []
        self.wires: list[Wire] = []
        self._do(self._start())

    @property
    def addresses(self) -> list[str]:
        return [wire.address for wire in self.wires]

    def __getitem__(self, address: str) -> HeldInference:
        return self.services[self.addresses.index(address)]

    @property
    def counts(self) -> list[int]:
        return [len(service.requests) for service in self.services]

    def serving(self, address: str, ready: bool) -> None:
        self._do(self._servers[self.addresses.index(address)].set_serving(ready))

    def drain(self, address: str) -> None:
        """End a replica as SIGTERM does."""
        self._do(self._servers[self.addresses.index(address)].drain(BOUND_S))

    async def _release(self) -> None:
        for service in self.services:
            service.held.set()

    def release(self) -> None:
        self._do(self._release())

    def cut(self, address: str) -> None:
        self._do(self.wires[self.addresses.index(address)].cut())

    def close(self) -> None:
        for wire in self.wires:
            self._do(wire.cut())
        self._do(self._stop())

    async def _start(self) -> None:
        for service in self.services:
            server = inference_server("127.0.0.1:0", service, self._guard)
            wire = Wire(await server.start())
            await wire.open()
            await server.set_serving(True)
            self._servers.append(server)
            self.wires.append(wire)

    async def _stop(self) -> None:
        await asyncio.gather(*(server.drain(0.05) for server in self._servers))


@contextmanager
def open_replicas(count: int, guard: Guard = NOBODY_GUARDS) -> Iterator[Replicas]:
    """Yield so many replicas."""
    with loop_in_thread() as do:
        made = Replicas(count, guard, do)
        try:
            yield made
        finally:
            made.close()
