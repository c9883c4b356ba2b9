"""Steady streams while 10 adapters a second are loaded and evicted, and while the same requests load nothing.

What loads is a request for one token of one adapter after the other; without loads the same requests name
adapters that are resident, so that the rows that they add to steps are on both sides. Seen at the engine
(between the ends of its steps, on a replica in this process) and at a client over gRPC (between messages, of
a process). Both sides begin a round in turn, for contexts grow. The first use of each adapter, which proves it,
is told apart.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from benchmarks.moving.figures import Figure, formatted, percentile, ratio
from benchmarks.moving.forge import Forge
from benchmarks.moving.replica import Local, bank_gb, prompt, replica
from benchmarks.moving.server import first_token_s, server, streams
from loramux import AsyncClient

STREAMS = 8
STEADY = 4
"""Adapters of the steady streams."""
PLACES = 12
COLD = 24
PER_S = 10
ROUND_S = 4.0
BAR = 1.25

Ask = Callable[[str], Awaitable[object]]


async def measure(forge: Forge, rounds: int) -> list[Figure]:
    """Measure both."""
    names = forge.deploy("churn", PLACES + COLD)
    return [*await _at_the_engine(forge, names, rounds), *await _at_the_client(forge, names, rounds)]


async def _at_the_engine(forge: Forge, names: list[str], rounds: int) -> list[Figure]:
    steady = [names[number % STEADY] for number in range(STREAMS)]
    async with (
        replica(forge, "churn", adapter_memory_gb=bank_gb(PLACES)) as local,
        local.streams(steady),
    ):

        async def ask(name: str) -> object:
            return await local.ask(name, tokens=1)

        async def gaps(some: list[str]) -> list[float]:
            with local.steps() as steps:
                async with _asking(ask, some):
                    await asyncio.sleep(ROUND_S)
            return steps.gaps_s

        return await _compare("at the engine", names, rounds, ask, gaps, lambda: _loads(local))


async def _at_the_client(forge: Forge, names: list[str], rounds: int) -> list[Figure]:
    with server(forge, "churn", adapter_memory_gb=bank_gb(PLACES), stream_interval_ms=0) as running:
        async with (
            AsyncClient(inference=running.grpc) as client,
            streams(client, [names[number % STEADY] for number in range(STREAMS)]) as found,
        ):

            async def ask(name: str) -> object:
                return await first_token_s(client, name, prompt(1))

            async def gaps(some: list[str]) -> list[float]:
                found.clear()
                async with _asking(ask, some):
                    await asyncio.sleep(ROUND_S)
                return list(found)

            return await _compare("at a client over gRPC", names, rounds, ask, gaps)


async def _compare(
    where: str,
    names: list[str],
    rounds: int,
    ask: Ask,
    gaps: Callable[[list[str]], Awaitable[list[float]]],
    loads: Callable[[], int] | None = None,
) -> list[Figure]:
    """Measure gaps with loads and without, in turn."""
    kinds = {"steady": names[STEADY:PLACES], "cold": names[PLACES:]}
    p99: dict[str, list[float]] = {"cold": [], "steady": []}
    p50: dict[str, list[float]] = {"cold": [], "steady": []}
    done = 0
    first = percentile(await gaps(kinds["cold"]), 0.99)
    for number in range(rounds):
        for kind in sorted(kinds, reverse=number % 2 == 0):
            if kind == "steady":
                await asyncio.gather(*map(ask, kinds[kind]))  # they may have left meanwhile
            before = loads() if loads else 0
            found = await gaps(kinds[kind])
            done += (loads() if loads else 0) - before
            p99[kind].append(percentile(found, 0.99))
            p50[kind].append(percentile(found, 0.5))
    note = f"with {formatted(p99['cold'], 1e3)}; without {formatted(p99['steady'], 1e3, 'ms')}"
    figures = [
        Figure(f"p99 between tokens {where}, loads / none", ratio(p99["cold"], p99["steady"]), "x", BAR, note),
        Figure(f"p50 between tokens {where}, loads / none", ratio(p50["cold"], p50["steady"]), "x"),
        Figure(f"p99 between tokens {where}, first uses", first * 1e3, "ms"),
    ]
    if loads:
        figures.append(Figure("loads per second", done / (rounds * ROUND_S), "1/s"))
    return figures


@asynccontextmanager
async def _asking(ask: Ask, names: list[str]) -> AsyncIterator[None]:
    """Have PER_S requests per second begin, whether or not those before have ended."""
    query: set[asyncio.Task[object]] = set()

    async def drive() -> None:
        for name in itertools.cycle(names):
            query.add(asyncio.ensure_future(ask(name)))
            await asyncio.sleep(1 / PER_S)

    driving = asyncio.create_task(drive())
    try:
        yield
    finally:
        driving.cancel()
        await asyncio.gather(*query)


def _loads(local: Local) -> int:
    assert local.ready.bank is not None  # noqa: S101 - it has adapters
    return local.ready.bank.residency.stats.loads
