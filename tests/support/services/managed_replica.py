"""A replica for tests of operators: real manager, pins and registry; no engine, store or builder."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

from inference_service.adapters.adapter_set import AdapterSet
from inference_service.adapters.catalog import Catalog
from inference_service.adapters.follower import FollowerStanding
from inference_service.adapters.manager import AdapterManager
from inference_service.adapters.views import Facts
from inference_service.api.rpc.adapters import SERVICE_NAME, AdapterServicer
from inference_service.core.adapter import Adapter
from inference_service.core.served_model import ServedModel
from inference_service.engine.scheduling.residents import AdapterState, ResidencyStats, Standing
from loramux.inference.v1 import inference_pb2_grpc
from loramux_shared import faults
from loramux_shared.access.guard import NOBODY_GUARDS, Guard
from loramux_shared.bundle.generation import AdapterRecord, Generation
from loramux_shared.bundle.manifest import AdapterSummary
from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.rpc.server import RpcServer
from tests.support import generations
from tests.support.servers import ANY_PORT, serve
from tests.support.services.fake_grpc import FakeInference
from tests.support.waiting import loop_in_thread

SUMMARY = AdapterSummary(
    ranks=(4, 8), modules=("attn_q",), tensors_used=4, weights_bytes=64, bundle_bytes=100, texts=()
)


def digest_of(number: int) -> str:
    return f"{number:064x}"


def record(number: int) -> AdapterRecord:
    return generations.record(f"lora-{number}", digest=digest_of(number), summary=SUMMARY)


def generation(number: int, adapters: Mapping[str, int]) -> Generation:
    records = {name: record(version) for name, version in adapters.items()}
    fields = {"deployment": "demo", "served_model_name": "base", "max_lora_rank": 64}
    return generations.generation(number=number, adapters=records, **fields)


class FakeResidency:
    """Loads at once what is pinned or prefetched, unless it is told to fail."""

    capacity = 1000

    def __init__(self) -> None:
        self.stats = ResidencyStats()
        self.calls: list[tuple[str, str]] = []
        """Calls, with the last digits of the digest."""
        self.known: dict[Adapter, Standing] = {}
        self.fails: faults.Fault | None = None
        self.looked_at = 0

    @property
    def num_bytes(self) -> int:
        return sum(each.num_bytes for each in self.known.values() if each.state is AdapterState.RESIDENT)

    def standing(self, adapter: Adapter) -> Standing:
        self.looked_at += 1
        return self.known.get(adapter, Standing(adapter))

    def standings(self) -> list[Standing]:
        return list(self.known.values())

    def hold(self, adapter: Adapter, *, in_flight: int = 0, used_s: float | None = None) -> None:
        adapter.slot = len(self.known)
        self.stats.loads += 1
        self.known[adapter] = Standing(adapter, AdapterState.RESIDENT, 100, in_flight, last_used_s=used_s)

    def pin(self, adapter: Adapter) -> None:
        self._note("pin", adapter)
        self._bring(adapter)

    def unpin(self, adapter: Adapter) -> None:
        self._note("unpin", adapter)

    def prefetch(self, adapter: Adapter) -> None:
        self._note("prefetch", adapter)
        self._bring(adapter)

    def drop(self, adapter: Adapter) -> None:
        self._note("drop", adapter)
        adapter.slot = None
        self.known.pop(adapter, None)

    def _note(self, what: str, adapter: Adapter) -> None:
        self.calls.append((what, adapter.digest.lstrip("0")))

    def _bring(self, adapter: Adapter) -> None:
        if self.fails is not None:
            self.stats.failures += 1
            self.known[adapter] = Standing(adapter, pinned=True, fault=self.fails)
        elif adapter not in self.known:
            self.hold(adapter)


class FakeDeployment:
    """A deployment with its builder, and a replica that follows it when it is asked to."""

    def __init__(self, started: Generation) -> None:
        self.history = [started]
        self.standing = FollowerStanding(started.number, started.number)
        self.adapters: AdapterSet | None = None
        self.asked: list[tuple[str, Repository, bool]] = []
        self.racing: list[Mapping[str, int]] = []
        """Changes that others publish right before the next ones."""
        self.refuses: faults.Fault | None = None
        self.building = asyncio.Event()
        """Set while additions go on; they wait for it."""
        self.building.set()

    @property
    def newest(self) -> Generation:
        return self.history[-1]

    def publish(self, adapters: Mapping[str, AdapterRecord]) -> int:
        number = self.newest.number + 1
        published = self.newest.model_copy(update={"number": number, "adapters": dict(adapters)})
        published.check_names()
        self.history.append(published)
        return number

    async def add(self, name: str, repository: Repository, *, must_be_new: bool) -> int:
        self.asked.append((name, repository, must_be_new))
        await self.building.wait()
        self._race()
        if must_be_new and name in self.newest.adapters:
            raise faults.AdapterExists(f"expected a new adapter, found {name}")
        return self.publish(self.newest.adapters | {name: record(1000 + len(self.history))})

    async def remove(self, name: str) -> int:
        self._race()
        if name not in self.newest.adapters:
            raise faults.ModelNotFound(f"no adapter {name!r} in the deployment")
        return self.publish({other: each for other, each in self.newest.adapters.items() if other != name})

    async def roll_back(self, to: int | None) -> int:
        self._race()
        if len(self.history) < (2 if to is None else to):
            raise faults.GenerationNotFound(f"no generation {to} among {len(self.history)}")
        return self.publish(self.history[-2 if to is None else to - 1].adapters)

    async def catch_up(self, number: int) -> None:
        if self.newest.number < number:
            raise faults.ReplicaBehind(f"expected {number}, found {self.newest.number}")
        self.adapters.apply(self.newest)
        self.standing = FollowerStanding(self.newest.number, self.newest.number)

    def _race(self) -> None:
        if self.refuses is not None:
            raise self.refuses
        if self.racing:
            self.publish({name: record(version) for name, version in self.racing.pop(0).items()})


class FakeBundles:
    """A store with one bundle."""

    def __init__(self, *digests: str) -> None:
        self.digests = set(digests)

    async def record(self, digest: str) -> AdapterRecord:
        if digest not in self.digests:
            raise faults.BundleNotFound(f"the store has no bundle {digest[:12]}")
        source = Repository(source=SourceKind.HF, repo="org/pushed")
        return AdapterRecord(digest=digest, source=source)


@dataclass
class ManagedReplica:
    """A manager, and what it manages."""

    names: Catalog
    residency: FakeResidency
    deployment: FakeDeployment
    adapters: AdapterSet
    manager: AdapterManager
    pauses: list[bool] = field(default_factory=lambda: [False])

    def adapter(self, name: str) -> Adapter:
        found = self.names.get(name).adapter
        assert found is not None
        return found


def managed_replica(
    adapters: Mapping[str, int] | Iterable[str] = ("one", "two"),
    *,
    builder: bool = True,
    bundles: tuple[str, ...] = (),
) -> ManagedReplica:
    """A replica at generation 1; names have versions of their numbers."""
    versions = dict(adapters) if isinstance(adapters, Mapping) else {}
    versions = versions or {name: number for number, name in enumerate(adapters, start=1)}
    started = generation(1, versions)
    residency, deployment = FakeResidency(), FakeDeployment(started)
    names = Catalog(0, "base", [ServedModel("base")])
    names.apply(started)
    adapter_set = AdapterSet(names, residency, lambda command: command())
    pauses = [False]
    manager = AdapterManager(
        adapter_set,
        deployment,
        Facts("demo", datetime.now(UTC), dtype="bfloat16", max_lora_rank=64, ranks=2),
        bundles=FakeBundles(*bundles),
        publisher=deployment if builder else None,
        paused=lambda: pauses[0],
    )
    deployment.adapters = adapter_set
    return ManagedReplica(names, residency, deployment, adapter_set, manager, pauses)


@contextmanager
def serve_adapters(
    replica: ManagedReplica, guard: Guard = NOBODY_GUARDS
) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Run the gRPC API of a replica in a thread; yields its address, and a call in its loop."""
    with loop_in_thread() as do:
        serving = _serve(replica, guard)
        address = do(serving.__aenter__())
        try:
            yield address, do
        finally:
            do(serving.__aexit__(None, None, None))


@asynccontextmanager
async def _serve(replica: ManagedReplica, guard: Guard) -> AsyncIterator[str]:
    add: Any = inference_pb2_grpc.add_InferenceServiceServicer_to_server
    services = {
        SERVICE_NAME: AdapterServicer(replica.manager).register,
        "loramux.inference.v1.InferenceService": partial(add, FakeInference()),
    }
    async with serve(RpcServer(ANY_PORT, services, guard), 0.1) as server:
        yield server.address
