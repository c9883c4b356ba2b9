"""The gRPC API of a service, on a free port."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from inference_service.api.requests.service import GenerationService
from inference_service.api.rpc.servicer import SERVICE_NAME, InferenceServicer
from inference_service.startup.load import Ready
from loramux import AsyncClient
from loramux_shared.access.guard import NOBODY_GUARDS, Guard
from loramux_shared.rpc.server import RpcServer
from tests.support.servers import ANY_PORT, serve


def inference_rpc(service: GenerationService, guard: Guard = NOBODY_GUARDS) -> RpcServer:
    """Return the server of a service."""
    return RpcServer(ANY_PORT, {SERVICE_NAME: InferenceServicer(service).register}, guard)


def open_rpc(
    service: GenerationService, guard: Guard = NOBODY_GUARDS
) -> AbstractAsyncContextManager[RpcServer]:
    """Serve the API of a service for as long as the block takes."""
    return serve(inference_rpc(service, guard))


@asynccontextmanager
async def open_client(ready: Ready) -> AsyncIterator[AsyncClient]:
    """Yield a client of the service of another API, whose engine runs."""
    async with open_rpc(ready.service) as server, AsyncClient(server.address) as client:
        yield client
