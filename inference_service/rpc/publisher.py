"""A builder, as a replica asks it to change its deployment."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping

from loramux.client import AsyncClient
from loramux.records import DeploymentInfo, DeploymentState
from loramux_shared.deployment import Repository
from loramux_shared.faults import InternalFault


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
            raise InternalFault("the builder told nothing of the build. Please report it.")
        return _number(last)


def _number(info: DeploymentInfo) -> int:
    if info.state is DeploymentState.FAILED and info.failure is not None:
        raise info.failure
    if info.generation is None:
        raise InternalFault("the builder told no generation of a build that ended. Please report it.")
    return info.generation
