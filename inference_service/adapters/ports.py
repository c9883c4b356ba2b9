"""What the manager of adapters asks of those who do the work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from inference_service.adapters.catalog import ServedModel
from inference_service.core.sequence import Adapter
from inference_service.engine.residency_entry import ResidencyStats
from inference_service.engine.residents import Standing
from loramux_shared.bundle.generation import AdapterRecord, Generation
from loramux_shared.deployment import Repository


class Names(Protocol):
    """What is served under which name; changes on the event loop alone."""

    @property
    def generation(self) -> int:
        """The deployment's generation that is served."""
        ...

    @property
    def base_name(self) -> str:
        """Of the base, whether it is served or not."""
        ...

    @property
    def everything(self) -> Sequence[ServedModel]:
        """All models whoever asks: the base, where it is served, then the adapters by name."""
        ...

    def get(self, name: str) -> ServedModel:
        """Return a model that the caller may use; raises ModelNotFound."""
        ...


class Changes(Protocol):
    """What a generation made of the names before it."""

    @property
    def added(self) -> Sequence[str]:
        """Names that were not there."""
        ...

    @property
    def switched(self) -> Sequence[str]:
        """Names that have another version."""
        ...

    @property
    def removed(self) -> Sequence[str]:
        """Names that are there no more."""
        ...


class ChangingNames(Names, Protocol):
    """Names that follow a deployment."""

    def apply(self, generation: Generation) -> Changes:
        """Take over another generation in one step."""
        ...


class Residency(Protocol):
    """Which adapters are in the bank; what changes something is called on the engine's thread alone."""

    @property
    def stats(self) -> ResidencyStats:
        """Counters."""
        ...

    @property
    def num_bytes(self) -> int:
        """What resident adapters take of the bank."""
        ...

    @property
    def capacity(self) -> int:
        """What the bank has."""
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
        """Load an adapter if there is room that nobody has."""
        ...

    def drop(self, adapter: Adapter) -> None:
        """Let an adapter leave now, if it may."""
        ...


class FollowerStanding(Protocol):
    """Where a replica is, beside its deployment."""

    @property
    def generation(self) -> int:
        """Served."""
        ...

    @property
    def newest(self) -> int:
        """The newest that was seen."""
        ...

    @property
    def state(self) -> str:
        """In one word: fixed, current, stale or blind."""
        ...

    @property
    def stale(self) -> str:
        """Why the newest is not served."""
        ...


class Follower(Protocol):
    """Follows the deployment."""

    @property
    def standing(self) -> FollowerStanding:
        """Where the replica is now."""
        ...

    async def catch_up(self, number: int) -> None:
        """Return when the replica serves this generation or a newer one; raises ReplicaBehind."""
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
