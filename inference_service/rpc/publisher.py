"""A builder that changes the replica's deployment, as operators at the replica ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from loramux.client import AsyncClient
from loramux.records import DeploymentInfo, DeploymentState
from loramux_shared.deployment import Repository
from loramux_shared.faults import BuildInProgress

PATIENCE: Final = 10
"""Builds of others that an update waits for."""


class BuilderPublisher:
    """Publishes generations through a builder; each call returns when its generation is there."""

    def __init__(self, client: AsyncClient, deployment: str) -> None:
        self._client = client
        self._deployment = deployment

    async def add(self, name: str, repository: Repository, expected: int | None) -> int:
        """Publish a generation that has an adapter more, or another version of it; return its number.

        Raises:
            GenerationMismatch: expected is given, and it is not the newest.
            Fault: what the builder found.
        """
        return await self._update({name: repository}, (), expected)

    async def remove(self, name: str) -> int:
        """Publish a generation without an adapter; return its number."""
        return await self._update({}, (name,), None)

    async def roll_back(self, to: int | None) -> int:
        """Publish an older generation again, the one before where to is None; return the new number."""
        return (await self._client.rollback(self._deployment, to)).generation

    async def _update(
        self, add: Mapping[str, Repository], remove: tuple[str, ...], expected: int | None
    ) -> int:
        for _ in range(PATIENCE):
            try:
                state = await self._client.update(self._deployment, add, remove, expected_generation=expected)
            except BuildInProgress:
                async for _ in self._client.watch(self._deployment):
                    pass
            else:
                return await self._ended(state)
        raise BuildInProgress(f"others build {self._deployment!r} all the time. Try again later.")

    async def _ended(self, state: DeploymentInfo) -> int:
        """Wait for the end of a build; return the generation that is served then.

        Raises:
            Fault: why it failed.
        """
        if state.state is DeploymentState.BUILDING:
            async for change in self._client.watch(self._deployment):
                state = change
        if state.failure is not None:
            raise state.failure
        return state.generation or 0
