"""Adapters that requests add to a deployment, and that leave it when no request uses them.

`deployments/<name>/resolved/<adapter>` marks each in the store, so that replicas agree on which they are, on
the API key that added one, and on when one was used last: a replica that uses one puts its mark again, and the
store dates it.
"""

import asyncio
import random
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from contextvars import Context
from datetime import UTC, datetime, timedelta
from typing import Final

import structlog

from inference_service.adapters.catalog import Catalog
from inference_service.adapters.changing import repository_of
from inference_service.adapters.manager import AdapterManager
from loramux_shared.access.keys import ACCESS, Scope
from loramux_shared.access.shares import Shares
from loramux_shared.bundle.generation import resolved_key
from loramux_shared.bundle.names import bad_name
from loramux_shared.deployment import PULL_REQUESTS, Repository, Resolve, SourceKind
from loramux_shared.faults import (
    AdapterExists,
    Fault,
    ModelNotFound,
    PermissionDenied,
    RequestInvalid,
    StoreUnavailable,
)
from loramux_shared.rpc.stopping import shielded, wait_at_most
from loramux_shared.spelling import name_of_path
from loramux_shared.storage.base import ObjectMissing, Store

log = structlog.get_logger()

LOOK_S: Final = 60.0
"""Seconds between two looks at the marks."""
TOUCH: Final = timedelta(minutes=5)
"""Age at which the mark of an adapter in use is put again."""
ABANDONED: Final = timedelta(hours=1)
"""Age at which a mark without an adapter goes: its build was interrupted."""
REMEMBERED_S: Final = 60.0
"""Seconds for which a refusal is repeated without another build."""
REFUSALS: Final = 1000
"""Refusals that are remembered."""
BUILDS: Final = 16
"""Adapters that one replica has built for requests at once; others wait."""
MOST_BUILDS: Final = 256
"""Adapters that are built or wait for that; keys share both."""
WHAT: Final = "adapters that are being added"


