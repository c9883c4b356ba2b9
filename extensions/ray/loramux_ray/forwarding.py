"""Forwarding from a proxy to a replica.

Its choice, retries before a first token, and Ray's errors as faults.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final, cast

import structlog
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from loramux_ray.names import key_of
from loramux_shared.faults import Fault, InternalFault, QueueFull, ReplicaFailed, ServerUnavailable

log = structlog.get_logger()

PAUSES_S: Final = (0.0, 0.2, 0.5, 1.0, 2.0)
"""Before each further try: Ray may take a moment to see that a replica is gone."""
BASE_S: Final = 60.0
"""A deploy may give the base another name; replicas are asked again after this time."""
ONCE: Final[tuple[float, ...]] = ()
LOST: Final = "the replica ended before the answer was complete. Retry."
FAILED: Final = "internal error; the server's log has the details. Please report it."


class Forwarder:
    """The replicas of one deployment, as a proxy sees them."""

    def __init__(self, deployment: str, app: str) -> None:
        self._deployment = deployment
        self._app = app
        self._handle: DeploymentHandle[Any] | None = None
        self._base = ""
        self._asked_s: float | None = None
        """When a replica last said what the base is called."""

    @property
    def app(self) -> str:
        """The application that this is for."""
        return self._app

    async def open(self) -> DeploymentHandle[Any]:
        """Return Ray's handle, made at the first use.

        Raises:
            ServerUnavailable: the cluster has no such application.
        """
        if self._handle is None:
            try:
                handle = await asyncio.to_thread(serve.get_deployment_handle, self._deployment, self._app)
            except (KeyError, RayServeException):  # without such a deployment, and without Serve
                raise ServerUnavailable(
                    f"this cluster runs no application {self._app!r} with a deployment {self._deployment!r}. "
                    "Deploy it (loramux ray deploy), or name another as metadata `application`."
                ) from None
            self._handle = handle.options(stream=True)
        return self._handle

    async def key(self, model: str) -> str:
        """Return by what the requests of a model are routed."""
        if not model:
            return ""
        now_s = time.monotonic()
        if self._asked_s is None or now_s - self._asked_s > BASE_S:
            self._asked_s = now_s  # others go by the old name meanwhile
            async for name in self.stream("base_name"):
                self._base = name
        return key_of(model, self._base)

    async def stream(
        self,
        method: str,
        *arguments: object,
        key: str = "",
        pauses_s: tuple[float, ...] = PAUSES_S,
        elsewhere: Callable[[Any], bool] = lambda _: False,
    ) -> AsyncGenerator[Any]:
        """Yield the parts of a replica's answer.

        A replica that ends before its first part, or whose first part says that another one may answer, is
        left for another one, once for each of the pauses.

        Raises:
            ReplicaFailed: the replica ended, after the first part or with every try.
            QueueFull: Ray holds as many requests as it may.
            ServerUnavailable: the application cannot be deployed, or is not there.
            InternalFault: the replica raised what it should not.
        """
        handle = (await self.open()).options(method_name=method, multiplexed_model_id=key)
        for pause_s in (*pauses_s, None):
            started = False
            response = cast(DeploymentResponseGenerator[Any], handle.remote(*arguments))
            try:
                async for part in response:
                    if not started and pause_s is not None and elsewhere(part):
                        break
                    started = True
                    yield part
                else:
                    return
            except (RayError, RayServeException) as error:
                fault = _fault(error)
                if started or pause_s is None or not isinstance(fault, ReplicaFailed):
                    raise fault from None
                log.info(
                    "request retried on another replica", app=self._app, method=method, why=type(error).__name__
                )
            finally:
                response.cancel()  # type: ignore[no-untyped-call]
            await asyncio.sleep(pause_s)


def _fault(error: Exception) -> Fault:
    if isinstance(error, BackPressureError):
        return QueueFull("Ray's queue is full. Retry in a moment, or add a replica.")
    if isinstance(error, DeploymentUnavailableError):
        return ServerUnavailable("the application could not be deployed; `serve status` says why.")
    if isinstance(error, RayTaskError):
        log.error("replica raised an unexpected error", error=repr(error))
        return InternalFault(FAILED)
    return ReplicaFailed(LOST)
