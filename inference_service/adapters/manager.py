"""Operators' calls for adapters: list, pin, load and unload them."""

import asyncio
import itertools
import time
from bisect import bisect_right
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from typing import Final

from inference_service.adapters.adapter_set import AdapterSet
from inference_service.adapters.changing import already_loaded, digest_of, repository_of
from inference_service.adapters.ports import Bundles, GenerationFollower, Publisher
from inference_service.adapters.views import (
    TIERS,
    AdapterPage,
    Facts,
    Loaded,
)
from inference_service.core.adapter import Adapter
from inference_service.core.served_model import ServedModel
from inference_service.engine.scheduling.residents import AdapterState
from loramux_shared.access.keys import ACCESS
from loramux_shared.deployment import Repository
from loramux_shared.faults import (
    AdapterExists,
    Fault,
    NoBuilder,
    PageTokenInvalid,
    ReplicaBehind,
    RequestInvalid,
)
from loramux_shared.operations import AdapterStatus, ReplicaStatus, Tier

PAGE: Final = 100
MAX_PAGE: Final = 1000
"""Names of a page."""
MAX_TOKEN: Final = 256
"""Characters of a page token: it is a name."""
WATCH_S: Final = 0.1
"""Between two looks at what a watcher gets."""
BLIND_REASON: Final = "the store cannot be read; the server's log says why"


