"""Replicas under load while generations come and go, and while a bad version is rolled back.

The base is tiny, so that what is measured is the following and not the computing. Every answer says the digest
that it came from; what a name stood for, and since when, is noted as it is published.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

import httpx
import torch

from benchmarks.moving.builder import builder
from benchmarks.moving.figures import Figure, percentile
from benchmarks.moving.forge import Forge
from benchmarks.moving.server import Server
from benchmarks.on_gpu import checkpoint
from benchmarks.soak import SHAPE
from loramux import AsyncClient
from loramux.records import Started
from loramux_shared.bundle.deployments import current_generation, publish_generation
from loramux_shared.bundle.generation import AdapterRecord, Generation
from loramux_shared.faults import Fault

REPLICAS: Final = 3
PER_S: Final = 200
GENERATIONS: Final = 20
EVERY_S: Final = 0.5
FOLLOW_S: Final = 1.0
SLACK_S: Final = 0.5
"""Beside two polls, each with its jitter: for reading, and for the request that notices."""
POLLS_S: Final = 2 * 1.2 * FOLLOW_S + SLACK_S
NAMES: Final = ("a", "b", "c", "d")
VERSIONS: Final = 24
NEW: Final = 4
LONG_S: Final = 30.0


@dataclass
class Seen:
    """What clients saw."""

    answered: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    """Answers of a digest that the name never had."""
    took_s: list[float] = field(default_factory=list)
    digests: list[tuple[float, str, str]] = field(default_factory=list)
    """When a request began, its name, and what answered."""


class Fleet:
    """Replicas, and clients of both doors that ask them in turn."""

    def __init__(self, servers: list[Server], web: httpx.AsyncClient) -> None:
        self.servers = servers
        self.clients = [AsyncClient(inference=each.grpc) for each in servers]
        self.seen = Seen()
        self.had: dict[str, set[str]] = {name: set() for name in NAMES}
        """Digests that a name has, or had."""
        self._web = web
        self._draw = random.Random(0)
        self._turns = itertools.cycle(range(2 * len(servers)))

    async def load(self, seconds: float) -> None:
        """Have PER_S requests begin every second, whether or not those before have ended."""
        asked: list[asyncio.Task[None]] = []
        began = time.perf_counter()
        for number in range(int(seconds * PER_S)):
            await asyncio.sleep(max(0.0, began + number / PER_S - time.perf_counter()))
            asked.append(asyncio.create_task(self._one()))
        await asyncio.gather(*asked)

    async def generations(self) -> list[int]:
        """Return what each replica serves."""
        asked = [self._web.get(f"http://{each.http}/v1/adapters") for each in self.servers]
        return [answer.json()["replica"]["generation"] for answer in await asyncio.gather(*asked)]

    async def close(self) -> None:
        """Close the connections."""
        for client in self.clients:
            await client.close()

    async def _one(self) -> None:
        turn = next(self._turns)
        name, place = self._draw.choice(NAMES), turn // 2
        door: Callable[[int, str], Awaitable[str]] = self._over_grpc if turn % 2 else self._over_http
        began = time.perf_counter()
        try:
            digest = await door(place, name)
        except (Fault, httpx.HTTPError) as error:
            self.seen.failed[f"{type(error).__name__}: {error}"[:100]] += 1
            return
        self.seen.took_s.append(time.perf_counter() - began)
        self.seen.answered += 1
        self.seen.wrong += digest not in self.had[name]
        self.seen.digests.append((began, name, digest))

    async def _over_http(self, place: int, name: str) -> str:
        body = {"model": name, "prompt": "river road north", "max_tokens": NEW, "ignore_eos": True}
        answer = await self._web.post(f"http://{self.servers[place].http}/v1/completions", json=body)
        answer.raise_for_status()
        return answer.headers["x-loramux-digest"]

    async def _over_grpc(self, place: int, name: str) -> str:
        digest = ""
        async for event in self.clients[place].generate(name, "river road", max_tokens=NEW, ignore_eos=True):
            if isinstance(event, Started):
                digest = event.adapter_digest
        return digest


async def measure(forge: Forge, rounds: int) -> list[Figure]:
    """20 generations in turn, each with other versions of two of four names."""
    del rounds  # one run: it counts, and times nothing that a busy machine spoils
    base, records = _tiny(forge)
    publish = _publisher(forge, base)
    fleet, stop = await _open(forge, publish, records)
    try:
        loading = asyncio.create_task(fleet.load(GENERATIONS * EVERY_S + POLLS_S))
        for number in range(GENERATIONS):
            await asyncio.sleep(EVERY_S)
            changed = {
                NAMES[(number + step) % len(NAMES)]: records[(number + 7 * step) % len(records)]
                for step in (0, 1)
            }
            last = _publish(fleet, publish, changed)
        began = time.perf_counter()
        while any(found < last.number for found in await fleet.generations()):
            if time.perf_counter() - began > LONG_S:
                break
            await asyncio.sleep(0.05)
        behind = time.perf_counter() - began
        await loading
    finally:
        await stop()
    seen = fleet.seen
    note = f"of {seen.answered + seen.failed.total()}; {dict(seen.failed.most_common(2)) or 'none'}"
    return [
        Figure("requests that failed", seen.failed.total(), "", 0, note),
        Figure("answers of a digest that was never the name's", seen.wrong, "", 0),
        Figure("all replicas on the last generation after", behind, "s", POLLS_S, f"a poll every {FOLLOW_S} s"),
        Figure("whole answers, p50", 1e3 * percentile(seen.took_s, 0.5), "ms"),
    ]


async def measure_rollback(forge: Forge, rounds: int) -> list[Figure]:
    """A bad version of a name is served; one call takes it back, under load."""
    del rounds
    base, records = _tiny(forge)
    publish = _publisher(forge, base)
    with builder(forge) as building:
        fleet, stop = await _open(forge, publish, records, replicas=1, builder=building.grpc)
        try:
            bad = records[-1]
            wanted = _publish(fleet, publish, {"a": bad}).number
            [client] = fleet.clients
            loading = asyncio.create_task(fleet.load(6.0))
            await client.complete("a", "river", max_tokens=1, min_generation=wanted)
            await asyncio.sleep(2.0)
            began = time.perf_counter()
            await client.rollback_replica()
            answered = time.perf_counter()
            await loading
        finally:
            await stop()
    of_a = [(when, digest) for when, name, digest in fleet.seen.digests if name == "a"]
    served = sum(digest == bad.digest for when, digest in of_a if when < began)
    late = sum(digest == bad.digest for when, digest in of_a if when > answered)
    behind = sum(when > answered for when, _ in of_a)
    return [
        Figure("answers of the bad digest after the answer", late, "", 0, f"of {behind}; {served} before"),
        Figure("requests that failed", fleet.seen.failed.total(), "", 0, str(dict(fleet.seen.failed))[:100]),
        Figure("seconds of the rollback", answered - began, "s"),
    ]


def _tiny(forge: Forge) -> tuple[Generation, list[AdapterRecord]]:
    """Return a generation on a tiny base, and versions of adapters for it; built once for a folder."""
    work = forge.work
    names = [f"v{number:02d}" for number in range(VERSIONS)]
    built = current_generation(forge.store, "tiny")
    if built is None:
        device = torch.device("cpu")
        if not (work / "base").exists():
            checkpoint.write_base(work / "base", SHAPE, device)
        for name in names:
            if not (work / "adapters" / name).exists():
                checkpoint.write_adapter(work / "adapters" / name, SHAPE, 8, device)
        checkpoint.build_deployment(work, "tiny", names, 2048)
        built = current_generation(forge.store, "tiny")
    assert built is not None  # noqa: S101 - it was built
    return built, [built.adapters[name] for name in names]


Publish = Callable[[dict[str, AdapterRecord]], Generation]


def _publisher(forge: Forge, base: Generation) -> Publish:
    """Return what makes the next generation of "fleet", of the one before and of changed names."""
    held: dict[str, AdapterRecord] = {}

    def publish(changed: dict[str, AdapterRecord]) -> Generation:
        held.update(changed)
        fields: dict[str, Any] = {"deployment": "fleet", "adapters": dict(held)}
        return publish_generation(forge.store, base.model_copy(update=fields))

    return publish


def _publish(fleet: Fleet, publish: Publish, changed: dict[str, AdapterRecord]) -> Generation:
    """Publish, having noted what the names may answer with from now on."""
    for name, record in changed.items():
        fleet.had[name].add(record.digest)
    return publish(changed)


async def _open(
    forge: Forge, publish: Publish, records: list[AdapterRecord], replicas: int = REPLICAS, **settings: Any
) -> tuple[Fleet, Callable[[], Awaitable[None]]]:
    """Start replicas on a first generation; the second result stops them."""
    first = dict(zip(NAMES, records, strict=False))
    publish(first)
    usual: dict[str, Any] = {"follow_interval_s": FOLLOW_S, "kv_memory_gb": 0.1, "threads": 1}
    servers = await asyncio.gather(
        *(asyncio.to_thread(Server, forge, "fleet", **usual | settings) for _ in range(replicas))
    )
    limits = httpx.Limits(max_connections=None)
    web = httpx.AsyncClient(timeout=60, limits=limits)
    fleet = Fleet(list(servers), web)
    for name, record in first.items():
        fleet.had[name].add(record.digest)

    async def stop() -> None:
        await fleet.close()
        await web.aclose()
        await asyncio.gather(*(asyncio.to_thread(each.stop) for each in servers))

    return fleet, stop
