"""A gRPC API over loopback, in front of a service."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from inference_service.rpc.servicer import SERVICE_NAME, InferenceServicer
from inference_service.serving.service import GenerationService
from inference_service.startup.load import Ready
from loramux import AsyncClient
from loramux_shared.access.guard import NOBODY_GUARDS, Guard
from loramux_shared.rpc.server import RpcServer
from tests.support.waiting import BOUND_S


@asynccontextmanager
async def open_rpc(service: GenerationService, guard: Guard = NOBODY_GUARDS) -> AsyncIterator[RpcServer]:
    """Serve the API of a service on a free port."""
    server = RpcServer("127.0.0.1:0", {SERVICE_NAME: InferenceServicer(service).register}, guard)
    await server.start()
    await server.set_serving(True)
    try:
        yield server
    finally:
        await server.drain(BOUND_S)


@asynccontextmanager
async def open_client(ready: Ready) -> AsyncIterator[AsyncClient]:
    """Yield a client of the service of another API, whose engine runs."""
    async with open_rpc(ready.service) as server, AsyncClient(server.address) as client:
        yield client
