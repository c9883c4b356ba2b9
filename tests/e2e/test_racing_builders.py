"""Builders that publish one deployment at once, on a store without conditional writes."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from loramux_shared.bundle.claims import claimed_numbers, generation_numbers
from loramux_shared.bundle.deployments import current_generation, publish_generation
from loramux_shared.bundle.generation import Current, Generation, current_key, generation_key
from loramux_shared.faults import BundleCorrupt
from loramux_shared.storage.base import Store
from loramux_shared.storage.memory import MemoryStore
from loramux_shared.storage.open import open_store
from tests.support.examples import examples, spread
from tests.support.generations import generation
from tests.support.s3_gateway import S3Server
from tests.support.turns import Race


def of_length(max_seq_len: int) -> Generation:
    """Another content for every length."""
    return generation(max_seq_len=max_seq_len)


class Published:
    """Builders that publish a generation each, one operation at a time, in an order that the test says."""

    def __init__(self, count: int, dies_at: int | None = None) -> None:
        self.store = MemoryStore()
        publish_generation(self.store, of_length(100))
        works = [partial(publish_generation, generation=of_length(101 + i)) for i in range(count)]
        self.race: Race[Generation] = Race(self.store, works, self.check_readers, dies_at)

    def run(self, schedule: Sequence[tuple[int, int]]) -> None:
        """Let builders do as many operations as the schedule says, then all to their ends, and check."""
        self.check_end(self.race.run(schedule))

    def check_readers(self) -> None:
        """Check that a reader sees a whole generation at any time."""
        assert current_generation(self.store, "tiny") is not None

    def check_end(self, results: Sequence[Generation | None]) -> None:
        """Every generation has its own number and stays complete; the served generation is the newest."""
        published = [found for found in results if found is not None]
        numbers = [found.number for found in published]
        assert len(set(numbers)) == len(numbers)
        for found in published:
            assert self.store.get(generation_key("tiny", found.number)) == found.to_bytes()
        served = current_generation(self.store, "tiny")
        assert served.number >= max(numbers)
        if all(results):
            assert sorted(numbers) == generation_numbers(self.store, "tiny")[1:]
            assert claimed_numbers(self.store, "tiny") == {}


def operations_of_one() -> int:
    """Return the number of operations of a builder that is alone."""
    alone = Published(1)
    alone.run([])
    return alone.race.turns[0].count


def test_every_order_with_two_switches_keeps_both_generations():
    """No generation is lost when builders take turns at any operation; the highest is served."""
    count = operations_of_one()
    assert count < 25
    for first in range(count + 1):
        for second in spread(range(1, count + 2), 6):
            Published(2).run([(0, first), (1, second), (0, 2 * count)])


@settings(max_examples=examples(50), deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), max_size=25))
def test_any_order_of_three_builders_keeps_all_generations(schedule):
    """Three builders in a random order of operations end with three generations; the highest is served."""
    Published(3).run(schedule)


def test_a_builder_killed_at_any_operation_hinders_nobody():
    """A builder that dies at any operation blocks neither the other builder nor its own retry."""
    for dies_at in spread(range(operations_of_one()), 10):
        for before in (0, dies_at // 2, dies_at + 1):
            both = Published(2, dies_at)
            both.run([(0, before), (1, 4)])
            again = publish_generation(both.store, of_length(101))
            served = current_generation(both.store, "tiny")
            assert served.number == max(generation_numbers(both.store, "tiny"))
            assert again.max_seq_len == 101


@pytest.mark.parametrize("kind", ["memory", "file", "s3"])
def test_many_real_threads_keep_all_generations(
    kind: str, tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight builders in free threads publish eight generations with eight numbers, on real stores that ignore
    conditional writes too, while a reader sees whole generations alone.
    """
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    uri = f"file://{tmp_path}" if kind == "file" else f"s3://{s3_server.new_bucket()}"
    store: Store = MemoryStore() if kind == "memory" else open_store(uri)
    each = [store if kind == "memory" else open_store(uri) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        publishing = pool.map(lambda i: publish_generation(each[i], of_length(101 + i)), range(8))
        seen = [current_generation(store, "tiny") for _ in range(20)]
        published = list(publishing)
    assert all(found is None or found in published for found in seen)
    assert sorted(found.number for found in published) == generation_numbers(store, "tiny")
    assert {found.max_seq_len for found in published} == set(range(101, 109))
    assert current_generation(store, "tiny").number == max(found.number for found in published)
    assert claimed_numbers(store, "tiny") == {}


class Torn(MemoryStore):
    """Sends a pointer with one version's length and another's bytes, a few times."""

    def __init__(self, torn: int, mix: Callable[[bytes], bytes]) -> None:
        super().__init__()
        self.torn, self.mix = torn, mix

    def get(self, key: str, bound: int | None = None) -> bytes:
        """Read, torn at first."""
        data = super().get(key, bound)
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
    published = publish_generation(store, of_length(101))
    store.torn = 2
    assert current_generation(store, "tiny") == published
    store.torn = 100
    with pytest.raises(BundleCorrupt):
        current_generation(store, "tiny")
