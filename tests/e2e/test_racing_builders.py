"""Builders that publish one deployment at once, on a store without conditional writes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_shared.bundle.claims import claimed_numbers, generation_numbers
from loramux_shared.bundle.deployments import current_generation, publish_generation
from loramux_shared.bundle.manifest import BaseRecord, Current, Generation, current_key, generation_key
from loramux_shared.deployment import Dtype, Repository, SourceKind
from loramux_shared.faults import BundleCorrupt
from loramux_shared.storage.base import Entry, Store
from loramux_shared.storage.memory import MemoryStore

WAIT_S = 20


def generation(max_seq_len: int) -> Generation:
    """Another content for every length."""
    return Generation(
        deployment="tiny",
        number=1,
        create_time=datetime(2026, 1, 1, tzinfo=UTC),
        served_model_name="tiny",
        base=BaseRecord(source=Repository(source=SourceKind.HF, repo="org/base", revision="0" * 40), files={}),
        adapters={},
        max_seq_len=max_seq_len,
        max_lora_rank=8,
        lora_dtype=Dtype.BFLOAT16,
    )


class Killed(BaseException):
    """What kill -9 does, as far as a thread can show it."""


class Turns:
    """A store for one builder, whose every operation waits for its turn."""

    def __init__(self, store: MemoryStore, dies_at: int | None = None) -> None:
        self.store, self.uri = store, store.uri
        self.dies_at = dies_at
        self.count = 0
        self.go = threading.Semaphore(0)
        self.parked = threading.Semaphore(0)

    def _turn(self) -> None:
        self.parked.release()
        assert self.go.acquire(timeout=WAIT_S)
        self.count += 1
        if self.dies_at is not None and self.count > self.dies_at:
            raise Killed

    def get(self, key: str) -> bytes:
        """Read at one's turn."""
        self._turn()
        return self.store.get(key)

    def put(self, key: str, data: bytes | Path) -> None:
        """Write at one's turn."""
        self._turn()
        self.store.put(key, data)

    def take(self, key: str, file: Path) -> None:
        """Move at one's turn."""
        self._turn()
        self.store.take(key, file)

    def sha256(self, key: str) -> str | None:
        """Look at one's turn."""
        self._turn()
        return self.store.sha256(key)

    def list(self, prefix: str) -> Iterator[str]:
        """List at one's turn."""
        self._turn()
        return iter(list(self.store.list(prefix)))

    def entries(self, prefix: str) -> Iterator[Entry]:
        """List at one's turn."""
        self._turn()
        return iter(list(self.store.entries(prefix)))

    def delete(self, key: str) -> None:
        """Remove at one's turn."""
        self._turn()
        self.store.delete(key)


class Race:
    """Builders that publish a generation each, one operation at a time, in an order that the test says."""

    def __init__(self, count: int, dies_at: int | None = None) -> None:
        self.store = MemoryStore()
        publish_generation(self.store, generation(100))
        self.pool = ThreadPoolExecutor(count)
        self.turns = [Turns(self.store, dies_at if i == 0 else None) for i in range(count)]
        self.results = [
            self.pool.submit(self._publish, turns, generation(101 + i)) for i, turns in enumerate(self.turns)
        ]
        for turns in self.turns:
            assert turns.parked.acquire(timeout=WAIT_S)

    def _publish(self, turns: Turns, wanted: Generation) -> Generation | None:
        try:
            return publish_generation(turns, wanted)
        except Killed:
            return None
        finally:
            turns.parked.release()

    def step(self, i: int) -> bool:
        """Let one builder do one operation; False when it has ended."""
        if self.results[i].done():
            return False
        self.turns[i].go.release()
        assert self.turns[i].parked.acquire(timeout=WAIT_S)
        return True

    def run(self, schedule: Sequence[tuple[int, int]]) -> None:
        """Let builders do as many operations as the schedule says, then all to their ends, and check."""
        for i, operations in schedule:
            for _ in range(operations):
                if not self.step(i):
                    break
                self.check_readers()
        for i in reversed(range(len(self.turns))):
            while self.step(i):
                self.check_readers()
        self.pool.shutdown()
        self.check_end()

    def check_readers(self) -> None:
        """Whoever reads sees a whole generation at any time."""
        assert current_generation(self.store, "tiny") is not None

    def check_end(self) -> None:
        """Every generation is there under a number of its own; the served one is none that was superseded."""
        published = [found for result in self.results if (found := result.result()) is not None]
        numbers = [found.number for found in published]
        assert len(set(numbers)) == len(numbers)
        for found in published:
            assert self.store.get(generation_key("tiny", found.number)) == found.to_bytes()
        served = current_generation(self.store, "tiny")
        assert served is not None
        assert served.number >= max(numbers)
        if all(result.result() for result in self.results):
            assert sorted(numbers) == generation_numbers(self.store, "tiny")[1:]
            assert claimed_numbers(self.store, "tiny") == {}


