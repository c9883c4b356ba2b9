"""The choice of a replica for a stream, and the addresses of a client."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st

from loramux.connection import Address, is_many, look_up, split
from loramux_fleet.placement import Placement, Popularity, choose, order
from loramux_shared.faults import SettingsInvalid
from tests.support.examples import examples

REPLICAS = tuple(f"10.0.0.{number}:50052" for number in range(1, 6))
names = st.text(min_size=1, max_size=12)
fleets = st.lists(
    st.sampled_from([f"r{number}:1" for number in range(12)]), min_size=2, max_size=12, unique=True
)


def test_the_order_is_the_same_everywhere() -> None:
    """Every process and machine has the same order, for any order of the list: other clients rely on it."""
    assert order("support", REPLICAS) == order("support", REPLICAS[::-1])
    left = tuple(each for each in order("support", REPLICAS) if each != REPLICAS[1])
    assert order("support", (REPLICAS[0], *REPLICAS[2:])) == left  # who leaves moves its own models only
    found = ["".join(each[7] for each in order(model, REPLICAS)) for model in ("support", "legal", "größer")]
    assert found == ["15234", "51423", "41532"]


@settings(max_examples=examples(25))
@given(st.lists(st.tuples(names, st.integers(0, 3)), max_size=120), fleets, st.floats(0, 0.999))
def test_no_replica_has_many_more_than_the_mean(
    steps: list[tuple[str, int]], fleet: list[str], spot: float
) -> None:
    """A stream finds a replica that is not above the bound, after any sequence of begins and ends."""
    placement, held = Placement(fleet, spot), []
    for model, ends in steps:
        replica = placement.take(model)
        held.append(replica)
        mean = len(held) / len(fleet)
        assert Counter(held)[replica] <= math.ceil(1.25 * mean + math.sqrt(1.25 * mean))
        for _ in range(min(ends, len(held)) if ends > 1 else 0):
            placement.give(held.pop(0))


def test_popular_models_are_at_several_replicas() -> None:
    """The model with half the requests is at several replicas, and each client begins at another of them."""
    popularity = Popularity()
    for number in range(2000):
        popularity.copies("popular", 10)
        popularity.copies(f"other-{number % 400}", 10)
    assert popularity.copies("popular", 10) == 10
    assert popularity.copies("other-1", 10) == 1
    assert popularity.copies("popular", 1) == 1
    ordered = order("popular", REPLICAS)
    idle = dict.fromkeys(REPLICAS, 0)
    chosen = [choose(ordered, idle.__getitem__, 0, 5, spot / 10) for spot in range(10)]
    assert chosen == [each for each in ordered for _ in range(2)]


def test_a_popular_model_goes_on_where_its_share_is_taken() -> None:
    """Past the first of its replicas that has its share; a model of one place continues at the bound only."""
    ordered = ("a", "b", "c", "d")
    load = {"a": 8, "b": 4, "c": 12, "d": 8}
    assert choose(ordered, load.__getitem__, 32, 2, 0.0) == "b"
    assert choose(ordered, load.__getitem__, 32, 1, 0.0) == "a"
    assert choose(ordered, (load | {"a": 17}).__getitem__, 41, 1, 0.0) == "b"


def test_popularity_is_forgotten() -> None:
    """A model that is not requested for a while is spread no longer, and costs nothing."""
    popularity = Popularity()
    for number in range(30_000):
        popularity.copies("old" if number < 1000 else f"new-{number % 50}", 10)
    assert popularity.copies("old", 10) == 1
    assert len(popularity._asked) < 60


def test_replicas_that_failed_come_last() -> None:
    """A replica that failed comes last for a while; where all have failed, each may be tried again."""
    now = [0.0]
    placement = Placement(REPLICAS, 0.0, lambda: now[0])
    first, second, *others = order("support", REPLICAS)
    placement.failed(first, 2.0)
    assert placement.take("support") == second
    now[0] = 2.0
    assert placement.take("support") == first
    for each in REPLICAS:
        placement.failed(each, 2.0)
    assert placement.take("support", [first, second]) == others[0]
    assert placement.take("support", REPLICAS) is None


def test_lists_are_split() -> None:
    """Each address once, in their order, whatever their kinds."""
    assert split("a:1, b:2,a:1") == ("a:1", "b:2")
    kinds = ("grpcs://a:1", "[::1]:2", "dns:///replicas:3", "grpcs://dns:///replicas:4")
    assert split(",".join(kinds)) == kinds


def test_what_is_no_address_is_named() -> None:
    """A wrong address is refused with the expected form."""
    for wrong in (
        "", ",", "a", "a:b", "a:1,b", "http://a:1,b:1", "dns:///", "dns:///a", "dns://a:1", ":1", "a:99999",
    ):  # fmt: skip
        with pytest.raises(SettingsInvalid, match="expected HOST:PORT, a list of them, or dns:///NAME:PORT"):
            split(wrong)


def test_which_words_are_many() -> None:
    """A single address is one replica, with TLS too; a list and a DNS name are several."""
    assert not any(map(is_many, ("a:1", "grpcs://a:1", "[::1]:1", "unix:/run/loramux.sock")))
    assert all(map(is_many, ("a:1,b:1", "dns:///a:1", "grpcs://dns:///a:1")))


def test_names_are_looked_up() -> None:
    """All addresses behind one, each with the name that its certificate has to have."""
    assert Address("127.0.0.1:7") in look_up("dns:///localhost:7")
    assert Address("grpcs://127.0.0.1:7", "localhost") in look_up("grpcs://dns:///localhost:7")
    assert look_up("a:1") == (Address("a:1"),)
    with pytest.raises(SettingsInvalid, match="a name that resolves"):
        look_up("dns:///no.such.host.invalid:1")
