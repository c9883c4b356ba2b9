"""Who sends requests where: what ships, and what it is compared with."""

from __future__ import annotations

import math
import random
from bisect import bisect
from collections.abc import Sequence
from hashlib import blake2b

from benchmarks.fleet.world import Router, View, World
from loramux.envoy.clusters import BALANCE_PERCENT, RING_SIZE
from loramux.placement import Placement, Popularity, order


class Client:
    """The Python client: its own code, with a spot of its own."""

    def __init__(self, world: World, view: View, number: int) -> None:  # noqa: ARG002 - it sees no replica
        spot = random.Random(number).random()
        self._names = [f"10.0.0.{replica}:50052" for replica in range(world.replicas)]
        self._numbers = {name: replica for replica, name in enumerate(self._names)}
        self._models = [f"adapter-{model}" for model in range(world.adapters)]
        self._placement = Placement(self._names, spot, clock=lambda: 0.0)

    def pick(self, model: int) -> int:
        """Ask it."""
        replica = self._placement.take(self._models[model])
        assert replica is not None  # noqa: S101 - none was tried
        return self._numbers[replica]

    def done(self, replica: int) -> None:
        """Tell it."""
        self._placement.give(self._names[replica])

    def members(self, here: Sequence[int]) -> None:
        """Tell it."""
        self._placement.replace([self._names[replica] for replica in here])


class Counted:
    """Counts its own requests in flight."""

    def __init__(self, world: World, view: View, number: int) -> None:
        self.world, self.view = world, view
        self.draw = random.Random(number)
        self.active = [0] * world.replicas
        self.total = 0
        self.here: Sequence[int] = ()
        self.members(view.here)

    def pick(self, model: int) -> int:
        """Choose, and count."""
        replica = self.choose(model)
        self.active[replica] += 1
        self.total += 1
        return replica

    def done(self, replica: int) -> None:
        """Count."""
        self.active[replica] -= 1
        self.total -= 1

    def members(self, here: Sequence[int]) -> None:
        """Take these."""
        self.here = tuple(here)

    def choose(self, model: int) -> int:  # noqa: ARG002 - any will do
        """Take any."""
        return self.here[self.draw.randrange(len(self.here))]


Random = Counted


class LeastLoaded(Counted):
    """The one with the fewest requests of this router; any of those."""

    def choose(self, model: int) -> int:  # noqa: ARG002 - any will do
        """Look at all."""
        least = min(self.active[replica] for replica in self.here)
        return self.draw.choice([replica for replica in self.here if self.active[replica] == least])


class Rendezvous(Counted):
    """The order of the client with no bound but this one, and no regard for popularity."""

    def __init__(self, world: World, view: View, number: int, bound: float = math.inf) -> None:
        super().__init__(world, view, number)
        self._bound = bound

    def choose(self, model: int) -> int:
        """Return the first of the order that has room."""
        ordered = list(map(int, order(str(model), tuple(map(str, self.here)))))
        if self._bound == math.inf:
            return ordered[0]
        most = math.ceil(self._bound * (self.total + 1) / len(self.here))
        return next((each for each in ordered if self.active[each] < most), ordered[0])


def bounded(world: World, view: View, number: int) -> Router:
    """Rendezvous hashing with bounded load as it is in papers."""
    return Rendezvous(world, view, number, 1.25)


class Ring(Counted):
    """Envoy's ring hash with a ``hash_balance_factor``.

    As in its thread_aware_lb_impl.cc: a host takes a request when it has no more than ``ceil(1.25 x mean)``
    before it, else one is searched in a random order that the hash seeds; where there is none, the one least
    above takes it.
    """

    PERCENT = 125

    def members(self, here: Sequence[int]) -> None:
        """Lay the ring out again."""
        super().members(here)
        each = math.ceil(RING_SIZE / len(here))
        points = sorted((_hash(f"{replica}_{point}"), replica) for replica in here for point in range(each))
        self._keys, self._hosts = [key for key, _ in points], [host for _, host in points]
        self._jumps: dict[int, list[int]] = {}

    def choose(self, model: int) -> int:
        """Return the ring's host, or where the jumps lead."""
        host = self._hosts[bisect(self._keys, _hash(f"adapter-{model}")) % len(self._hosts)]
        slots = max(1, math.ceil(((self.total + 1) * self.PERCENT + 99) // 100 / len(self.here)))
        if self.active[host] <= slots:
            return host
        jumps = self._jumps.get(model)
        if jumps is None:
            jumps = self._jumps[model] = random.Random(model).sample(self.here, len(self.here))
        found = next((each for each in jumps if self.active[each] <= slots), None)
        return min(jumps, key=self.active.__getitem__) if found is None else found


class Ray(Counted):
    """Ray Serve's own router of multiplexed models, with a bound on what a replica takes.

    As in its request_router: of the replicas that have the model, the less busy of two; without any, of those
    with the fewest models; of all, where those are full for longer than a second, which is taken as at once.
    All routers hear what is resident, and know how busy replicas are.
    """

    BOUND = 1.25

    def choose(self, model: int) -> int:
        """Return the less busy of two."""
        most = self.BOUND * self.world.load * self.world.seats * self.world.replicas / len(self.here)
        having = [each for each in self.here if model in self.view.resident[each]]
        if having:
            best = self._less_busy(having)
            if self.view.in_flight[best] < most:
                return best
            return self._less_busy(self.here)
        fewest = min(len(self.view.resident[each]) for each in self.here)
        return self._less_busy([each for each in self.here if len(self.view.resident[each]) == fewest])

    def _less_busy(self, among: Sequence[int]) -> int:
        two = self.draw.sample(among, min(2, len(among)))
        return min(two, key=self.view.in_flight.__getitem__)


class Envoy(Ring):
    """Envoy as `loramux.envoy` configures it: a popular model has several places, and one is drawn."""

    PERCENT = BALANCE_PERCENT

    def __init__(self, world: World, view: View, number: int) -> None:
        self._popularity = Popularity(pieces=1.0)
        super().__init__(world, view, number)

    def choose(self, model: int) -> int:
        """Return the host of one of the model's places."""
        places = self._popularity.copies(str(model), len(self.here))
        return super().choose(model + self.world.adapters * self.draw.randrange(places))


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())
