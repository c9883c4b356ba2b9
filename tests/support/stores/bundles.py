"""Stores with bundles in them, and stores that are slow, away or damaged."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from inference_service.adapters.disk import DiskTier
from inference_service.adapters.loader import AdapterLoader
from inference_service.adapters.reading import BundleReader, FoundBundle
from inference_service.core.adapter import Adapter
from loramux_shared.bundle.reader import Bundle
from loramux_shared.faults import Fault, StoreUnavailable
from loramux_shared.storage.base import Store
from loramux_shared.storage.memory import MemoryStore
from tests.support.adapters import tensors, write_adapter, write_base
from tests.support.folders import context_of, deployment_of, run_build
from tests.support.waiting import BOUND_S

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def build_bundles(store: Store, folder: Path, count: int = 1, name: str = "tiny") -> list[str]:
    """Build adapters a0, a1, ..., of which the first brings a chat template, and return their digests."""
    write_base(folder / "base")
    names = [f"a{number}" for number in range(count)]
    for seed, each in enumerate(names):
        write_adapter(folder / each, tensors(seed=seed))
    (folder / "a0" / "chat_template.jinja").write_text(TEMPLATE)
    adapters = run_build(
        deployment_of(folder, *names, name=name), context_of(folder, store)
    ).generation.adapters
    return [adapters[each].digest for each in names]


@dataclass(frozen=True)
class FakePacked:
    """A bundle that claims to be packed."""

    bundle: Bundle
    num_bytes: int = 1000


@dataclass(frozen=True)
class Loaded:
    """The result of a load."""

    packed: Any
    tier: str
    """Tier where it was found."""


def flip_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


def load(loader: AdapterLoader, digest: str, timeout_s: float = BOUND_S) -> Loaded | Fault:
    return begin_load(loader, digest)(timeout_s)


def begin_load(loader: AdapterLoader, digest: str, invocation=()) -> Callable[..., Loaded | Fault]:
    """Begin to load an adapter; the returned function waits for the outcome."""
    outcomes: SimpleQueue[Loaded | Fault] = SimpleQueue()

    def done(packed: Any, tier: str) -> None:
        outcomes.put(packed if isinstance(packed, Fault) else Loaded(packed, tier))

    loader.load(Adapter(digest, invocation=invocation), done)
    return lambda timeout_s=BOUND_S: outcomes.get(timeout=timeout_s)


class KeepingReader(BundleReader):
    """A reader that counts the bundles that it kept, as it does beside their loads."""

    def __init__(self, store: Store, disk: DiskTier | None) -> None:
        super().__init__(store, disk)
        self._kept = threading.Semaphore(0)

    def keep(self, found: FoundBundle) -> None:
        super().keep(found)
        self._kept.release()

    def await_kept(self, count: int = 1) -> None:
        """Wait until so many more bundles are kept; that they are packed was asked for before."""
        for _ in range(count):
            assert self._kept.acquire(timeout=BOUND_S), "a bundle was not kept"


class UnsteadyStore(MemoryStore):
    """A store in memory that can be slow or unreachable, and counts its readers."""

    def __init__(self) -> None:
        super().__init__()
        self.digests: list[str] = []
        """Digests of the bundles that a test built."""
        self.away = False
        self.gate = threading.Event()
        """Cleared: answers of the store wait until it is set."""
        self.gate.set()
        self.asked: list[str] = []
        self.under_way = 0
        self._lock = threading.Lock()

    def copied(self) -> UnsteadyStore:
        other = UnsteadyStore()
        other.objects.update(self.objects)
        other.digests = list(self.digests)
        return other

    def get(self, key: str, bound: int | None = None) -> bytes:
        with self._lock:
            self.asked.append(key)
            self.under_way += 1
        try:
            found = self.objects.get(key)
            assert self.gate.wait(BOUND_S), "the store was never opened again"
            if self.away:
                raise StoreUnavailable(f"{self.uri}: cannot connect to http://store.internal:9000")
            return super().get(key, bound) if found is None else found
        finally:
            with self._lock:
                self.under_way -= 1
