"""Builders and changes of one deployment at once: nothing that was answered gets lost."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from loramux_shared.bundle.claims import claimed_numbers, generation_numbers
from loramux_shared.bundle.deployments import (
    current_generation,
    publish_change,
    publish_generation,
    read_generation,
)
from loramux_shared.bundle.generation import Current, Generation, current_key
from loramux_shared.faults import BundleCorrupt, GenerationMismatch
from loramux_shared.storage.base import Store
from loramux_shared.storage.memory import MemoryStore
from loramux_shared.storage.open import open_store
from tests.e2e.race import Race
from tests.support.examples import examples, spread
from tests.support.generations import generation, record
from tests.support.s3_gateway import S3Server


@pytest.mark.parametrize("kind", ["memory", "file", "s3"])
def test_many_real_threads_keep_all_generations(
    kind: str, tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight builders in threads publish eight generations, on stores that ignore conditional writes too."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    uri = f"file://{tmp_path}" if kind == "file" else f"s3://{s3_server.new_bucket()}"
    store: Store = MemoryStore() if kind == "memory" else open_store(uri)
    each = [store if kind == "memory" else open_store(uri) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        publishing = pool.map(lambda i: publish_generation(each[i], generation(max_seq_len=101 + i)), range(8))
        seen = [current_generation(store, "tiny") for _ in range(20)]
        published = list(publishing)
    assert all(found is None or found in published for found in seen)
    assert sorted(found.number for found in published) == generation_numbers(store, "tiny")
    assert {found.max_seq_len for found in published} == set(range(101, 109))
    assert current_generation(store, "tiny").number == max(found.number for found in published)
    assert claimed_numbers(store, "tiny") == {}
    newest = current_generation(store, "tiny")
    assert publish_generation(store, newest) == newest  # the same content again


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
    published = publish_generation(store, generation(max_seq_len=101))
    store.torn = 2
    assert current_generation(store, "tiny") == published
    store.torn = 100
    with pytest.raises(BundleCorrupt):
        current_generation(store, "tiny")


STALE, LONG = timedelta(milliseconds=1), timedelta(seconds=15)


def adding(name: str) -> Callable[[Generation], Generation]:
    def change(before: Generation) -> Generation:
        adapters = {**before.adapters, name: record(name)}
        return before.model_copy(update={"adapters": dict(sorted(adapters.items()))})

    return change


def add(name: str, store: Store, stale: timedelta = LONG) -> int:
    """Publish that an adapter comes in; returns the generation."""
    return publish_change(store, "tiny", adding(name), stale=stale)[0].number


def rebuild(name: str, store: Store) -> int:
    """Publish a build of a file that knows of two adapters."""
    return publish_generation(store, generation("first", name)).number


def started() -> MemoryStore:
    store = MemoryStore()
    publish_generation(store, generation("first"))
    return store


def served(store: Store) -> Generation:
    found = current_generation(store, "tiny")
    assert found is not None
    return found


def check_history(store: MemoryStore, builds: int = 0) -> None:
    """Every generation is the one before it with one adapter more, or one of the builds."""
    numbers = generation_numbers(store, "tiny")
    chain = [read_generation(store, "tiny", number) for number in numbers]
    others = 0
    for before, after in pairwise(chain):
        came = after.adapters.keys() - before.adapters.keys()
        if came <= {"built", "rebuilt"}:
            others += 1
            assert set(after.adapters) == {"first", *came}
        else:
            assert before.adapters.keys() <= after.adapters.keys()
            assert len(came) == 1
    assert others == builds
    assert served(store).number == numbers[-1]
    assert claimed_numbers(store, "tiny") == {}


def race(*names: str, dies_at: int | None = None, stale: timedelta = LONG) -> Race[int]:
    """Changes that each add an adapter."""
    store = started()
    return Race(store, [partial(add, name, stale=stale) for name in names], lambda: served(store), dies_at)


def operations_of_one() -> int:
    alone = race("one")
    alone.run([])
    return alone.turns[0].count


def test_every_order_with_two_switches_keeps_both_changes() -> None:
    """Whenever one change is stopped and another continues, both adapters are served in the end."""
    count = operations_of_one()
    assert count < 25
    for first in range(count + 1):
        for second in spread(range(1, count + 2), 6):
            both = race("one", "two")
            both.run([(0, first), (1, second), (0, 2)])
            assert set(served(both.store).adapters) == {"first", "one", "two"}
            check_history(both.store)


@settings(max_examples=examples(15))
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), max_size=25))
def test_any_order_of_three_changes_keeps_all(schedule: list[tuple[int, int]]) -> None:
    """Three changes in a random order of operations are all served, none twice."""
    three = race("one", "two", "three")
    three.run(schedule)
    assert set(served(three.store).adapters) == {"first", "one", "two", "three"}
    check_history(three.store)


@settings(max_examples=examples(15))
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), max_size=25))
def test_builds_beside_a_change_are_before_or_after_it(schedule: list[tuple[int, int]]) -> None:
    """Each generation of two builds and a change follows from the one below it, in any order."""
    store = started()
    works = [partial(rebuild, "built"), partial(add, "one"), partial(rebuild, "rebuilt")]
    Race(store, works, lambda: served(store)).run(schedule)
    check_history(store, builds=2)


def test_a_change_killed_at_any_operation_hinders_nobody() -> None:
    """A change that dies at any operation blocks neither the other change nor its own retry."""
    for dies_at in spread(range(operations_of_one()), 10):
        for before in (0, dies_at // 2, dies_at + 1):
            two = race("one", "two", dies_at=dies_at, stale=STALE)
            two.run([(0, before), (1, 4)])
            again, _ = publish_change(two.store, "tiny", adding("one"), stale=STALE)
            assert set(served(two.store).adapters) == {"first", "one", "two"}
            assert again.number == served(two.store).number


def test_of_two_that_expect_one_generation_one_is_refused() -> None:
    """Optimistic concurrency: in every order with one switch exactly one change is published."""

    def attempt(name: str, store: Store) -> bool:
        try:
            publish_change(store, "tiny", adding(name), expected=1)
        except GenerationMismatch:
            return False
        return True

    for first in range(operations_of_one() + 1):
        store = started()
        works = [partial(attempt, "one"), partial(attempt, "two")]
        done = Race(store, works, partial(served, store)).run([(0, first), (1, 3)])
        assert sorted(map(bool, done)) == [False, True]
        assert len(served(store).adapters) == 2
