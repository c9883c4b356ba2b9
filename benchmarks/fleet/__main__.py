"""Many replicas, simulated: who finds its adapter resident, how evenly the load lies, what a departure costs.

10,000 adapters with Zipf popularity, 100 replicas with places for 64 each, at 0.7 of what they can serve.
Several routers (clients or proxies) know of their own requests alone. The ideal is a bound that nobody exceeds:
see `World.ideal`. The exit status is 1 when what ships misses a bar: 0.9 of the ideal's hits, and no replica
above 1.25 times the mean in any 20 seconds.

    python -m benchmarks.fleet
    python -m benchmarks.fleet client ray --routers 1 10 100 --seed 2
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final

from benchmarks.fleet.policies import (
    Client,
    Envoy,
    LeastLoaded,
    Random,
    Ray,
    Rendezvous,
    Ring,
    bounded,
)
from benchmarks.fleet.world import Found, Policy, Simulation, World
from benchmarks.moving.figures import Figure

POLICIES: Final[Mapping[str, Policy]] = {
    "random": Random,
    "least loaded": LeastLoaded,
    "rendezvous": Rendezvous,
    "bounded": bounded,
    "client": Client,
    "ray": Ray,
    "envoy": Envoy,
    "ring": Ring,
}
BARRED: Final = {"client": (1, 10), "ray": (1, 10), "envoy": (1,)}
"""What ships, and how many routers are to meet the bars; more are told for their own sake."""
ROUTERS: Final = (1, 10)
AWAY_ROUTERS: Final = 10
MISSING_BAR: Final = 0.1
LOAD_BAR: Final = 1.25
ADAPTER_MB: Final = 37
"""Rank 16 on all projections of a base of 1.5B, in bfloat16."""
ABSENT: Final = (7, 0.25, 0.6)
HEADING: Final = (
    f"{'':14}{'':8}{'':8}{'':10}{'a replica against the mean':^28}{'':9}{'a replica':>10}\n"
    f"{'':14}{'routers':>8}{'hits':>8}{'of ideal':>10}{'worst':>10}{'usual':>9}{'p99':>9}"
    f"{'waited':>9}{'away':>10}"
)


@dataclass(frozen=True)
class Point:
    """A policy with so many routers."""

    policy: str
    routers: int
    found: Found
    moved: int | None
    """Adapters that were fetched because a replica left and came back."""


def simulate(world: World, task: tuple[str, int]) -> Point:
    """Run a policy, and where one departure is of interest that too."""
    name, routers = task
    found = Simulation(world, POLICIES[name], routers).run()
    if routers != AWAY_ROUTERS:
        return Point(name, routers, found, None)
    without = Simulation(world, POLICIES[name], routers, ABSENT).run()
    return Point(name, routers, found, without.loads - found.loads)


def figures(points: Sequence[Point], ideal: float) -> list[Figure]:
    """Return what has bars."""
    found = []
    for point in points:
        if point.routers in BARRED.get(point.policy, ()):
            name = f"{point.policy}, routers: {point.routers}"
            found.append(
                Figure(f"{name}: missing of the ideal's hits", 1 - point.found.hit / ideal, "", MISSING_BAR)
            )
            found.append(Figure(f"{name}: most loaded, worst window", point.found.worst, "x mean", LOAD_BAR))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate, and print; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policies", nargs="*", metavar="POLICY", help=", ".join(POLICIES))
    parser.add_argument("--routers", type=int, nargs="+", default=ROUTERS)
    parser.add_argument("--seed", type=int, default=World.seed)
    options = parser.parse_args(arguments)
    if unknown := set(options.policies) - POLICIES.keys():
        parser.error(f"no policy {', '.join(sorted(unknown))}; there are {', '.join(POLICIES)}")
    world = World(seed=options.seed)
    ideal = world.ideal(LOAD_BAR)
    tasks = [(name, routers) for name in options.policies or POLICIES for routers in options.routers]
    print(HEADING)
    print(f"{'ideal':14}{'':8}{ideal:8.3f}{1:10.3f}{LOAD_BAR:10.3f}")
    points = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for point in pool.map(partial(simulate, world), tasks):
            points.append(point)
            print(_line(point, ideal), flush=True)
    found = figures(points, ideal)
    print("", *found, sep="\n")
    return 0 if all(figure.met for figure in found) else 1


def _line(point: Point, ideal: float) -> str:
    found = point.found
    moved = "" if point.moved is None else f"{point.moved * ADAPTER_MB / 1e3:6.1f} GB"
    loads = f"{found.worst:10.3f}{found.usual:9.3f}{found.p99:9.3f}{found.waited:9.3f}"
    return f"{point.policy:14}{point.routers:8}{found.hit:8.3f}{found.hit / ideal:10.3f}{loads}{moved:>10}"


if __name__ == "__main__":
    sys.exit(main())
