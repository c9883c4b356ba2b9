"""The choice of a replica for a request on Ray."""

from loramux_ray.placement import MEMORY, VARIETY, Popularity, choose, order

REPLICAS = tuple(f"10.0.0.{number}:50052" for number in range(1, 6))


def test_the_order_is_the_same_everywhere() -> None:
    """Every process and machine has the same order, for any order of the list: other clients rely on it."""
    assert order("support", REPLICAS) == order("support", REPLICAS[::-1])
    left = tuple(each for each in order("support", REPLICAS) if each != REPLICAS[1])
    assert order("support", (REPLICAS[0], *REPLICAS[2:])) == left  # who leaves moves its own models only
    found = ["".join(each[7] for each in order(model, REPLICAS)) for model in ("support", "legal", "größer")]
    assert found == ["15234", "51423", "41532"]


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
    for number in range(29_000):
        popularity.copies("old" if number < 1000 else f"new-{number}", 10)
    assert popularity.copies("old", 10) == 1
    assert popularity.copies("new-28999", 10**9) <= MEMORY // VARIETY  # bounded by the models that it knows