class Resolver:
    """Has the builder add what requests name, one build per adapter. Used on the event loop alone."""

    def __init__(
        self,
        manager: AdapterManager,
        catalog: Catalog,
        store: Store,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Add through a manager; the marks are in the store."""
        self._manager = manager
        self._catalog = catalog
        self._store = store
        self._clock = clock
        self._now = now
        self._builds: dict[str, asyncio.Task[None]] = {}
        self._own: set[str] = set()
        """Adapters that this replica added."""
        self._key_ids: dict[str, str] = {}
        """API keys that added marked adapters, as far as their marks were read or put here."""
        self._refusals: OrderedDict[str, tuple[float, Fault]] = OrderedDict()
        self._added = asyncio.Event()
        self._places = Shares(MOST_BUILDS)
        self._running = Shares(BUILDS)

    async def bring(self, requested: str) -> None:
        """Return when an adapter is served, or at once if the deployment has no source that matches the name.

        Raises:
            PermissionDenied: the key lacks the scope.
            QueueFull: too many adapters are being added, or the key has its share of them.
            RequestInvalid: the repository's name is too long, or has characters that no adapter's name has.
            Fault: what the builder refuses the adapter for; for a minute without another build.
        """
        rule = self._catalog.deployed.resolve
        repository = None if rule is None else allowed(rule, requested)
        if rule is None or repository is None:
            return
        name = name_of_path(requested)
        if name in {model.name for model in self._catalog.everything} or not ACCESS.get().may_use(name):
            return
        if not ACCESS.get().may(Scope.RESOLVE):
            raise PermissionDenied(
                f"adding an adapter needs a key with the scope {Scope.RESOLVE}; this one lacks it."
            )
        if finding := bad_name(name, "model"):
            raise RequestInvalid("no adapter can have the name that this repository gives it.", [finding])
        until, refusal = self._refusals.get(requested, (0.0, None))
        if refusal is not None and self._clock() < until:
            raise refusal.copy()
        if name not in self._builds:
            # In a context of its own: the build is for all requests, and survives the first one.
            adding = self._add(name, requested, repository, ACCESS.get().key_id)
            build = self._builds[name] = asyncio.create_task(adding, context=Context())
            build.add_done_callback(lambda _: self._builds.pop(name))
        await shielded(self._builds[name])

    async def _add(self, name: str, requested: str, repository: Repository, key_id: str) -> None:
        began = self._clock()
        try:
            with self._places.held(key_id, WHAT):
                async with self._running.awaited(key_id, WHAT):
                    self._key_ids[name] = key_id
                    await self._mark(name)
                    with suppress(AdapterExists):  # another replica was first
                        await self._manager.load(name, repository)
        except Fault as fault:
            if not fault.is_passing:  # else the builder may still add it
                self._remember(requested, fault)
                with suppress(StoreUnavailable):
                    await self._unmark(name)
            log.warning(
                "adapter of a request refused", adapter=name, reason=fault.reason, problem=fault.message
            )
            raise
        self._own.add(name)
        self._added.set()
        log.info("adapter of a request added", adapter=name, seconds=round(self._clock() - began, 2))

    def _remember(self, requested: str, refusal: Fault) -> None:
        self._refusals[requested] = (self._clock() + REMEMBERED_S, refusal.copy())
        while len(self._refusals) > REFUSALS:
            self._refusals.popitem(last=False)

    async def run(self) -> None:
        """Look at the marks every minute, and after each adapter that was added, until cancelled."""
        while True:
            await wait_at_most(LOOK_S * random.uniform(0.7, 1.3), self._added)  # noqa: S311 - no secret
            self._added.clear()
            try:
                await self.look()
            except Fault as fault:
                log.warning("idle adapters stay", reason=fault.reason, problem=fault.message)

    async def look(self) -> None:
        """Date the marks of adapters in use, and remove those that are idle or too many.

        Which are too many is seen from the marks alone, for then all replicas remove the same.

        Raises:
            StoreUnavailable: the store does not answer.
            Fault: the builder removes none.
        """
        rule = self._catalog.deployed.resolve
        if rule is None:
            return
        prefix = self._key()
        entries = await asyncio.to_thread(lambda: list(self._store.entries(prefix)))
        marks = {entry.key.removeprefix(prefix): entry.modified for entry in entries}
        served = {model.name for model in self._catalog.everything}
        for name in (self._own & served) - marks.keys():  # removed and added again at the same moment
            await self._mark(name)
        self._own &= served
        self._key_ids = await asyncio.to_thread(self._keys_of, tuple(marks), dict(self._key_ids))
        used = await self._used(marks)
        idle = timedelta(hours=rule.idle_hours)
        leaving = {name for name in used if used[name] + idle < self._now()}
        dated = {name: marks[name] for name in used}
        leaving.update(surplus(dated, self._key_ids, rule.max_adapters))
        await asyncio.gather(*map(self._remove, sorted(leaving)))

    def _keys_of(self, names: Collection[str], known: Mapping[str, str]) -> dict[str, str]:
        """Return which keys added marked adapters; marks that are new here are read."""
        found = {name: known[name] for name in names if name in known}
        for name in names:
            with suppress(ObjectMissing):  # another replica removed it a moment ago
                if name not in found:
                    found[name] = self._store.get(self._key(name)).decode(errors="replace")
        return found

    async def _used(self, marks: dict[str, datetime]) -> dict[str, datetime]:
        """Return when each marked adapter was used last; put old marks again, and remove those without one."""
        used: dict[str, datetime] = {}
        for name, modified in list(marks.items()):
            try:
                view = self._manager.get(name)
            except ModelNotFound:
                if modified + ABANDONED < self._now():
                    await self._unmark(name)
                continue
            here = self._now() if view.in_flight or view.waiting or view.pinned else view.last_used
            used[name] = max(modified, here or modified)
            if used[name] - modified > TOUCH:
                marks[name] = used[name]
                await self._mark(name)
        return used

    async def _remove(self, name: str) -> None:
        with suppress(ModelNotFound):  # another replica was first
            await self._manager.unload(name)
        await self._unmark(name)
        log.info("idle adapter removed", adapter=name)

    def _key(self, name: str = "") -> str:
        return resolved_key(self._catalog.deployed.deployment, name)

    async def _mark(self, name: str) -> None:
        await asyncio.to_thread(self._store.put, self._key(name), self._key_ids.get(name, "").encode())

    async def _unmark(self, name: str) -> None:
        await asyncio.to_thread(self._store.delete, self._key(name))


def surplus(marks: Mapping[str, datetime], key_ids: Mapping[str, str], most: int) -> list[str]:
    """Return the adapters that are too many, by the dates of their marks.

    The key with the most adapters loses the one that was used longest ago, as often as there are too many.
    """
    newest_first: dict[str, list[str]] = {}
    for name in sorted(marks, key=lambda name: (marks[name], name), reverse=True):
        newest_first.setdefault(key_ids.get(name, ""), []).append(name)
    leaving = []
    for _ in range(len(marks) - most):
        of_key = min(newest_first.values(), key=lambda names: (-len(names), marks[names[-1]], names[-1]))
        leaving.append(of_key.pop())
        newest_first = {key_id: names for key_id, names in newest_first.items() if names}
    return leaving


def allowed(rule: Resolve, requested: str) -> Repository | None:
    """Return the repository that a request names, if one of the deployment's patterns allows it.

    Any user of a hub may open a pull request: the builder refuses its commits, whatever name a request gives
    them, unless a pattern of this revision names pull requests.
    """
    if "/" not in requested:
        return None
    try:
        repository = repository_of(requested)
    except RequestInvalid:
        return None
    hub = repository.source is SourceKind.HF
    address = f"hf:{repository.repo}" if hub else repository.repo
    patterns = (pattern.partition("@") for pattern in rule.sources)
    revisions = [
        revision
        for repo, at, revision in patterns
        if _matches(repo, address) and (not at or _matches(revision, repository.revision))
    ]
    if repository.subfolder or not revisions:
        return None
    branches_only = hub and not any(each.startswith(PULL_REQUESTS) for each in revisions)
    update = {"runtime_secret_name": rule.runtime_secret_name, "branches_only": branches_only}
    return repository.model_copy(update=update)


def _matches(pattern: str, address: str) -> bool:
    """Match an address with a pattern in which ``*`` is any part of a path that is not empty."""
    return re.fullmatch("[^/@#?]+".join(map(re.escape, pattern.split("*"))), address) is not None
