"""``benchmarks/fleet``: a small world, in which the policies differ as they do in the large one."""

from __future__ import annotations

import pytest

from benchmarks.fleet.__main__ import BARRED, POLICIES, Point, figures
from benchmarks.fleet.world import Found, Simulation, World

SMALL = World(replicas=10, adapters=500, places=32, seats=32, warm=8000, requests=8000, window_s=10.0)


@pytest.fixture(scope="module")
def found() -> dict[str, Found]:
    """What two routers reach in it with each policy."""
    return {name: Simulation(SMALL, policy, 2).run() for name, policy in POLICIES.items()}


def test_the_ideal_is_a_bound(found: dict[str, Found]) -> None:
    """Nobody has more hits, and without popular adapters all places would be full of different ones."""
    ideal = SMALL.ideal(1.25)
    assert all(each.hit < ideal for each in found.values())
    assert World(replicas=2, adapters=8, places=2, zipf=0.0).ideal(1.25) == pytest.approx(0.5)
    assert World(replicas=2, adapters=2, places=1, zipf=9.0).ideal(1.25) == pytest.approx(1.0, abs=0.01)


def test_what_ships_keeps_what_it_promises(found: dict[str, Found]) -> None:
    """The client: 0.9 of the ideal's hits, and no replica above 1.25 times the mean."""
    assert found["client"].hit > 0.9 * SMALL.ideal(1.25)
    assert found["client"].worst < 1.25


def test_what_it_is_compared_with(found: dict[str, Found]) -> None:
    """Hashing alone hits and overloads, choosing by load alone is even and misses."""
    assert found["rendezvous"].hit > found["client"].hit
    assert found["rendezvous"].worst > 2
    assert found["least loaded"].worst < 1.1
    assert found["least loaded"].hit < 0.6 * found["client"].hit
    assert found["random"].hit < 0.6 * found["client"].hit
    assert found["client"].hit > found["bounded"].hit


def test_a_replica_that_is_away_costs_what_it_held(found: dict[str, Found]) -> None:
    """With the client about what it had, there and back, far less than all that is resident."""
    away = Simulation(SMALL, POLICIES["client"], 2, (3, 0.2, 0.6)).run()
    moved = away.loads - found["client"].loads
    assert 20 < moved < 6 * SMALL.places


def test_a_simulation_is_repeatable() -> None:
    """The same world gives the same figures."""
    world = World(replicas=4, adapters=50, places=8, seats=8, warm=500, requests=1500, window_s=5.0)
    assert Simulation(world, POLICIES["client"], 2).run() == Simulation(world, POLICIES["client"], 2).run()


def test_bars_are_of_what_ships() -> None:
    """Each has two; hits are told as what is missing."""
    points = [
        Point("client", 1, Found(0.9, 1.3, 1, 1, 0, 0), 1),
        Point("random", 1, Found(0, 9, 9, 9, 0, 0), 1),
    ]
    missing, load = figures(points, 0.95)
    assert (missing.met, load.met) == (True, False)
    assert set(BARRED) <= set(POLICIES)
