"""100 adapters needed at once: from a store that answers after 30 ms against a store in a folder."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from benchmarks.moving.figures import Figure, ratio, shown
from benchmarks.moving.forge import Forge
from benchmarks.moving.replica import bank_gb, replica
from loramux_shared.storage.base import Entry, Store

ADAPTERS: Final = 100
LATENCY_S: Final = 0.03
BAR: Final = 1.5


class Distant:
    """A store that answers every read after a while, as one does that is not in this building."""

    def __init__(self, store: Store, latency_s: float) -> None:
        self._store = store
        self._latency_s = latency_s
        self.uri = "distant://" + store.uri.partition("://")[2]
        self.put, self.take, self.delete = store.put, store.take, store.delete

    def get(self, key: str, bound: int | None = None) -> bytes:
        """Return an object, later."""
        time.sleep(self._latency_s)
        return self._store.get(key, bound)

    def sha256(self, key: str) -> str | None:
        """Return an object's digest, later."""
        time.sleep(self._latency_s)
        return self._store.sha256(key)

    def list(self, prefix: str) -> Iterator[str]:
        """Yield keys, later."""
        time.sleep(self._latency_s)
        return self._store.list(prefix)

    def entries(self, prefix: str) -> Iterator[Entry]:
        """Yield entries, later."""
        time.sleep(self._latency_s)
        return self._store.entries(prefix)


async def measure(forge: Forge, rounds: int) -> list[Figure]:
    """Starts that load all of them first, then first uses of all by replicas that loaded none."""
    names = forge.deploy("latency", ADAPTERS)
    near, far = forge.store, Distant(forge.store, LATENCY_S)
    starts: dict[Store, list[float]] = {near: [], far: []}
    uses: dict[Store, list[float]] = {near: [], far: []}
    for _ in range(rounds):
        for store in (near, far):
            starts[store].append(await _start(forge, store))
            uses[store].append(await _first_use(forge, store, names))
    return [
        Figure(
            "start with 100 adapters, 30 ms away / folder",
            ratio(starts[far], starts[near]),
            "x",
            BAR,
            f"{shown(starts[far])}; from a folder {shown(starts[near], unit='s')}",
        ),
        Figure(
            "first use of 100 at once, 30 ms away / folder",
            ratio(uses[far], uses[near]),
            "x",
            BAR,
            f"{shown(uses[far])}; from a folder {shown(uses[near], unit='s')}",
        ),
    ]


async def _start(forge: Forge, store: Store) -> float:
    """Return what loading took, with an empty cache."""
    cache = _empty(forge.work / "cache-latency")
    fields = {"adapter_memory_gb": bank_gb(ADAPTERS), "preload": ADAPTERS}
    async with replica(forge, "latency", store=store, cache=cache.name, **fields) as local:
        return local.took_s


async def _first_use(forge: Forge, store: Store, names: list[str]) -> float:
    """Return how long one token of each takes, all asked at once, with an empty cache and an empty bank."""
    cache = _empty(forge.work / "cache-latency")
    # Little else than loads: a prompt of one token.
    fields = {"adapter_memory_gb": bank_gb(ADAPTERS), "preload": 0, "max_batch_adapters": ADAPTERS}
    async with replica(forge, "latency", store=store, cache=cache.name, **fields) as local:
        began = time.perf_counter()
        await asyncio.gather(*(local.ask(name, tokens=1) for name in names))
        return time.perf_counter() - began


def _empty(folder: Path) -> Path:
    """Return a cache without bundles; what was compiled and the base's checkpoint stay."""
    shutil.rmtree(folder / "bundles", ignore_errors=True)
    return folder
