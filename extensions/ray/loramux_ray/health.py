"""The service ``grpc.health.v1`` in Ray's gRPC proxies, which have none of their own."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from typing import Final

import grpc
from grpc_health.v1 import health_pb2 as pb, health_pb2_grpc
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from loramux_ray.names import APP, BUILDER, BUILDER_APP, ENGINE
from loramux_shared.routes import ADAPTER_SERVICE, BUILDER_SERVICE, INFERENCE_SERVICE

PARTS: Final = {
    "": (APP, ENGINE),
    INFERENCE_SERVICE: (APP, ENGINE),
    ADAPTER_SERVICE: (APP, ENGINE),
    BUILDER_SERVICE: (BUILDER_APP, BUILDER),
}
"""The application and the deployment behind each service, and behind the whole."""
LOOK_S: Final = 1.0
"""Between two looks at what runs, however many ask."""
STATUS: Final = pb.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # grpc has no types here
    """Health of a proxy.

    SERVING while Ray's controller knows a replica that runs, and the proxy does not drain.
    """

    def __init__(self, open_: Callable[[], bool]) -> None:
        """Take a function that returns whether the proxy takes new calls."""
        self._open = open_
        self._looked_s = 0.0
        self._running: frozenset[tuple[str, str]] = frozenset()
        self._look = asyncio.Lock()

    async def Check(  # noqa: N802 - grpc's name
        self, request: pb.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> pb.HealthCheckResponse:
        """Say how a service is."""
        if request.service not in PARTS:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service here.")
        return STATUS(status=await self._status(request.service))

    async def Watch(  # noqa: N802 - grpc's name
        self, request: pb.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[pb.HealthCheckResponse]:
        """Say how a service is, again at every change."""
        del context
        reported: int | None = None
        while True:
            known = request.service in PARTS
            status = await self._status(request.service) if known else STATUS.SERVICE_UNKNOWN
            if status != reported:
                reported = status
                yield STATUS(status=status)
            await asyncio.sleep(LOOK_S)

    async def _status(self, service: str) -> int:
        async with self._look:
            if time.monotonic() - self._looked_s > LOOK_S:
                self._running = await asyncio.to_thread(_running)
                self._looked_s = time.monotonic()
        serving = self._open() and PARTS[service] in self._running
        return int(STATUS.SERVING if serving else STATUS.NOT_SERVING)


def _running() -> frozenset[tuple[str, str]]:
    """Return the deployments of which a replica runs, with their applications."""
    try:
        applications = serve.status().applications
    except (RayError, RayServeException):
        return frozenset()
    return frozenset(
        (app, name)
        for app, overview in applications.items()
        for name, deployment in overview.deployments.items()
        if any(count for state, count in deployment.replica_states.items() if state == "RUNNING")
    )
