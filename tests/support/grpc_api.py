"""A gRPC API over loopback, in front of a service."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from inference_service.rpc.servicer import SERVICE_NAME, InferenceServicer
from inference_service.startup.load import Ready
from loramux import AsyncClient
from loramux_shared.rpc.server import RpcServer
from tests.support.waiting import BOUND_S


@asynccontextmanager
async def open_client(ready: Ready) -> AsyncIterator[AsyncClient]:
    """Yield a client of the service of another API, whose engine runs."""
    services = {SERVICE_NAME: InferenceServicer(ready.service).register}
    server = RpcServer("127.0.0.1:0", services)
    address = await server.start()
    try:
        async with AsyncClient(address) as client:
            yield client
    finally:
        await server.drain(BOUND_S)
