"""One model with 64 endless streams, which take all seats, while 20 others ask once: their first tokens.

Compared with the same 20 on a server with nothing else to do.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Awaitable, Callable
from typing import Any, Final

from benchmarks.moving.figures import Figure, formatted, ratio
from benchmarks.moving.forge import Forge
from benchmarks.moving.replica import Local, bank_gb, prompt, replica
from benchmarks.moving.server import first_token_s, server, streams
from loramux import AsyncClient

STREAMS: Final = 64
OTHERS: Final = 20
APART_S: Final = 0.25
"""Between two of those that ask once."""
NEW: Final = 4
BAR: Final = 2.0

Ask = Callable[[str], Awaitable[float]]


async def measure(forge: Forge, rounds: int) -> list[Figure]:
    """Measure in this process, then over gRPC."""
    names = forge.deploy("fair", OTHERS + 1)
    settings: dict[str, Any] = {"adapter_memory_gb": bank_gb(OTHERS + 1), "preload": OTHERS + 1}
    settings["max_batch_seqs"] = STREAMS
    beside: dict[str, list[float]] = {"in this process": [], "from clients over gRPC": []}
    idle: dict[str, list[float]] = {where: [] for where in beside}
    for _ in range(rounds):
        async with replica(forge, "fair", **settings) as local:
            idle["in this process"].append(await _others(_asks(local), names[1:]))
            async with local.streams([names[0]] * STREAMS):
                beside["in this process"].append(await _others(_asks(local), names[1:]))
        with server(forge, "fair", **settings) as running:
            async with AsyncClient(inference=running.grpc) as client:

                async def ask(name: str, client: AsyncClient = client) -> float:
                    return await first_token_s(client, name, prompt(), NEW)

                idle["from clients over gRPC"].append(await _others(ask, names[1:]))
                async with streams(client, [names[0]] * STREAMS):
                    beside["from clients over gRPC"].append(await _others(ask, names[1:]))
    return [
        Figure(
            f"p50 first token of 20 {where}, beside streams / idle",
            ratio(found, idle[where]),
            "x",
            BAR,
            f"{formatted(found, 1e3)}; idle {formatted(idle[where], 1e3, 'ms')}",
        )
        for where, found in beside.items()
    ]


def _asks(local: Local) -> Ask:
    async def ask(name: str) -> float:
        return (await local.ask(name, NEW)).first_s

    return ask


async def _others(ask: Ask, names: list[str]) -> float:
    """Have each model ask once, one after the other; return the median of the first tokens."""
    requests = []
    for name in names:
        requests.append(asyncio.ensure_future(ask(name)))
        await asyncio.sleep(APART_S)
    return statistics.median(await asyncio.gather(*requests))