class AdapterManager:
    """The adapters of a replica, for operators. Used on the event loop alone.

    A replica does not convert: what is not a bundle yet is given to a builder, which publishes the next
    generation, so that a change through one replica reaches all of them and survives restarts.
    """

    def __init__(
        self,
        adapters: AdapterSet,
        follower: GenerationFollower,
        facts: Facts,
        *,
        bundles: Bundles | None = None,
        publisher: Publisher | None = None,
        paused: Callable[[], bool] = lambda: False,
    ) -> None:
        """Manage what is there; bundles is None where names never change, publisher without a builder."""
        self._adapters = adapters
        self._catalog = adapters.catalog
        self.residency = adapters.residency
        self._follower = follower
        self.facts = facts
        self._bundles = bundles
        self._publisher = publisher
        self._paused = paused
        self._version = version("loramux")

    def tier_of(self, model: ServedModel) -> Tier:
        """Say where a model's matrices are; costs next to nothing."""
        if model.adapter is None:
            return "device"
        return TIERS[self.residency.standing(model.adapter).state]

    def failure_of(self, model: ServedModel) -> Fault | None:
        """Return why a model is no longer served, or why its last load failed; None where neither is so."""
        return None if model.adapter is None else self.residency.standing(model.adapter).failure

    def is_pinned(self, name: str) -> bool:
        """True for a name that is pinned."""
        return self._adapters.is_pinned(name)

    def list(self, after: str = "", limit: int = PAGE) -> AdapterPage:
        """Return the adapters behind a name, in the order of their names; only those are looked at.

        Raises:
            PageTokenInvalid: after is no name that any answer gave.
        """
        if len(after) > MAX_TOKEN:
            raise PageTokenInvalid("expected the next_page_token of the last answer, found something longer.")
        models, access = self._catalog.everything, ACCESS.get()
        first = 1 if models and models[0].name == self._catalog.base_name else 0
        begin = bisect_right(models, after, lo=first, key=lambda model: model.name)
        visible = (models[at] for at in range(begin, len(models)) if access.may_use(models[at].name))
        found = list(itertools.islice(visible, min(limit or PAGE, MAX_PAGE) + 1))
        page = found[: min(limit or PAGE, MAX_PAGE)]
        more = page[-1].name if len(found) > len(page) else ""
        return AdapterPage(tuple(map(self._view, page)), more)

    def get(self, name: str) -> AdapterStatus:
        """Return one adapter.

        Raises:
            ModelNotFound: there is no such name.
            RequestInvalid: it is the base's.
        """
        return self._view(self._adapter(name))

    def pin(self, name: str) -> AdapterStatus:
        """Keep a name resident, whatever version it stands for; its load begins now if it is not there.

        Raises:
            ModelNotFound: there is no such name.
            RequestInvalid: it is the base's, or the adapter is merged into the weights, which nothing leaves.
        """
        model = self._adapter(name)
        if model.adapter is None:
            raise RequestInvalid(
                f"{name!r} is merged into the base's weights: it is always resident, and cannot be pinned."
            )
        self._adapters.pin(name, model.adapter)
        return self._view(model)

    def unpin(self, name: str) -> AdapterStatus:
        """Let a name leave when others need its place; repeating it changes nothing.

        Raises:
            ModelNotFound: there is no such name.
            RequestInvalid: it is the base's.
        """
        model = self._adapter(name)
        self._adapters.unpin(name)
        return self._view(model)

    async def load(self, name: str, path: str | Repository, *, replace: bool = False) -> Loaded:
        """Have an adapter built and published, or a bundle registered, and return when it is served here.

        Raises:
            RequestInvalid: the path names no adapter, a bundle's name cannot be one of this replica, or the
                replica serves only what is signed.
            DeploymentInvalid: the builder finds that the name does not fit the others.
            AdapterExists: the name is taken, and is not to be replaced.
            NoBuilder: the path names no bundle, and this replica knows no builder; or no name can change here.
            ReplicaBehind: it was published, and this replica does not serve it yet.
            BundleNotFound: of bundle:DIGEST, the store has no such bundle.
            BundleCorrupt: likewise, its manifest is damaged.
            StoreUnavailable: it does not answer.
        """
        digest = digest_of(path) if isinstance(path, str) else None
        if digest is not None:
            await self._load_bundle(name, digest, replace=replace)
        else:
            repository = repository_of(path) if isinstance(path, str) else path
            await self._publish(name, repository, replace=replace)
        model = self._adapter(name)
        if model.adapter is not None:
            self._adapters.prefetch(model.adapter)
        return Loaded(self._view(model), everywhere=digest is None)

    async def unload(self, name: str) -> int | None:
        """Take a name away; return the generation that lacks it, or None where this replica alone had it.

        Requests that are under way end on the version that they began with.

        Raises:
            ModelNotFound: there is no such name.
            RequestInvalid: it is the base's.
            NoBuilder: a generation has it, and this replica knows no builder.
            ReplicaBehind: the generation was published, and this replica does not serve it yet.
        """
        self._adapter(name)
        if self._adapters.is_own(name):
            self._adapters.remove(name)
            return None
        generation = await self._builder().remove(name)
        await self._follower.catch_up(generation)
        return generation

    async def roll_back(self, to: int | None = None) -> int:
        """Have an older generation published again, and return its new number when it is served here.

        Raises:
            NoBuilder: this replica knows no builder.
            ReplicaBehind: the generation was published, and this replica does not serve it yet.
        """
        generation = await self._builder().roll_back(to)
        await self._follower.catch_up(generation)
        return generation

    def replica(self) -> ReplicaStatus:
        """Return the state of the replica; costs at most a look at the adapters in the bank or on their way."""
        standing, stats = self._follower.standing, self.residency.stats
        states = [each.state for each in self.residency.standings()]
        resident = states.count(AdapterState.RESIDENT)
        served_base = any(model.name == self._catalog.base_name for model in self._catalog.everything[:1])
        return ReplicaStatus(
            deployment=self.facts.deployment,
            generation=standing.generation,
            newest_generation=standing.newest,
            state=str(standing.state),
            reason=standing.stale or (BLIND_REASON if str(standing.state) == "blind" else ""),
            paused=self._paused(),
            bank_bytes=self.residency.capacity,
            bank_bytes_used=self.residency.num_bytes,
            registered=len(self._catalog.everything) - served_base,
            resident=resident,
            arriving=len(states) - resident - states.count(AdapterState.ABSENT),
            pinned=self._adapters.num_pinned,
            loads=stats.loads,
            load_failures=stats.failures,
            evictions=stats.evictions,
            start_time=self.facts.started,
            version=self._version,
        )

    async def watch(self) -> AsyncGenerator[ReplicaStatus]:
        """Yield how the replica is: at once, and again when what `_watched` returns changes."""
        sent: tuple[object, ...] | None = None
        while True:
            status = self.replica()
            if (watched := _watched(status)) != sent:
                sent = watched
                yield status
            await asyncio.sleep(WATCH_S)

    def _builder(self) -> Publisher:
        if self._publisher is None:
            raise NoBuilder(
                "this replica has no builder, and only a builder can change the deployment. Start it with "
                "--builder HOST:PORT, or load a bundle that the store has: bundle:DIGEST."
            )
        return self._publisher

    def _taken(self, name: str) -> bool:
        return name != self._catalog.base_name and any(model.name == name for model in self._catalog.everything)

    def _require_free(self, name: str, *, replace: bool) -> None:
        if not replace and self._taken(name):
            raise already_loaded(name)

    async def _publish(self, name: str, repository: Repository, *, replace: bool) -> None:
        builder = self._builder()
        self._require_free(name, replace=replace)
        try:
            number = await builder.add(name, repository, must_be_new=not replace)
        except AdapterExists as fault:
            if not self._taken(name):  # published a moment ago, through another replica
                with suppress(ReplicaBehind):
                    await self._follower.catch_up(self._follower.standing.generation + 1)
            raise already_loaded(name) from fault
        await self._follower.catch_up(number)

    async def _load_bundle(self, name: str, digest: str, *, replace: bool) -> None:
        if self._bundles is None:
            raise NoBuilder("the names of this replica never change. Serve the bundle from another one.")
        self._require_free(name, replace=replace)
        self._adapters.check_own(name)
        record = await self._bundles.record(digest)
        self._require_free(name, replace=replace)
        self._adapters.add(name, record)

    def _adapter(self, name: str) -> ServedModel:
        if name == self._catalog.base_name:
            raise RequestInvalid(f"{name!r} is the base; expected the name of an adapter.")
        return self._catalog.get(name)

    def _view(self, model: ServedModel) -> AdapterStatus:
        own = self._adapters.is_own(model.name)
        if model.adapter is None:
            return AdapterStatus(
                model.name,
                model.digest,
                model.digest,
                self._catalog.generation,
                "device",
                "resident",
                pinned=True,
                in_flight=0,
                waiting=0,
                num_bytes=0,
                last_used=None,
                last_failure=None,
                only_here=own,
                kinds=model.kinds,
            )
        standing = self.residency.standing(model.adapter)
        return AdapterStatus(
            model.name,
            model.digest,
            self._resident_digest(model.name, model.adapter),
            self._catalog.generation,
            TIERS[standing.state],
            standing.state.value,
            pinned=self._adapters.is_pinned(model.name),
            only_here=own,
            kinds=model.kinds,
            in_flight=standing.in_flight,
            waiting=standing.waiting,
            num_bytes=standing.num_bytes,
            last_used=_wall_time(standing.last_used_s),
            last_failure=standing.failure,
        )

    def _resident_digest(self, name: str, adapter: Adapter) -> str:
        before = self._adapters.version_before(name)
        found = next((each for each in (adapter, before) if each is not None and each.slot is not None), None)
        return found.digest if found is not None else ""


def _wall_time(monotonic_s: float | None) -> datetime | None:
    if monotonic_s is None:
        return None
    return datetime.now(UTC) - timedelta(seconds=time.monotonic() - monotonic_s)


def _watched(status: ReplicaStatus) -> tuple[object, ...]:
    """Return the values whose change a watcher is notified of; uses of adapters change much more often."""
    counts = (status.registered, status.pinned, status.loads, status.load_failures, status.evictions)
    return (status.generation, status.newest_generation, status.state, status.reason, status.paused, *counts)
