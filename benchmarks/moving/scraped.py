"""Eight streams while `/metrics` of 1,000 models in use is read every two seconds, and while nobody reads it.

The models are names of a few bundles, each asked once, so that all have their series. What reads them is a
process of its own; the streams are read over gRPC. Both sides take turns. The bar of what it costs is held
against seconds of processors, which a machine that does much else tells all the same.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from benchmarks.moving.figures import Figure, percentile, ratio
from benchmarks.moving.forge import Forge
from benchmarks.moving.replica import bank_gb
from benchmarks.moving.server import Server, server, streams
from loramux import AsyncClient

STREAMS: Final = 8
USED: Final = 1000
AT_ONCE: Final = 32
EVERY_S: Final = 2.0
SLOTS: Final = 4
"""Of a round, of each side, in turn: one scrape lies in the middle of one, or none."""
IDLE: Final = 20
"""Scrapes before the streams begin."""
CPU_MS: Final = 20.0
SLOWER: Final = 1.03
GAP_STEPS: Final = 3.0
READER: Final = """
import sys, time, urllib.request
for line in sys.stdin:
    began = time.perf_counter()
    size = len(urllib.request.urlopen(line.strip()).read())
    print(size, time.perf_counter() - began, flush=True)
"""
"""Reads an address when it is told to, and says how many bytes came in how many seconds."""

Scrape = Callable[[], Awaitable[tuple[int, float]]]


async def measure(forge: Forge, rounds: int) -> list[Figure]:
    """Compare rounds with scrapes and without."""
    names = [f"customer-support-{number:05d}" for number in range(USED)]
    known = forge.records(STREAMS)
    forge.publish("scraped", {name: known[number % STREAMS] for number, name in enumerate(names)})
    with server(
        forge, "scraped", adapter_memory_gb=bank_gb(STREAMS), preload=STREAMS, stream_interval_ms=0
    ) as running:
        async with (
            AsyncClient(inference=running.grpc) as client,
            _reader(f"http://{running.http}/metrics") as read,
        ):
            for first in range(0, USED, AT_ONCE):
                some = names[first : first + AT_ONCE]
                await asyncio.gather(*(client.complete(name, "the river", max_tokens=2) for name in some))
            await read()
            before_s = running.cpu_s
            for _ in range(IDLE):
                size, _ = await read()
            cpu_ms = (running.cpu_s - before_s) / IDLE * 1e3
            idle = Figure(
                "a scrape of an idle replica, nothing changed",
                cpu_ms,
                "ms",
                CPU_MS,
                f"of processors; {size / 1e6:.2f} MB",
            )
            async with streams(client, names[:STREAMS]) as gaps:
                return [idle, *await _compare(running, gaps, read, rounds)]


async def _compare(running: Server, gaps: list[float], read: Scrape, rounds: int) -> list[Figure]:
    found: dict[bool, list[_Slot]] = {True: [], False: []}
    for number in range(rounds * SLOTS):
        for scraped in (number % 2 == 0, number % 2 == 1):
            found[scraped].append(await _slot(running, gaps, read if scraped else None))
    step_s = statistics.median(percentile(each.gaps, 0.5) for each in found[False])
    cost = {scraped: [each.token_cpu_s for each in found[scraped]] for scraped in found}
    pace = {scraped: [len(each.gaps) / EVERY_S for each in found[scraped]] for scraped in found}
    longest = {scraped: [max(each.gaps) / step_s for each in found[scraped]] for scraped in found}
    token = f"{statistics.median(cost[False]) * 1e3:.1f} ms without"
    tokens = f"{statistics.median(pace[False]):.0f} tokens/s without"
    usual = f"{statistics.median(longest[False]):.2f} without; the longest {max(longest[True]):.2f}"
    return [
        Figure("a token with scrapes / without", ratio(cost[True], cost[False]), "x", SLOWER, token),
        Figure("the same by the wall clock", ratio(pace[False], pace[True]), "x", None, tokens),
        Figure("longest gap with scrapes", statistics.median(longest[True]), "steps", GAP_STEPS, usual),
    ]


@dataclass(frozen=True)
class _Slot:
    gaps: list[float]
    token_cpu_s: float
    """Of the replica's processors, for a token."""


async def _slot(running: Server, gaps: list[float], read: Scrape | None) -> _Slot:
    gaps.clear()
    before_s = running.cpu_s
    await asyncio.sleep(EVERY_S / 2)
    seconds = (await read())[1] if read else 0.0
    await asyncio.sleep(EVERY_S / 2 - seconds)
    return _Slot(list(gaps), (running.cpu_s - before_s) / len(gaps))


@asynccontextmanager
async def _reader(address: str) -> AsyncIterator[Scrape]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", READER, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    told, said = process.stdin, process.stdout
    assert told is not None and said is not None  # noqa: S101, PT018 - they are pipes

    async def read() -> tuple[int, float]:
        told.write(f"{address}\n".encode())
        size, seconds = (await said.readline()).split()
        return int(size), float(seconds)

    try:
        yield read
    finally:
        told.close()
        await process.wait()
