"""Follows a deployment: looks for a newer generation, takes it over, or says why that needs a restart."""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

import structlog

from inference_service.adapters.workers import Workers
from loramux_shared.bundle.deployments import READ_AGAIN_S, read_generation, read_pointer
from loramux_shared.bundle.generation import Current, Generation
from loramux_shared.deployment import Merge
from loramux_shared.faults import BundleCorrupt, Fault, ReplicaBehind, StoreUnavailable
from loramux_shared.rpc.stopping import shielded, wait_at_most
from loramux_shared.storage.base import Store

log = structlog.get_logger()

JITTER: Final = 0.2
"""Part of the interval by which looks are drawn apart, so that replicas do not ask all at once."""
SPACING_S: Final = 0.1
"""At least, between two looks: requests may ask for any generation, also for one that never comes."""


class FollowerState(StrEnum):
    """The relation of a replica to its deployment."""

    FIXED = "fixed"
    """It serves the generation of its start and looks for no other."""
    CURRENT = "current"
    """It serves the newest generation that it saw."""
    STALE = "stale"
    """There is a newer one that it cannot take over without a restart."""
    BLIND = "blind"
    """The store does not answer, or what it has is damaged or not signed."""


@dataclass(frozen=True)
class FollowerStanding:
    """The standing of a replica."""

    generation: int
    """Served."""
    newest: int
    """The newest that was seen."""
    follows: bool = True
    stale: str = ""
    """Why the newest is not served: what needs a restart, or what failed when it was taken over."""
    blind: str = ""
    """Why nothing newer can be seen; for operators, it may name the store."""

    @property
    def state(self) -> FollowerState:
        """Return the state in one word; a restart is an operator's task, so it comes first."""
        if not self.follows:
            return FollowerState.FIXED
        return (
            FollowerState.STALE if self.stale else FollowerState.BLIND if self.blind else FollowerState.CURRENT
        )


class Follower:
    """Looks at ``current.json`` in intervals, when it is nudged, and when a request wants a newer generation.

    take is `AdapterSet.apply`, called on the event loop with each newer generation that needs no restart. Where
    it raises, the generation is not taken over, and is tried again at the next look. Where ends is true, the
    replica is to end as soon as a generation needs a restart. A lower number is never taken over, and nothing
    that is not whole: generations are read against the digest that the pointer names.
    """

    def __init__(
        self,
        store: Store,
        started: Generation,
        take: Callable[[Generation], object],
        *,
        interval_s: float,
        ends: bool = False,
        spacing_s: float = SPACING_S,
    ) -> None:
        self.outdated = asyncio.Event()
        """Set as soon as a generation was seen for which the replica is to end and start again."""
        self._store = store
        self._started = started
        self._name = started.deployment
        self._take = take
        self._interval_s = interval_s
        self._ends = ends
        self._spacing_s = spacing_s
        self._nudged = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None
        self._looked_s = -spacing_s
        self._settled = started.number
        """The newest generation that was taken over, or that needs a restart."""
        self._went_back = False
        self._workers: Workers | None = None
        self._standing = FollowerStanding(started.number, started.number, interval_s > 0)

    @property
    def standing(self) -> FollowerStanding:
        """Return the present standing of the replica."""
        return self._standing

    async def run(self) -> None:
        """Follow until cancelled; returns at once where nothing is to be followed."""
        while self._interval_s:
            pause_s = self._interval_s * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 - no secret
            await wait_at_most(pause_s, self._nudged)
            self._nudged.clear()
            await self._look()

    def nudge(self) -> None:
        """Look soon, since a newer generation was announced. To be called on the event loop."""
        self._nudged.set()

    async def catch_up(self, number: int) -> None:
        """Return when the replica serves this generation or a newer one; look at the store if need be.

        Raises:
            ReplicaBehind: it does not, and the store has none that can be taken over now.
        """
        if self._interval_s and self._standing.generation < number:
            joined = self._looking is not None
            await self._look()
            if joined and self._standing.generation < number:  # what was joined may have looked too early
                await self._look()
        if self._standing.generation < number:
            raise ReplicaBehind(
                f"expected generation {number} of {self._name!r} or a newer one, this replica serves "
                f"{self._standing.generation}{_STATE_CAUSES[self._standing.state]}. "
                "Retry, here or with another replica."
            )

    def close(self) -> None:
        """End the thread; the caller of `run` cancels that."""
        self._interval_s = 0.0
        if self._workers is not None:
            self._workers.close()

    async def _look(self) -> None:
        """Look once; who comes while a look is under way waits for that one."""
        if self._looking is None or self._looking.done():  # a finished look is removed a moment later
            self._looking = asyncio.create_task(self._look_once())
            self._looking.add_done_callback(self._looked)
        await shielded(self._looking)

    def _looked(self, look: asyncio.Task[None]) -> None:
        if self._looking is look:
            self._looking = None

    async def _look_once(self) -> None:
        await asyncio.sleep(self._looked_s + self._spacing_s - time.monotonic())
        if not self._interval_s:
            return
        self._workers = self._workers or Workers("follower", 1)  # a store that hangs delays no exit
        try:
            pointer, generation = await asyncio.wrap_future(self._workers.submit(self._read))
        except (BundleCorrupt, StoreUnavailable) as fault:
            self._lost_sight(fault)
            return
        finally:
            self._looked_s = time.monotonic()
        self._saw(pointer)
        if generation is not None:
            self._consider(generation)

    def _read(self) -> tuple[Current, Generation | None]:
        """Return the pointer, and the generation that it names where that is news; on a thread.

        What does not fit is read again a few times: a store may send parts of two versions of a pointer.
        """
        for pause_s in READ_AGAIN_S:
            try:
                return self._read_once()
            except BundleCorrupt:
                time.sleep(pause_s)
        return self._read_once()

    def _read_once(self) -> tuple[Current, Generation | None]:
        pointer = read_pointer(self._store, self._name)
        if pointer is None:
            raise BundleCorrupt(f"{self._store.uri}: deployment {self._name!r} was deleted")
        if pointer.generation <= self._settled:
            return pointer, None
        return pointer, read_generation(self._store, self._name, pointer.generation, sha256=pointer.sha256)

    def _lost_sight(self, fault: Fault) -> None:
        if not self._standing.blind:
            log.warning(
                "generations cannot be read, the replica serves its present one",
                reason=fault.reason,
                problem=fault.message,
            )
        self._standing = replace(self._standing, blind=fault.message)

    def _saw(self, pointer: Current) -> None:
        if self._standing.blind:
            log.info("generations can be read again", newest=pointer.generation)
        went_back = pointer.generation < self._settled
        if went_back and not self._went_back:
            served = self._standing.generation
            log.warning("older generation ignored", served=served, found=pointer.generation)
        self._went_back = went_back
        self._standing = replace(self._standing, blind="")

    def _consider(self, generation: Generation) -> None:
        number = generation.number
        if reason := needs_restart(self._started, generation):
            self._settled = number
            self._standing = replace(self._standing, newest=number, stale=f"a restart is needed: {reason}")
            log.warning("generation needs a restart", generation=number, reason=reason)
            if self._ends:
                log.warning("replica ends, to be restarted on the newest generation", reason=reason)
                self.outdated.set()
            return
        try:
            self._take(generation)
        except Exception as error:
            problem = error.message if isinstance(error, Fault) else "internal error; see the log"
            self._standing = replace(self._standing, newest=number, stale=problem)
            log.exception("generation could not be taken over, trying again", generation=number)
            return
        self._settled = number
        self._standing = replace(self._standing, generation=number, newest=number, stale="")
        log.info("generation taken over", generation=number, adapters=len(generation.adapters))


