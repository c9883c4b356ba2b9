"""16 adapters in turn over 8 places, 8 streams: what waiting for loads adds to the first token.

Every stream asks the next adapter of the sixteen, again and again. With least recently used leaving first
this is the worst order there is: nearly every request meets an adapter that has just left.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics

from benchmarks.moving.figures import Figure, formatted, ratio
from benchmarks.moving.forge import Forge
from benchmarks.moving.replica import Local, bank_gb, replica

STREAMS = 8
ADAPTERS = 16
PLACES = 8
NEW = 16
REQUESTS = 48
"""Requests of a round."""
BAR = 1.5


async def measure(forge: Forge, rounds: int) -> list[Figure]:
    """Rounds in turn on a replica with 8 places and on one with 16, until both have had theirs."""
    names = forge.deploy("turns", ADAPTERS)
    async with (
        replica(forge, "turns", adapter_memory_gb=bank_gb(PLACES)) as tight,
        replica(forge, "turns", adapter_memory_gb=bank_gb(ADAPTERS)) as wide,
    ):
        await _round(tight, names, STREAMS)
        await _round(wide, names, STREAMS)
        before = _loads(tight)
        firsts: dict[Local, list[float]] = {tight: [], wide: []}
        for _ in range(rounds):
            for each, found in firsts.items():
                found.append(await _round(each, names, REQUESTS))
        loads = _loads(tight) - before
    note = f"8 places {formatted(firsts[tight], 1e3)}; all resident {formatted(firsts[wide], 1e3, 'ms')}"
    figure = Figure("p50 time to first token, 8 places / all resident", ratio(*firsts.values()), "x", BAR, note)
    misses = Figure("loads per request", loads / (rounds * REQUESTS), "")
    return [figure, misses]


def _loads(local: Local) -> int:
    assert local.ready.bank is not None  # noqa: S101 - it has adapters
    return local.ready.bank.residency.stats.loads


async def _round(local: Local, names: list[str], requests: int) -> float:
    """Return the median of the seconds to the first token."""
    turns = itertools.islice(itertools.cycle(names), requests)
    firsts: list[float] = []

    async def stream() -> None:
        for name in turns:
            answered = await local.ask(name, NEW)
            firsts.append(answered.first_s)

    await asyncio.gather(*(stream() for _ in range(STREAMS)))
    return statistics.median(firsts)
