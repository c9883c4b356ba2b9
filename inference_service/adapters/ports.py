"""Ports of a replica's adapters to the outside; each has a second implementation, or a fake."""

from typing import Protocol

from inference_service.adapters.follower import FollowerStanding
from inference_service.core.adapter import Adapter
from inference_service.engine.scheduling.residents import ResidencyStats, Standing
from loramux_shared.bundle.generation import AdapterRecord
from loramux_shared.deployment import Repository


class AdapterResidency(Protocol):
    """The adapters in the bank; a change is called on the engine's thread alone."""

    @property
    def stats(self) -> ResidencyStats:
        """Counters."""
        ...

    @property
    def num_bytes(self) -> int:
        """Return the bytes of resident adapters in the bank."""
        ...

    @property
    def capacity(self) -> int:
        """Return the bytes of the bank."""
        ...

    def standing(self, adapter: Adapter) -> Standing:
        """Say what is known of an adapter; on any thread."""
        ...

    def standings(self) -> list[Standing]:
        """The same of all that are resident, wanted, pinned, or failed lately."""
        ...

    def pin(self, adapter: Adapter) -> None:
        """Keep an adapter resident from now on."""
        ...

    def unpin(self, adapter: Adapter) -> None:
        """Let it leave when others need its place."""
        ...

    def prefetch(self, adapter: Adapter) -> None:
        """Load an adapter if there is free room."""
        ...

    def drop(self, adapter: Adapter) -> None:
        """Let an adapter leave now, if it may."""
        ...


class GenerationFollower(Protocol):
    """Follows the deployment."""

    @property
    def standing(self) -> FollowerStanding:
        """Return the present standing of the replica."""
        ...

    async def catch_up(self, number: int) -> None:
        """Return when the replica serves this generation or a newer one; raises ReplicaBehind."""
        ...


class Resolver(Protocol):
    """Adds adapters of repositories that requests name."""

    async def bring(self, name: str) -> None:
        """Return when this replica serves the adapter that a name stands for, or if none may be added by it.

        Raises:
            Fault: the adapter is refused, or cannot be fetched now.
        """
        ...

    async def run(self) -> None:
        """Remove adapters that no request uses any more, until cancelled."""
        ...


class Publisher(Protocol):
    """A builder that publishes generations of the replica's deployment, and answers when one is there.

    What the builder refuses arrives as the fault that it named.
    """

    async def add(self, name: str, repository: Repository, *, must_be_new: bool) -> int:
        """Publish a generation that has an adapter more, or another version of it; return its number.

        With must_be_new the deployment must not have the name, else `AdapterExists` is raised.
        """
        ...

    async def remove(self, name: str) -> int:
        """Publish a generation without an adapter; return its number."""
        ...

    async def roll_back(self, to: int | None) -> int:
        """Publish an older generation again, the one before where to is None; return the new number."""
        ...


class Bundles(Protocol):
    """The store's bundles."""

    async def record(self, digest: str) -> AdapterRecord:
        """Return what a generation would say of a bundle; raises BundleNotFound, BundleCorrupt, ...."""
        ...