_STATE_CAUSES: Final = {
    FollowerState.FIXED: " and follows no deployment (follow_interval_s is 0)",
    FollowerState.CURRENT: ", the newest there is",
    FollowerState.STALE: ": the newest needs a restart",
    FollowerState.BLIND: ": it cannot read the store now",
}
"""For clients: neither paths nor addresses."""


def needs_restart(old: Generation, new: Generation) -> str | None:
    """Return why a replica that was started with one generation cannot serve another; None where it can.

    old is the generation of the start: what was sized and loaded then stays. Names, their versions and what
    is served of them may differ.
    """
    if new.base.files != old.base.files:
        return f"another base: {new.base.source.label} instead of {old.base.source.label}"
    if new.max_seq_len != old.max_seq_len:
        return f"another max_seq_len: {_described(new.max_seq_len)} instead of {_described(old.max_seq_len)}"
    if new.max_lora_rank > old.max_lora_rank:
        return f"a larger max_lora_rank: {new.max_lora_rank} instead of {old.max_lora_rank}"
    if new.quantization is not old.quantization:
        return f"weights rounded to {new.quantization} instead of {old.quantization}"
    if new.tensor_parallel_count != old.tensor_parallel_count:
        return f"{new.tensor_parallel_count} ranks that compute together instead of {old.tensor_parallel_count}"
    if new.speculator != old.speculator:
        return "another draft model, or another number of its tokens"
    return _merging(old, new)


def _merging(old: Generation, new: Generation) -> str | None:
    """An adapter that is part of the weights cannot leave them; one that could be is as right beside them."""
    if old.merged is None:
        return "its adapter is to be merged into the weights" if new.merge is Merge.ALWAYS else None
    digest = old.adapters[old.merged].digest
    if new.merged != old.merged or new.adapters[old.merged].digest != digest:
        return f"adapter {old.merged} is merged into the weights, and is to be replaced or joined by others"
    return None


def _described(value: object) -> str:
    return "none" if value is None else str(value)
