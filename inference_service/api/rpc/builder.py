"""The builder of a replica's deployment: news of its generations, and changes that a replica asks it for."""

import asyncio
import random
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import grpc
import structlog

from loramux.builder.v1 import builder_pb2
from loramux.builder.v1.builder_pb2_grpc import BuilderServiceStub
from loramux.client import AsyncClient
from loramux.connection import Calls, Credentials
from loramux.records import DeploymentInfo, DeploymentState
from loramux_shared.deployment import Repository
from loramux_shared.faults import Fault, InternalFault
from loramux_shared.rpc.status import fault_of

log = structlog.get_logger()

FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 60.0

_stub: Callable[[grpc.aio.Channel], object] = BuilderServiceStub


class BuilderNews:
    """Watches a deployment at a builder, and calls notify for each new generation.

    A builder that is away, or ends the stream, is called again at growing intervals: what it would have sent is
    found in the store later. The key and the certificates are those that clients read from the environment.
    """

    def __init__(
        self, address: str, deployment: str, notify: Callable[[], None], *, first_pause_s: float = FIRST_PAUSE_S
    ) -> None:
        self._address = address
        self._deployment = deployment
        self._notify = notify
        self._first_pause_s = first_pause_s
        self._pause_s = first_pause_s
        self._generation: int | None = None
        self._away = False

    async def run(self) -> None:
        """Listen until cancelled; raise SettingsInvalid where address, key or certificate cannot be used."""
        credentials = Credentials()
        async with credentials.channel(self._address, grpc.aio) as channel:
            calls = Calls(_stub(channel), credentials)
            while True:
                await self._listen(calls)
                await asyncio.sleep(self._pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - no secret
                self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)

    async def _listen(self, calls: Calls) -> None:
        request = builder_pb2.WatchDeploymentRequest(name=self._deployment, changes_only=True, follow=True)
        try:
            async for response in calls.WatchDeployment(request):
                self._take(response.deployment.generation)
        except grpc.RpcError as error:
            self._lost(fault_of(error, self._address))

    def _take(self, generation: int) -> None:
        if self._away:
            log.info("builder reports generations again", builder=self._address)
        self._away, self._pause_s = False, self._first_pause_s
        if generation != self._generation:
            self._generation = generation
            self._notify()

    def _lost(self, fault: Fault) -> None:
        if not self._away:
            log.warning(
                "builder reports no generations, reading the store instead",
                builder=self._address,
                reason=fault.reason,
                problem=fault.message,
            )
        self._away = True


class BuilderPublisher:
    """Publishes generations of one deployment, and answers when they are there."""

    def __init__(self, client: AsyncClient, deployment: str) -> None:
        self._client = client
        self._deployment = deployment

    async def add(self, name: str, repository: Repository, *, must_be_new: bool) -> int:
        """Publish a generation that has an adapter more, or another version of it; return its number."""
        return await self._update(add={name: repository}, must_be_new=must_be_new)

    async def remove(self, name: str) -> int:
        """Publish a generation without an adapter; return its number."""
        return await self._update(remove=(name,))

    async def roll_back(self, to: int | None) -> int:
        """Publish an older generation again; return the new number."""
        return (await self._client.rollback(self._deployment, to)).generation

    async def _update(
        self,
        add: Mapping[str, Repository | str] | None = None,
        remove: Iterable[str] = (),
        must_be_new: bool = False,
    ) -> int:
        request_id = str(uuid.uuid4())
        await self._client.update(self._deployment, add, remove, must_be_new=must_be_new, request_id=request_id)
        last = None
        async for info in self._client.watch(self._deployment, request_id=request_id):
            last = info
        if last is None:
            raise InternalFault("the builder reported nothing of the build. Please report it.")
        return _number(last)


def _number(info: DeploymentInfo) -> int:
    if info.state is DeploymentState.FAILED and info.failure is not None:
        raise info.failure
    if info.generation is None:
        raise InternalFault("the builder reported no generation of a build that ended. Please report it.")
    return info.generation
