"""A builder, as a replica asks it to change its deployment."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Final, Protocol

from loramux.records import DeploymentInfo, DeploymentState
from loramux_shared.deployment import Repository
from loramux_shared.faults import BuildInProgress, InternalFault

ATTEMPTS: Final = 20
"""To begin an update while others of the same deployment run, each of which is waited for."""


class Published(Protocol):
    """What a rollback published."""

    @property
    def generation(self) -> int:
        """Its number."""
        ...


class BuilderClient(Protocol):
    """What of `loramux.AsyncClient` is used here."""

    async def update(
        self,
        name: str,
        add: Mapping[str, Repository | str] | None = None,
        remove: Iterable[str] = (),
        *,
        expected_generation: int | None = None,
        request_id: str | None = None,
    ) -> DeploymentInfo:
        """Start an update."""
        ...

    def watch(self, name: str) -> AsyncIterator[DeploymentInfo]:
        """Stream the state of a deployment until its newest build has ended."""
        ...

    async def rollback(self, name: str, to: int | None = None) -> Published:
        """Publish an older generation again."""
        ...


class BuilderPublisher:
    """Publishes generations of one deployment, and answers when they are there."""

    def __init__(self, client: BuilderClient, deployment: str) -> None:
        self._client = client
        self._deployment = deployment

    async def add(self, name: str, repository: Repository, expected: int | None) -> int:
        """Publish a generation that has an adapter more, or another version of it; return its number."""
        return await self._update(add={name: repository}, expected=expected)

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
        expected: int | None = None,
    ) -> int:
        left = ATTEMPTS
        while True:
            try:
                await self._client.update(self._deployment, add, remove, expected_generation=expected)
                break
            except BuildInProgress:
                left -= 1
                if not left:
                    raise
                await self._until_built()  # of others: how it ends is not ours to tell
        return _number(await self._until_built())

    async def _until_built(self) -> DeploymentInfo:
        last = None
        async for info in self._client.watch(self._deployment):
            last = info
        if last is None:
            raise InternalFault("the builder told nothing of the build. Please report it.")
        return last


def _number(info: DeploymentInfo) -> int:
    if info.state is DeploymentState.FAILED and info.failure is not None:
        raise info.failure
    if info.generation is None:
        raise InternalFault("the builder told no generation of a build that ended. Please report it.")
    return info.generation
