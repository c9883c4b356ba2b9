"""Builders over folders and one store, which a test can shut, take away and watch; also behind gRPC."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from builder_service.builds.builds import Builds
from builder_service.builds.journal import Journal, JournalEntry
from builder_service.builds.keeper import BuildLimits
from builder_service.builds.views import DeploymentView
from builder_service.pipeline.check import Checks
from builder_service.pipeline.context import BuildContext
from builder_service.rpc.servicer import SERVICE_NAME, BuilderServicer
from loramux_shared.bundle.deployments import current_generation
from loramux_shared.bundle.generation import BUILDS_PREFIX, Generation
from loramux_shared.deployment import Deployment, Repository
from loramux_shared.faults import StoreUnavailable
from loramux_shared.rpc.calls import USUAL, Patience
from loramux_shared.rpc.server import RpcServer
from loramux_shared.storage.base import Store
from loramux_shared.storage.memory import MemoryStore
from tests.support.adapters import tensors, write_adapter, write_base
from tests.support.folders import context_of, deployment_of, local_repository
from tests.support.servers import ANY_PORT, serve
from tests.support.waiting import BOUND_S, bounded

OWNER, OTHER = "0" * 16, "1" * 16
GOOD = ("one", "two", "three")
HOUR = 3600.0


class GatedStore(MemoryStore):
    """Puts of bundles wait while the gate is shut, and nothing can be put while it is down."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.waiting = threading.Event(), threading.Event()
        self.gate.set()
        self.down = False

    def put(self, key: str, data: bytes | Path) -> None:
        if self.down:
            raise StoreUnavailable("the store is down")
        if key.startswith("bundles/") and not self.gate.is_set():
            self.waiting.set()
            assert self.gate.wait(BOUND_S), f"the gate stayed shut for {key}"
        super().put(key, data)


class Builders:
    """A base, three good adapters and a bad one in folders, and builders that publish into one store."""

    def __init__(self, folder: Path) -> None:
        write_base(folder / "base")
        for seed, name in enumerate(GOOD):
            write_adapter(folder / name, tensors(seed=seed))
        write_adapter(folder / "bad", use_dora=True)
        self.folder, self.store = folder, GatedStore()
        self.started: list[Builds] = []
        self.checks = Checks(self.context())

    def deployment(self, *names: str, name: str = "tiny", **build: object) -> Deployment:
        return deployment_of(self.folder, *names, name=name, **build)

    def repository(self, name: str) -> Repository:
        """The folder of an adapter, or the base's."""
        return local_repository(self.folder / name)

    def context(self, owner: str = OWNER) -> BuildContext:
        return context_of(self.folder, self.store, owner=owner)

    def builder(self, owner: str = OWNER, **limits: float) -> Builds:
        self.started.append(Builds(self.context(owner), replace(BuildLimits(), **limits)))
        return self.started[-1]

    @staticmethod
    def stopping(builds: Builds) -> asyncio.Event:
        """The event that the build of the deployment is asked to end."""
        return builds._builds["tiny"].stopping

    @asynccontextmanager
    async def served(self, builds: Builds, patience: Patience = USUAL) -> AsyncIterator[str]:
        """The address of a builder's service."""
        async with serve(builder_rpc(builds, self.checks, patience)) as server:
            try:
                yield server.address
            finally:
                await self.close()

    @property
    def journal(self) -> list[str]:
        """The keys of builds that have not ended."""
        return list(MemoryStore.list(self.store, BUILDS_PREFIX))

    @property
    def generation(self) -> Generation:
        found = current_generation(self.store, "tiny")
        assert found is not None
        return found

    async def close(self) -> None:
        """Open the gate, and let everything end."""
        self.store.gate.set()
        self.store.down = False
        self.checks.stop()
        for builds in self.started:
            await builds.drain(BOUND_S)


def leave_builds(store: Store, owner: str, *entries: JournalEntry) -> None:
    """Leave builds as an owner that was killed does."""
    journal = Journal(store, owner, HOUR)
    journal.beat()
    for number, entry in enumerate(entries):
        journal.add(number, entry.draw_id(), entry)


async def await_build(builds: Builds, name: str = "tiny") -> DeploymentView:
    """The last state of a deployment that a builder builds."""
    async with bounded(f"the end of the build of {name}"):
        return [view async for view in builds.watch(name)][-1]


def builder_rpc(builds: Builds, checks: Checks, patience: Patience = USUAL) -> RpcServer:
    """Return the gRPC server of a builder."""
    return RpcServer(ANY_PORT, {SERVICE_NAME: BuilderServicer(builds, checks).register}, patience=patience)


@asynccontextmanager
async def serve_builder(context: BuildContext) -> AsyncIterator[str]:
    """Run a builder that builds one deployment at a time; yields its address."""
    builds, checks = Builds(context, BuildLimits(running=1)), Checks(context)
    await builds.recover()
    async with serve(builder_rpc(builds, checks)) as server:
        try:
            yield server.address
        finally:
            checks.stop()
            await builds.drain(BOUND_S)
