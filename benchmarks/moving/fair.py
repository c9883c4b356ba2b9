"""One model with 64 endless streams, while 20 others ask once: their first tokens against a server with room.

The other side has the same 64 streams in its steps, and seats for all the rest: what is compared is the wait
for a seat, at the same size of a batch. Told beside it: an idle server, whose steps have no other rows.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Awaitable, Callable
from typing import Any, Final

from benchmarks.moving.figures import Figure, ratio, shown
from benchmarks.moving.forge import Forge
from benchmarks.moving.replica import Local, bank_gb, prompt, replica
from benchmarks.moving.server import first_token_s, server, streams
from loramux import AsyncClient

STREAMS: Final = 64
OTHERS: Final = 20
SEATS: Final = 64
ROOM: Final = 96
APART_S: Final = 0.25
"""Between two of those that ask once."""
NEW: Final = 4
BAR: Final = 2.0

Ask = Callable[[str], Awaitable[float]]


async def measure(forge: Forge, rounds: int) -> list[Figure]:
    """In this process, then over gRPC."""
    names = forge.deploy("fair", OTHERS + 1)
    found: dict[int, list[float]] = {SEATS: [], ROOM: []}
    idle: list[float] = []
    for _ in range(rounds):
        for seats, firsts in found.items():
            async with replica(
                forge, "fair", adapter_memory_gb=bank_gb(OTHERS + 1), preload=OTHERS + 1, max_batch_seqs=seats
            ) as local:
                if seats == SEATS:
                    idle.append(await _others(_asks(local), names[1:]))
                async with local.streams([names[0]] * STREAMS):
                    firsts.append(await _others(_asks(local), names[1:]))
    note = f"{shown(found[SEATS], 1e3)}; with room {shown(found[ROOM], 1e3)}; idle {shown(idle, 1e3, 'ms')}"
    figure = Figure(
        "p50 first token of 20, no seat / a seat free", ratio(found[SEATS], found[ROOM]), "x", BAR, note
    )
    return [figure, *await _over_grpc(forge, names, rounds)]


async def _over_grpc(forge: Forge, names: list[str], rounds: int) -> list[Figure]:
    found: dict[int, list[float]] = {SEATS: [], ROOM: []}
    for _ in range(rounds):
        for seats, firsts in found.items():
            settings: dict[str, Any] = {"adapter_memory_gb": bank_gb(OTHERS + 1), "preload": OTHERS + 1}
            with server(forge, "fair", max_batch_seqs=seats, **settings) as running:
                firsts.append(await _beside_streams(running.grpc, names))
    note = f"{shown(found[SEATS], 1e3)}; with room {shown(found[ROOM], 1e3, 'ms')}"
    return [Figure("the same from clients over gRPC", ratio(found[SEATS], found[ROOM]), "x", BAR, note)]


async def _beside_streams(address: str, names: list[str]) -> float:
    async with AsyncClient(inference=address) as client, streams(client, [names[0]] * STREAMS):

        async def ask(name: str) -> float:
            return await first_token_s(client, name, prompt(), NEW)

        return await _others(ask, names[1:])


def _asks(local: Local) -> Ask:
    async def ask(name: str) -> float:
        return (await local.ask(name, NEW)).first_s

    return ask


async def _others(ask: Ask, names: list[str]) -> float:
    """Have each model ask once, one after the other; return the median of the first tokens."""
    asked = []
    for name in names:
        asked.append(asyncio.ensure_future(ask(name)))
        await asyncio.sleep(APART_S)
    return statistics.median(await asyncio.gather(*asked))