def operations_of_one() -> int:
    """How many operations a builder needs that is alone."""
    race = Race(1)
    race.run([])
    return race.turns[0].count


def test_every_order_with_two_switches_keeps_both_generations():
    """Whenever one builder is stopped and another goes on, no generation is lost and the highest is served."""
    count = operations_of_one()
    assert count < 25
    for first in range(count + 1):
        for second in range(1, count + 2):
            Race(2).run([(0, first), (1, second), (0, 2 * count)])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), max_size=25))
def test_any_order_of_three_builders_keeps_all_generations(schedule):
    """Three builders whose operations are mixed at random end with three generations, the highest served."""
    Race(3).run(schedule)


def test_a_builder_killed_at_any_operation_hinders_nobody():
    """One builder dies at each of its operations; the other publishes, and the first one's retry does too."""
    for dies_at in range(operations_of_one()):
        for before in (0, dies_at // 2, dies_at + 1):
            race = Race(2, dies_at)
            race.run([(0, before), (1, 4)])
            again = publish_generation(race.store, generation(101))
            served = current_generation(race.store, "tiny")
            assert served is not None
            assert served.number == max(generation_numbers(race.store, "tiny"))
            assert again.max_seq_len == 101


def test_many_real_threads_keep_all_generations():
    """Eight builders in free threads publish eight generations with eight numbers."""
    store = MemoryStore()
    with ThreadPoolExecutor(8) as pool:
        published = list(pool.map(lambda i: publish_generation(store, generation(i)), range(101, 109)))
    assert sorted(found.number for found in published) == generation_numbers(store, "tiny")
    assert len({found.number for found in published}) == 8
    served = current_generation(store, "tiny")
    assert served is not None
    assert served.number == max(found.number for found in published)


class Torn(MemoryStore):
    """Sends a pointer with one version's length and another's bytes, a few times."""

    def __init__(self, torn: int, mix: Callable[[bytes], bytes]) -> None:
        super().__init__()
        self.torn, self.mix = torn, mix

    def get(self, key: str) -> bytes:
        """Read, torn at first."""
        data = super().get(key)
        if key == current_key("tiny") and self.torn:
            self.torn -= 1
            return self.mix(data)
        return data


OLD = Current(generation=99, sha256="0" * 64).to_bytes()
MIXES = [
    pytest.param(lambda data: data[:-1], id="cut by one byte"),
    pytest.param(lambda data: data[: len(data) // 2], id="half"),
    pytest.param(lambda data: OLD[:20] + data[20:], id="the beginning of another version"),
    pytest.param(lambda data: data[:-30] + OLD[-30:], id="the end of another version"),
    pytest.param(lambda data: data + b"\n", id="longer"),
]


@pytest.mark.parametrize("mix", MIXES)
def test_a_torn_pointer_is_read_again(mix):
    """A pointer that does not fit is read again and found whole; one that stays torn is BUNDLE_CORRUPT."""
    store: Store = Torn(0, mix)
    assert isinstance(store, Torn)
    published = publish_generation(store, generation(101))
    store.torn = 2
    assert current_generation(store, "tiny") == published
    store.torn = 100
    with pytest.raises(BundleCorrupt):
        current_generation(store, "tiny")
