"""A fleet and its traffic, simulated: replicas with places for some adapters, and requests that name one.

Arrivals are Poisson, popularity is Zipf's, service times are lognormal. A replica serves so many requests at
once, others wait in its queue; its places are those of the adapters that were used last.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class World:
    """What is simulated."""

    replicas: int = 100
    adapters: int = 10_000
    places: int = 64
    zipf: float = 0.9
    seats: int = 64
    """Requests that a replica serves at once."""
    load: float = 0.7
    """Of all seats, on average."""
    service_s: float = 2.0
    spread: float = 1.0
    """Of the logarithm of a service time."""
    warm: int = 150_000
    """Requests before anything counts."""
    requests: int = 150_000
    window_s: float = 20.0
    """Over which a replica's load is taken."""
    seed: int = 1

    @property
    def popularity(self) -> NDArray[np.float64]:
        """Each adapter's part of the requests."""
        weights = np.arange(1, self.adapters + 1, dtype=np.float64) ** -self.zipf
        return np.asarray(weights / weights.sum(), np.float64)

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.replicas * self.seats * self.load / self.service_s

    def ideal(self, bound: float) -> float:
        """Return the share of hits that nobody exceeds whose replicas have at most bound times the mean load.

        Who knows all popularities beforehand keeps the most popular adapters in all places for ever, each of
        them in as many as its part of the load needs at least, and lets the others pass through.
        """
        part = self.popularity
        extra = int((np.ceil(part * self.replicas / bound) - 1).sum())
        return float(part[: self.replicas * self.places - extra].sum())


@dataclass
class View:
    """The replicas as they are."""

    resident: list[OrderedDict[int, None]]
    in_flight: list[int]
    here: list[int]
    """Those that take requests."""


class Router(Protocol):
    """Sends requests to replicas; one of several that do not know of each other."""

    def pick(self, model: int) -> int:
        """Return a replica."""

    def done(self, replica: int) -> None:
        """Note that a request of this router has ended."""

    def members(self, here: Sequence[int]) -> None:
        """Note who takes requests from now on."""


Policy = Callable[[World, View, int], Router]
"""Makes a router by its number."""


@dataclass(frozen=True)
class Found:
    """What came of it."""

    hit: float
    """Part of the requests whose adapter was resident."""
    worst: float
    """The most loaded replica against the mean, in the window where that was worst."""
    usual: float
    """The same in the mean over all windows."""
    p99: float
    """The 99th percentile of replicas against the mean, in the worst window."""
    waited: float
    """Part of the requests that found no seat."""
    loads: int
    """Adapters that were fetched."""


@dataclass
class Simulation:
    """Runs a policy; absent is a replica, and after what parts of the requests it leaves and is back."""

    world: World
    policy: Policy
    routers: int
    absent: tuple[int, float, float] | None = None
    _events: list[tuple[float, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        world = self.world
        draw = np.random.default_rng(world.seed)
        total = world.warm + world.requests
        self._at: list[float] = np.cumsum(draw.exponential(1 / world.rate, total)).tolist()
        self._models: list[int] = draw.choice(world.adapters, total, p=world.popularity).tolist()
        mu = math.log(world.service_s) - world.spread**2 / 2
        self._service: list[float] = draw.lognormal(mu, world.spread, total).tolist()
        self._by: list[int] = draw.integers(0, self.routers, total).tolist()
        count = world.replicas
        self.view = View([OrderedDict() for _ in range(count)], [0] * count, list(range(count)))
        self._routers = [self.policy(world, self.view, number) for number in range(self.routers)]
        self._busy = [0] * count
        self._queues: list[deque[tuple[float, int]]] = [deque() for _ in range(count)]
        self._area, self._since = [0.0] * count, [0.0] * count
        self._waited = self._hits = self._loads = 0

    def run(self) -> Found:
        """Send all requests."""
        world, windows = self.world, []
        for index, (now, model, by) in enumerate(zip(self._at, self._models, self._by, strict=True)):
            self._end_until(now)
            if index == world.warm:
                self._waited = self._hits = self._loads = 0
                self._take_loads(now)
                until = now + world.window_s
            elif index > world.warm and now >= until:
                windows.append(self._take_loads(now))
                until = now + world.window_s
            self._come_and_go(index)
            self._send(now, model, by, self._service[index])
        ratios = [(load.max() / load.mean(), np.percentile(load, 99) / load.mean()) for load in windows]
        return Found(
            hit=self._hits / world.requests,
            worst=max(float(most) for most, _ in ratios),
            usual=float(np.mean([most for most, _ in ratios])),
            p99=max(float(p99) for _, p99 in ratios),
            waited=self._waited / world.requests,
            loads=self._loads,
        )

    def _send(self, now: float, model: int, by: int, service_s: float) -> None:
        replica = self._routers[by].pick(model)
        resident = self.view.resident[replica]
        if model in resident:
            resident.move_to_end(model)
            self._hits += 1
        else:
            resident[model] = None
            self._loads += 1
            if len(resident) > self.world.places:
                resident.popitem(last=False)
        self._count(replica, now, 1)
        if self._busy[replica] < self.world.seats:
            self._busy[replica] += 1
            heapq.heappush(self._events, (now + service_s, replica, by))
        else:
            self._waited += 1
            self._queues[replica].append((service_s, by))

    def _end_until(self, now: float) -> None:
        while self._events and self._events[0][0] <= now:
            at, replica, by = heapq.heappop(self._events)
            self._count(replica, at, -1)
            self._routers[by].done(replica)
            if self._queues[replica]:
                service_s, other = self._queues[replica].popleft()
                heapq.heappush(self._events, (at + service_s, replica, other))
            else:
                self._busy[replica] -= 1

    def _count(self, replica: int, now: float, more: int) -> None:
        self._area[replica] += self.view.in_flight[replica] * (now - self._since[replica])
        self._since[replica] = now
        self.view.in_flight[replica] += more

    def _take_loads(self, now: float) -> NDArray[np.float64]:
        """Return the area below every replica's requests in flight since the last time."""
        for replica in range(self.world.replicas):
            self._count(replica, now, 0)
        loads = np.array(self._area)
        self._area = [0.0] * self.world.replicas
        return loads

    def _come_and_go(self, index: int) -> None:
        if self.absent is None:
            return
        replica, leaves, comes = self.absent
        counted = (index - self.world.warm) / self.world.requests
        is_here = not leaves <= counted < comes
        if is_here == (replica in self.view.here):
            return
        if is_here:
            self.view.resident[replica].clear()
            self.view.here.append(replica)
        else:
            self.view.here.remove(replica)
        for router in self._routers:
            router.members(self.view.here)
